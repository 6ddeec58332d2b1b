"""Samples from scenes, folders and JSONL files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibrate.data import samples, sources
from graphs.records.errors import InputError


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for number in range(6):
        place = tmp_path / ("more" if number % 2 else ".") / f"picture{number}.png"
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place)
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_a_folder_is_read_in_a_seeded_order(folder: Path) -> None:
    first = samples.folder_samples(folder, samples.Choice(count=5, seed=1))
    again, other = (samples.folder_samples(folder, samples.Choice(count=5, seed=seed)) for seed in (1, 2))
    assert [sample.name for sample in first.samples] == [sample.name for sample in again.samples]
    assert [sample.name for sample in first.samples] != [sample.name for sample in other.samples]
    assert first.digest() == again.digest() != other.digest()
    assert [sample.prompt for sample in first.samples[:2]] == list(samples.DEFAULT_PROMPTS[:2])


def test_unreadable_pictures_are_named_and_skipped(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    whole = (folder / "picture0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    notes: list[str] = []
    result = samples.folder_samples(folder, samples.Choice(count=8, seed=0, note=notes.append))
    assert len(result.samples) == 6
    assert sorted(result.skipped) == ["broken.jpg", "cut.png"]
    assert len(notes) == 2 and all("cannot read the picture" in text for text in notes)


def test_too_few_pictures_are_an_error(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="0 usable pictures"):
        samples.folder_samples(empty, samples.Choice(count=64, seed=0))
    with pytest.raises(InputError, match="not a folder"):
        samples.folder_samples(folder / "picture0.png", samples.Choice(count=4, seed=0))
    for path in folder.rglob("*.png"):
        if not path.name.startswith("picture0"):
            path.write_bytes(b"")
    with pytest.raises(InputError, match=r"1 usable .* \(5 skipped, 6 found\)"):
        samples.folder_samples(folder, samples.Choice(count=64, seed=0))


def test_image_and_prompt_by_line(folder: Path) -> None:
    path = folder / "samples.jsonl"
    names = ["picture0.png", "more/picture1.png", "broken.png", "picture2.png", "missing.png", "picture4.png"]
    (folder / "broken.png").write_bytes(b"no picture")
    path.write_text("\n".join(json.dumps({"image": name, "prompt": f"about {name}?"}) for name in names))
    notes: list[str] = []
    result = sources.calibration_samples(str(path), count=64, seed=0, note=notes.append)
    assert sorted(result.skipped) == ["broken.png", "missing.png"] and len(notes) == 2
    assert {(one.name, one.prompt) for one in result.samples} == {
        (name, f"about {name}?") for name in names if name not in result.skipped
    }
    assert result.source == "lines of samples.jsonl"
    assert sources.calibration_samples(str(path), count=64, seed=0).digest() == result.digest()
    (folder / "prompts.txt").write_text("what else?\n")
    asked = sources.calibration_samples(str(path), prompts=folder / "prompts.txt", count=64, seed=0)
    assert {sample.prompt for sample in asked.samples} == {"what else?"}
    path.write_text("\n".join(json.dumps({"image": name, "prompt": "?"}) for name in names[:3]))
    with pytest.raises(InputError, match=r"2 usable .* \(1 skipped, 3 found\)"):
        sources.calibration_samples(str(path), count=64, seed=0)
    path.write_text('{"image": "picture0.png"}')
    with pytest.raises(InputError, match="line 1: no key 'prompt'"):
        sources.calibration_samples(str(path), count=64, seed=0)


def test_where_samples_come_from(folder: Path) -> None:
    assert sources.calibration_samples(None, count=4, seed=0).source.startswith("generated scenes, split calibration")
    assert sources.calibration_samples(str(folder), count=4, seed=0).source == "pictures of a folder"
    with pytest.raises(InputError, match="is not there"):
        sources.calibration_samples(str(folder / "nowhere"), count=4, seed=0)


def test_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("What is it?\n\n  How many? \n", encoding="utf-8")
    assert samples.read_prompts(path) == ("What is it?", "How many?")
    path.write_text("\n")
    with pytest.raises(InputError, match="holds nothing"):
        samples.read_prompts(path)
    with pytest.raises(InputError, match="cannot read"):
        samples.read_prompts(tmp_path / "other.txt")


def test_jsonl(folder: Path) -> None:
    path = folder / "questions.jsonl"
    record = {"image": "picture0.png", "prompt": "What?", "answer": "noise", "kind": "what"}
    path.write_text("\n".join([json.dumps(record), "", json.dumps(record | {"answer": "snow"})]))
    result = samples.jsonl_samples(path)
    assert [(one.prompt, one.answer, one.kind) for one in result.samples] == [
        ("What?", "noise", "what"),
        ("What?", "snow", "what"),
    ]
    assert len(samples.jsonl_samples(path, count=1).samples) == 1


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1, 2]",
        '{"image": "picture0.png", "prompt": "?"}',
        '{"image": "none.png", "prompt": "?", "answer": ""}',
        '{"image": 3, "prompt": "?", "answer": ""}',
    ],
)
def test_a_bad_line_is_an_error_not_a_gap(line: str, folder: Path) -> None:
    path = folder / "questions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as caught:
        samples.jsonl_samples(path)
    assert str(path) in str(caught.value) and "line 1" in str(caught.value)


SEPARATORS = "one\u2028two\u2029three\u0085four"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n  \n"])
def test_lines_end_at_line_feeds_only(ending: str, mark: bytes, tail: str, folder: Path) -> None:
    """Byte order mark, Windows endings, blank last lines, and separators of Unicode inside a string."""
    record = {"image": "picture0.png", "prompt": SEPARATORS, "answer": SEPARATORS}
    lines = [json.dumps(record, ensure_ascii=False), json.dumps(record)]
    path = folder / "questions.jsonl"
    path.write_bytes(mark + (ending.join(lines) + tail.replace("\n", ending)).encode())
    assert [(one.prompt, one.answer) for one in samples.jsonl_samples(path).samples] == [(SEPARATORS, SEPARATORS)] * 2
    path.write_bytes(mark + (ending.join([SEPARATORS, "What?"]) + tail.replace("\n", ending)).encode())
    assert samples.read_prompts(path) == (SEPARATORS, "What?")


def test_errors_name_file_and_line(folder: Path) -> None:
    path = folder / "questions.jsonl"
    good = json.dumps({"image": "picture0.png", "prompt": "What?", "answer": "noise"})
    for bad, words in (
        (json.dumps({"image": "none.png", "prompt": "?", "answer": ""}), "none.png"),
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps({"image": "picture0.png", "prompt": None, "answer": ""}), "prompt is not text"),
    ):
        path.write_text(f"\n{good}\n{bad}\n")
        with pytest.raises(InputError) as caught:
            samples.jsonl_samples(path)
        assert f"{path} line 3: " in caught.value.got and words in caught.value.got
        assert len(caught.value.got) < 300
    path.write_bytes(good.encode() + b"\n\xff\xfe\n")
    with pytest.raises(InputError, match="line 2: bytes that are not UTF-8"):
        samples.jsonl_samples(path)
    for read in (samples.jsonl_samples, samples.read_prompts):
        with pytest.raises(InputError, match="cannot read"):
            read(folder / "absent")
        with pytest.raises(InputError, match="cannot read"):
            read(folder)


def no_placeholder(prompt: str) -> None:
    if "<image>" in prompt:
        raise InputError("the prompt holds <image>")


CHECKS = samples.Checks(prompt=no_placeholder)


def test_a_picture_that_cannot_be_used_never_ends_a_calibration(folder: Path) -> None:
    """Too narrow for the model, too large to be meant, cut off in every format, no picture, a folder, a broken link."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    bad = folder / "bad"
    bad.mkdir()
    Image.new("RGB", (900, 3)).save(bad / "narrow.png")
    Image.new("1", (20_000, 10_000)).save(bad / "bomb.png")
    (bad / "text.jpg").write_text("no picture")
    (bad / "empty.gif").write_bytes(b"")
    (bad / "gone.png").symlink_to(bad / "nothing.png")
    (bad / "folder.png").mkdir()
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif"):
        noise.save(bad / f"whole.{suffix}")
        data = (bad / f"whole.{suffix}").read_bytes()
        (bad / f"whole.{suffix}").unlink()
        for part in (9, 40, len(data) // 2):
            (bad / f"cut{part}.{suffix}").write_bytes(data[:part])
    notes: list[str] = []
    result = sources.calibration_samples(str(folder), count=64, seed=0, note=notes.append, checks=CHECKS)
    usable = {sample.name for sample in result.samples}
    assert {name for name in usable if not name.startswith("bad/")} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("picture*.png")
    }
    assert "bad/narrow.png" in result.skipped and any("narrow.png is 900 x 3 pixels" in text for text in notes)
    assert {"bad/bomb.png", "bad/text.jpg", "bad/empty.gif", "bad/gone.png"} <= set(result.skipped)
    assert len(notes) == len(result.skipped)
    assert all(any(name in text for text in notes) for name in result.skipped), "each is named"


def test_prompts_that_the_model_cannot_take_name_their_line(folder: Path) -> None:
    lines = [{"image": "picture0.png", "prompt": "What?"}, {"image": "picture2.png", "prompt": "<image> What?"}]
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(InputError, match=r"pictures.jsonl line 2: the prompt holds <image>"):
        sources.calibration_samples(str(path), count=2, seed=0, checks=CHECKS)
    prompts = folder / "prompts.txt"
    prompts.write_text("What?\n\nWhat is <image>?\n")
    with pytest.raises(InputError, match=r"prompts.txt line 3: the prompt holds <image>"):
        sources.calibration_samples(str(folder), prompts=prompts, count=2, seed=0, checks=CHECKS)


def test_subfolders_behind_links_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "deep").mkdir()
    for place in (other / "far0.png", other / "deep" / "far1.png"):
        Image.new("RGB", (20, 20)).save(place)
    (folder / "linked").symlink_to(other)
    (folder / "again").symlink_to(folder / "more")  # there already, by itself
    (folder / "more" / "circle").symlink_to(folder)
    (other / "deep" / "back").symlink_to(other)
    names = [path.relative_to(folder).as_posix() for path in samples.picture_files(folder)]
    assert names == sorted(names)
    assert set(names) == {
        "linked/far0.png", "linked/deep/far1.png", "picture0.png", "picture2.png", "picture4.png",
        "more/picture1.png", "more/picture3.png", "more/picture5.png",
    }  # fmt: skip


def test_an_address_in_place_of_pictures_says_what_is_taken() -> None:
    with pytest.raises(InputError, match="is an address") as caught:
        sources.calibration_samples("https://example.com/pictures", count=4, seed=0)
    assert "download" in caught.value.do


def test_one_picture_goes_through_the_tower_once() -> None:
    import torch

    calls: list[int] = []

    class Tower(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixels))
            return pixels.flatten(2).transpose(1, 2)

    class Encoder:
        def encode(self, images: list[Image.Image], prompts: list[str], *, raw: bool = False) -> Any:
            pixels = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in images])
            return type("Encoded", (), {"input_ids": [np.arange(len(prompts[0]))], "pixel_values": pixels})

    picture = samples.scene_samples(1, seed=0, split="calibration").samples[0].image
    asked = [samples.Sample(picture, "a", "x"), samples.Sample(picture, "abc", "y")]
    prepared = samples.prepare(asked, Encoder(), Tower())
    assert calls == [1]
    assert [len(one.input.input_ids) for one in prepared] == [1, 3]
    assert prepared[0].pixel_values.shape == (3, 96, 96)
