"""A bundle's own preprocessing is compared with transformers' at export, and used alone afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export import cli
from btp_export.families import family_of
from btp_export.families._describe import OWN_TOKENIZER
from btp_export.families._processor import load_processor
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from btp_export.model.prove_processor import preprocess_files, prove_processor
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.preprocess import PREPROCESS

BundleMaker = Callable[..., Bundle]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: setattr(one.tokenizer, "_decode", lambda token_ids, **options: "x"), "of the tokens"),
        (lambda one: setattr(one, "num_additional_image_tokens", 5), "576 image tokens"),
        (lambda one: setattr(one.image_processor, "rescale_factor", 1 / 254), "pixels that are off by up to"),
    ],
)
def test_another_result_is_refused(
    change: Callable[[Any], object], words: str, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, model = load_processor(demo_checkpoint), open_model("demo")
    files = preprocess_files(load_processor(demo_checkpoint), demo_checkpoint)
    monkeypatch.setattr("btp_export.model.prove_processor.preprocess_files", lambda theirs, folder: files)
    prove_processor(theirs, demo_checkpoint, model.family, model.spec, [(96, 96)])
    change(theirs)
    with pytest.raises(InputError, match=words):
        prove_processor(theirs, demo_checkpoint, model.family, model.spec, [(96, 96)])


def test_a_processor_that_cannot_be_expressed_ends_the_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    document = json.loads((folder / "processor_config.json").read_text())
    document["image_processor"] |= {"size": {"max_height": 24, "max_width": 24}}
    (folder / "processor_config.json").write_text(json.dumps(document))
    out = tmp_path / "out"
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "max_height" in lines[0] and "cannot express" in lines[0] and not out.exists()


def test_a_bundle_lists_and_uses_the_file(tiny_bundle: BundleMaker, pictures: list[Image.Image]) -> None:
    bundle = tiny_bundle()
    assert f"processor/{PREPROCESS}" in {entry.file for entry in bundle.manifest.processor}
    prompter = Prompter(bundle.processor, bundle.spec)
    encoded = prompter.encode(pictures, ["what color is the circle ?"] * len(pictures))
    processor = load_processor(bundle.processor)
    for place, picture in enumerate(pictures):
        text = prompter.text("what color is the circle ?")
        wanted = processor(images=[picture], text=[text], return_tensors="np")
        np.testing.assert_array_equal(encoded.input_ids[place], wanted["input_ids"][0])
        np.testing.assert_array_equal(encoded.pixels([place]), wanted["pixel_values"])


def test_a_bundle_without_the_file_is_read_by_transformers(
    tiny_bundle: BundleMaker, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle()
    folder = Path(shutil.copytree(bundle.processor, tmp_path / "processor"))
    (folder / PREPROCESS).unlink()
    old = Prompter(folder, bundle.spec).encode(pictures, ["what?"] * 4)
    new = Prompter(bundle.processor, bundle.spec).encode(pictures, ["what?"] * 4)
    np.testing.assert_array_equal(old.pixel_values, new.pixel_values)
    assert [row.tolist() for row in old.input_ids] == [row.tolist() for row in new.input_ids]


def test_a_tokenizer_that_transformers_makes_otherwise_gets_a_file(demo_checkpoint: Path, tmp_path: Path) -> None:
    """tokenizer_config.json may add tokens that tokenizer.json does not have."""
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"500": {"content": "<tool>", "special": True}}
    settings["extra_special_tokens"] = ["<tool>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, model = load_processor(folder), open_model("demo")
    files = preprocess_files(theirs, folder)
    assert set(files) == {PREPROCESS, OWN_TOKENIZER} and "<tool>" in files[OWN_TOKENIZER]
    prove_processor(theirs, folder, family_of(model.spec), model.spec, [])
    assert files == preprocess_files(load_processor(folder), folder), "the same inputs give the same bytes"
