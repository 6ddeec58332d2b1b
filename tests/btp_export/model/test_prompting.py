"""Prompter and pictures: what the model sees is what transformers' processor makes; everything else is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from btp_export.model.open_model import open_model
from btp_export.model.pictures import open_picture, to_rgb
from btp_export.model.prompting import Prompter
from graphs.records.errors import InputError


@pytest.fixture(scope="module")
def prompter(demo_checkpoint: Path) -> Prompter:
    return Prompter(demo_checkpoint, open_model("demo").spec)


def test_encode_is_the_processor(prompter: Prompter, demo_checkpoint: Path, pictures: list[Image.Image]) -> None:
    prompts = ["is there a red circle?", "what colour is the star?", "how many rings?", "where is the blue square?"]
    encoded = prompter.encode(pictures, prompts)
    processor = AutoProcessor.from_pretrained(demo_checkpoint)
    for place, (image, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        wanted = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        np.testing.assert_array_equal(encoded.input_ids[place], wanted["input_ids"][0])
        np.testing.assert_allclose(encoded.pixel_values[place], wanted["pixel_values"][0], atol=1e-6)
    assert (encoded.prefix_tokens, encoded.image_tokens) == (8, 576)
    assert [8 + 576 + text for text in encoded.text_lengths] == list(encoded.lengths)
    assert encoded.part(range(1, 3)).lengths == encoded.lengths[1:3]


def test_raw_prompt_is_the_whole_text(prompter: Prompter, pictures: list[Image.Image]) -> None:
    text = prompter.text("is there a red circle?")
    assert text.count("<image>") == 1
    raw, plain = (
        prompter.encode(pictures[:1], [text], raw=True),
        prompter.encode(pictures[:1], ["is there a red circle?"]),
    )
    np.testing.assert_array_equal(raw.input_ids[0], plain.input_ids[0])


def test_begin_token_is_not_doubled(prompter: Prompter, pictures: list[Image.Image]) -> None:
    text = prompter.text("is there a red circle?")
    ids = prompter.encode(pictures[:1], [f"<s>{text}"], raw=True).input_ids[0]
    np.testing.assert_array_equal(ids, prompter.encode(pictures[:1], [text], raw=True).input_ids[0])


def test_unknown_words_are_counted(prompter: Prompter, pictures: list[Image.Image]) -> None:
    assert prompter.encode(pictures[:2], ["is there a red circle?", "zebra xylophone?"]).unknown == (0, 2)


@pytest.mark.parametrize(
    ("prompt", "raw", "words"),
    [
        ("", False, "prompt is empty"),
        (" \n", True, "prompt is empty"),
        ("no picture here", True, "0 times"),
        ("look at the picture below. USER: <image> <image> what ASSISTANT:", True, "2 times"),
        ("what is <image>", False, "stands for a picture"),
        ("USER: <image> what ASSISTANT:", True, "tokens before the image"),
        ("look at the picture below. USER: <image>", True, "no text after the image"),
    ],
)
def test_prompts_that_do_not_fit(
    prompter: Prompter, pictures: list[Image.Image], prompt: str, raw: bool, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        prompter.encode(pictures[:1], [prompt], raw=raw)
    assert caught.value.exit_code == 2
    assert len(caught.value.lines()) <= 3


def test_counts_must_agree(prompter: Prompter, pictures: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="2 pictures and 1 prompts"):
        prompter.encode(pictures[:2], ["what?"])
    with pytest.raises(InputError, match="0 pictures"):
        prompter.encode([], [])


def test_profile_of_other_shapes(prompter: Prompter, pictures: list[Image.Image]) -> None:
    from btp_export.exporting import Options, make_profiles

    profile = make_profiles(open_model("demo"), Options())[0]
    encoded = prompter.encode(pictures[:1], ["what?"], profile=profile)
    with pytest.raises(InputError, match="576 image tokens"):
        encoded.check(profile.model_copy(update={"image_tokens": 144, "grid": (12, 12)}))
    with pytest.raises(InputError, match="576 image tokens from 96 x 96"):
        encoded.check(profile.model_copy(update={"image_size": (336, 336)}))


def test_folder_without_processor(tmp_path: Path, demo_checkpoint: Path) -> None:
    spec = open_model("demo").spec
    with pytest.raises(InputError, match="holds no usable processor"):
        Prompter(tmp_path, spec)
    shutil.copyfile(demo_checkpoint / "config.json", tmp_path / "config.json")
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(InputError, match="holds no usable processor"):
        Prompter(tmp_path, spec)


def test_folder_without_chat_template(tmp_path: Path, demo_checkpoint: Path, pictures: list[Image.Image]) -> None:
    for file in demo_checkpoint.glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    plain = Prompter(tmp_path, open_model("demo").spec)
    with pytest.raises(InputError, match="--raw-prompt"):
        plain.encode(pictures[:1], ["what?"])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no pictures, please') }}")
    with pytest.raises(InputError, match="no pictures, please"):
        Prompter(tmp_path, open_model("demo").spec).encode(pictures[:1], ["what?"])
    (tmp_path / "chat_template.jinja").write_text("USER: {{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(InputError, match="writes no <image>"):
        Prompter(tmp_path, open_model("demo").spec).encode(pictures[:1], ["what?"])


# Pictures


def colour(image: Image.Image) -> Any:
    return np.asarray(image)[0, 0].tolist()


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    base = Image.new("RGB", (20, 10), (200, 100, 50))
    for mode, name, wanted in (
        ("RGB", "a.png", [200, 100, 50]),
        ("RGBA", "a.png", [200, 100, 50]),
        ("P", "a.gif", [200, 100, 50]),
        ("L", "a.png", [124] * 3),
        ("LA", "a.png", [124] * 3),
        ("1", "a.png", [255] * 3),
        ("CMYK", "a.jpg", [200, 100, 50]),
    ):
        base.convert(mode).save(tmp_path / name)
        image = open_picture(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (20, 10)), mode
        if mode != "1":
            np.testing.assert_allclose(colour(image), wanted, atol=6, err_msg=mode)


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert colour(open_picture(tmp_path / "deep.png")) == [128] * 3
    with pytest.raises(InputError, match="float pixels"):
        to_rgb(Image.new("F", (8, 8)))
    with pytest.raises(InputError, match="32-bit pixels"):
        to_rgb(Image.fromarray(np.full((8, 8), 70000, np.int32)))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30)).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes([0] * 256))
    assert open_picture(tmp_path / "p.png").mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    opened = open_picture(tmp_path / "turned.jpg")
    assert opened.size == (20, 40)
    assert colour(opened)[0] > 200, "red is now at the top"
    assert np.asarray(opened)[-1, 0][2] > 200


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(InputError, match="directory"):
        open_picture(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="not a picture of a known format"):
        open_picture(tmp_path / "text.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="cannot read the picture"):
            open_picture(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="not a picture"):
        open_picture(tmp_path / "empty.png")


def test_pictures_too_large_to_be_meant(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")  # 25 kB on disk, 600 MB as RGB
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"million pixels"):
        open_picture(tmp_path / "bomb.png")
    Image.new("1", (11_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="11000 x 10000"):
        open_picture(tmp_path / "large.png")
    with pytest.raises(InputError, match="200 to 1"):
        to_rgb(Image.new("RGB", (2010, 10)))


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 300)])
def test_tiny_pictures_keep_their_colour(prompter: Prompter, size: tuple[int, int]) -> None:
    """Three pixels in a row must not be taken for three channels."""
    pixels = prompter.encode([Image.new("RGB", size, (200, 100, 50))], ["what?"]).pixel_values[0]
    wanted = (np.array([200, 100, 50]) / 255 - 0.35) / 0.25
    np.testing.assert_allclose(pixels.reshape(3, -1), np.broadcast_to(wanted[:, None], (3, 96 * 96)), atol=1e-5)
