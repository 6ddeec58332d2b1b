"""The one opener of pictures: what transformers makes of the same file, limits, refusals, and no other is there."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from calibrate.data import samples
from calibrate.data.sources import calibration_samples
from graphs.files.pictures import open_picture, to_rgb
from graphs.records.errors import InputError

ROOT = Path(__file__).parents[3]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8), "RGBA")
PALETTE = NOISE.convert("RGB").quantize(16)


def colour(image: Image.Image) -> Any:
    return np.asarray(image)[0, 0].tolist()


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "rgb": (NOISE.convert("RGB"), "png", {}),
    "rgba": (NOISE, "png", {}),
    "grey": (NOISE.convert("L"), "png", {}),
    "grey, one transparent": (NOISE.convert("L"), "png", {"transparency": 7}),
    "grey and alpha": (NOISE.convert("LA"), "png", {}),
    "black and white": (NOISE.convert("1"), "png", {}),
    "palette": (PALETTE, "png", {}),
    "palette, one transparent": (PALETTE, "png", {"transparency": 3}),
    "palette, degrees of transparency": (PALETTE, "png", {"transparency": bytes(range(0, 256, 16))}),
    "gif": (PALETTE, "gif", {"transparency": 3}),
    "film": (PALETTE, "gif", {"save_all": True, "append_images": [PALETTE.rotate(180)]}),
    "jpeg": (NOISE.convert("RGB"), "jpeg", {}),
    "grey jpeg": (NOISE.convert("L"), "jpeg", {}),
    "cmyk jpeg": (NOISE.convert("RGB").convert("CMYK"), "jpeg", {}),
    "webp with alpha": (NOISE, "webp", {}),
    "bmp": (NOISE.convert("RGB"), "bmp", {}),
    "ppm": (NOISE.convert("RGB"), "ppm", {}),
    "tiff with alpha": (NOISE, "tiff", {}),
    "compressed tiff": (NOISE.convert("RGB"), "tiff", {"compression": "tiff_lzw"}),
    **{f"turned {n} jpeg": (NOISE.convert("RGB"), "jpeg", turned(n)) for n in range(1, 9)},
    "turned png": (PALETTE, "png", turned(6)),
    "turned tiff": (NOISE.convert("RGB"), "tiff", turned(8)),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_what_transformers_makes_of_the_file(name: str, tmp_path: Path) -> None:
    image, suffix, options = FILES[name]
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    opened, wanted = open_picture(path), load_image(str(path))
    assert (opened.mode, opened.size) == ("RGB", wanted.size)
    assert opened.tobytes() == wanted.tobytes()
    assert open_picture(path.read_bytes()).tobytes() == wanted.tobytes()
    with Image.open(path) as image:
        assert to_rgb(image).tobytes() == wanted.tobytes()


def test_a_turned_tiff_with_alpha(tmp_path: Path) -> None:
    """Pillow reads it by a path of its own, wrongly up to version 13."""
    for suffix in ("png", "tiff"):
        NOISE.save(tmp_path / f"turned.{suffix}", **turned(8))
    opened = open_picture(tmp_path / "turned.tiff")
    assert opened.size == (12, 20)
    assert opened.tobytes() == open_picture(tmp_path / "turned.png").tobytes()


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = (np.arange(12 * 20, dtype=np.uint32).reshape(12, 20) * 273).astype(np.uint16)
    wanted = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for suffix in ("png", "tiff"):
        Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
        np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / f"deep.{suffix}")), wanted)
    (tmp_path / "deep.pgm").write_bytes(b"P5 20 12 65535\n" + ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "deep.pgm")), wanted)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit"), (np.float32, "float")])
def test_what_does_not_say_which_value_is_white_is_refused(dtype: Any, kind: str, tmp_path: Path) -> None:
    """Whatever the values are: an answer that depends on the brightest pixel would be another for each picture."""
    for number, value in enumerate((0, 200, 70000)):
        path = tmp_path / f"{number}.tiff"
        Image.fromarray(np.full((8, 8), value, dtype)).save(path)
        with pytest.raises(InputError, match=rf"{number}.tiff has {kind} pixels"):
            open_picture(path)
    with pytest.raises(InputError, match=f"{kind} pixels"):
        to_rgb(Image.fromarray(np.full((8, 8), 70, dtype)))


def test_other_formats_are_not_opened_whatever_they_are_called(tmp_path: Path, monkeypatch: Any) -> None:
    """Encapsulated PostScript starts Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "picture.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(InputError, match="not a picture of a known format"):
        open_picture(tmp_path / "picture.png")
    NOISE.save(tmp_path / "picture.tga")
    with pytest.raises(InputError, match="not a picture of a known format"):
        open_picture(tmp_path / "picture.tga")


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(InputError, match="directory"):
        open_picture(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="not a picture of a known format"):
        open_picture(tmp_path / "text.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp", "cut.tif"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="cannot read the picture"):
            open_picture(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="not a picture"):
        open_picture(tmp_path / "empty.png")
    with pytest.raises(InputError, match="picture row 3: not a picture"):
        open_picture(b"", "row 3")


def test_pictures_too_large_to_be_meant(tmp_path: Path) -> None:
    for size, said in (((20_000, 10_000), "million pixels"), ((17_850, 10_000), "17850 x 10000")):
        Image.new("1", size).save(tmp_path / "bomb.png")  # 25 kB on disk, 700 MB and more in memory
        assert (tmp_path / "bomb.png").stat().st_size < 100_000
        with pytest.raises(InputError, match=said):
            open_picture(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="200 to 1"):
        to_rgb(Image.new("RGB", (2010, 10)))
    Image.new("1", (40, 30)).save(tmp_path / "small.png")
    assert open_picture(tmp_path / "small.png", most_pixels=1200).size == (40, 30)
    with pytest.raises(InputError, match="40 x 30 pixels"):
        open_picture(tmp_path / "small.png", most_pixels=1199)


@pytest.mark.parametrize("name", [*FILES, "deep"])
def test_large_pictures_are_means_of_the_same_pixels(name: str, tmp_path: Path) -> None:
    """The limit is lowered to the size of the test's pictures; a JPEG is decoded smaller and only nearly the same."""
    image, suffix, options = FILES.get(name, (NOISE, "png", {}))
    if name == "deep":
        image = Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 273)
    if suffix == "jpeg":  # which is decoded in blocks of 8 x 8; not noise, which it does not keep
        image = image.resize((5, 3)).resize((320, 192), Image.Resampling.BICUBIC)
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    whole = open_picture(path)
    scaled = open_picture(path, scale_above=whole.width * whole.height // 4)
    assert (scaled.mode, scaled.size) == ("RGB", (whole.width // 2, whole.height // 2))
    np.testing.assert_allclose(np.asarray(scaled), np.asarray(whole.reduce(2)), atol=3 if suffix == "jpeg" else 0)


@pytest.mark.parametrize("scale_above", [10_000, 50], ids=["whole", "scaled"])
def test_exif_data_that_cannot_be_read_leave_the_picture_as_it_is(scale_above: int, tmp_path: Path) -> None:
    """From the file, and again from the picture that was opened, which still has the data: run asks a second time."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    damaged = exif.tobytes().replace(b"MM\x00*", b"MM\x10*").replace(b"II*\x00", b"II*\x10")
    assert damaged != exif.tobytes()
    plain = Image.effect_noise((16, 8), 90).convert("RGB")
    plain.save(tmp_path / "a.jpg", exif=damaged, quality=95)
    plain.save(tmp_path / "b.jpg", quality=95)
    opened, wanted = (open_picture(tmp_path / name, scale_above=scale_above) for name in ("a.jpg", "b.jpg"))
    assert opened.size == wanted.size and opened.tobytes() == wanted.tobytes()
    assert to_rgb(opened).tobytes() == wanted.tobytes()


def test_strips_of_a_large_picture_meet() -> None:
    tall = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1601, 21, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(to_rgb(tall, scale_above=1601 * 21 // 8)), np.asarray(tall.reduce(3)))


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from graphs.files.pictures import open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = open_picture(Path(sys.argv[1]))
print(*picture.size, *picture.getpixel((3, 5)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("suffix", "mode", "most"), [("jpg", "RGB", 350), ("png", "RGB", 650), ("png", "P", 300)])
def test_a_phone_picture_is_scaled_in_bounded_memory(suffix: str, mode: str, most: int, tmp_path: Path) -> None:
    """12,000 x 9,000; at 4 bytes a pixel it is 432 MB whole, and converting and turning it would take that again."""
    path = tmp_path / f"phone.{suffix}"
    whole = Image.new("RGB", (300, 225), (200, 100, 50)).convert(mode).resize((12_000, 9_000), Image.Resampling.NEAREST)
    whole.save(path, **turned(6), **({} if suffix == "jpg" else {"compress_level": 1}))  # quickly: it is one colour
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    width, height, *rest = map(int, done.stdout.split())
    assert (width, height) == (4500, 6000), "upright"
    np.testing.assert_allclose(rest[:3], (200, 100, 50), atol=6)
    assert rest[3] < most * 1024


def test_a_file_is_the_same_picture_for_every_reader(tmp_path: Path) -> None:
    from btp_export.running.runtime import paired

    Image.fromarray(np.full((8, 16), 40_000, np.uint16)).save(tmp_path / "a.png")
    NOISE.convert("RGB").save(tmp_path / "b.jpg", **turned(6))
    PALETTE.save(tmp_path / "c.png", transparency=3)
    NOISE.save(tmp_path / "d.tif")
    names = ["a.png", "b.jpg", "c.png", "d.tif"]
    wanted = {name: open_picture(tmp_path / name).tobytes() for name in names}
    lines = [f'{{"image": "{name}", "prompt": "?", "answer": "!"}}' for name in names]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    folder = samples.folder_samples(tmp_path, samples.Choice(count=4, seed=0))
    calibration = calibration_samples(str(tmp_path / "lines.jsonl"), count=4)
    measured = samples.jsonl_samples(tmp_path / "lines.jsonl")
    for entry in (folder, calibration, measured):
        assert {sample.name: sample.image.tobytes() for sample in entry.samples} == wanted
    opened, _ = paired([tmp_path / name for name in names], "?")
    assert [picture.tobytes() for picture in opened] == list(wanted.values())
    Image.fromarray(np.full((8, 8), 7, np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (2010, 10)).save(tmp_path / "long.png")
    again = samples.folder_samples(tmp_path, samples.Choice(count=9, seed=0))
    assert sorted(again.skipped) == ["float.tif", "long.png"], "the same limits"


def test_nothing_else_opens_pictures() -> None:
    openers = {
        path.relative_to(ROOT).as_posix()
        for package in ("graphs", "engines", "calibrate", "btp_export")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\bImage\.open\(|exif_transpose\(", path.read_text(encoding="utf-8"))
    }
    assert openers == {"graphs/files/pictures.py"}


def test_an_address_is_to_be_downloaded_first(tmp_path: Path) -> None:
    """As `run --image` gives it, and as a line of a JSONL file names it beside the file."""
    for path in (Path("https://example.com/cat.png"), tmp_path / "https://example.com/cat.png"):
        with pytest.raises(InputError, match="is an address") as caught:
            open_picture(path)
        assert caught.value.do == "download it and give the file"
