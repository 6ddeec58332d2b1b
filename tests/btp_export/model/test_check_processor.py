"""What the checkpoint's processor and chat template make is checked at export; templates of every published form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export import cli
from btp_export.exporting import Options, check_target
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter

Changer = Callable[[Path], None]
TEXT_ONLY = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PICTURE_LAST = (
    "{% for message in messages %}USER: {% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% for part in message['content'] if part['type'] == 'image' %} <image>"
    "{% endfor %}{% endfor %} ASSISTANT:"
)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def processor(change: Callable[[dict[str, Any]], object]) -> Changer:
    return lambda folder: edit(folder / "processor_config.json", change)


def template(text: str) -> Changer:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)  # type: ignore[return-value]


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the error that the export ends with."""
    out = folder.parent / "out"
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 3 and not out.exists()
    return lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (processor(lambda fields: fields.pop("num_additional_image_tokens")),
         ["35 image tokens", "36 tokens", "num_additional_image_tokens 0 in place of 1"]),
        (processor(lambda fields: fields.pop("vision_feature_select_strategy")),
         ["37 image tokens", "vision_feature_select_strategy None in place of default"]),
        (processor(lambda fields: fields.update(patch_size=8)), ["9 image tokens", "patch_size 8 in place of 4"]),
        (processor(lambda fields: fields["image_processor"].update(crop_size={"height": 48, "width": 48})),
         ["48 x 48 pixels", "36 tokens from 24 x 24 pixels", "crop_size"]),
        (template(PICTURE_LAST), ["chat template", "tokens before the image", "the picture before the question"]),
        (template("USER: {{ messages[0]['content'][1]['text'] }} <image>"), ["the picture before the question"]),
        (template("USER: <image>"), ["nothing after the image"]),
        (template("{{ bos_token }}{% for m in messages %}"), ["chat template", "cannot be used", "(line 1)"]),
        (template("{{ raise_exception('Only text is supported') }}"), ["Only text is supported"]),
        (template("{{ messages[0]['content'].nothing.at_all }}"), ["chat template", "cannot be used"]),
        (template("no picture"), ["writes no <image>"]),
    ],
)  # fmt: skip
def test_what_no_prompt_would_run_with_is_refused_at_export(
    change: Changer, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    text = "\n".join(refused(folder, capsys))
    assert all(word in text for word in words), text


def test_a_bucket_that_the_template_alone_fills(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--model", str(folder), "--plan", "none", "--out", str(folder / "out"), "--text-tokens", "1"]
    assert cli.main(command) == 2
    assert "--text-tokens" in capsys.readouterr().err.splitlines()[-1]


def only_in_the_tokenizer(folder: Path) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", lambda fields: fields.update(chat_template=text))


def among_several(folder: Path) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    edit(folder / "tokenizer_config.json", lambda fields: fields.update(chat_template=several))


@pytest.mark.parametrize("change", [only_in_the_tokenizer, among_several])
def test_a_template_in_the_tokenizer_configuration(
    change: Changer, folder: Path, tiny_checkpoint: Path, pictures: list[Image.Image]
) -> None:
    wanted = Prompter(tiny_checkpoint, open_model(str(tiny_checkpoint)).spec).encode(pictures[:1], ["what color?"])
    change(folder)
    model = open_model(str(folder))
    check_target(model, folder / "out", Options(text_tokens=16), force=False)
    got = Prompter(folder, model.spec).encode(pictures[:1], ["what color?"])
    np.testing.assert_array_equal(got.input_ids[0], wanted.input_ids[0])


def test_a_template_for_text_gets_the_placeholder_in_the_text(folder: Path, pictures: list[Image.Image]) -> None:
    template(TEXT_ONLY)(folder)
    model = open_model(str(folder))
    check_target(model, folder / "out", Options(text_tokens=16), force=False)
    prompter = Prompter(folder, model.spec)
    assert prompter.text("what color?") == "USER: <image>\nwhat color? ASSISTANT:"
    assert prompter.encode(pictures[:1], ["what color?"]).image_tokens == 36
