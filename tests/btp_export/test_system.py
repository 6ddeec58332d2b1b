"""A bundle for a system message: its tokens are part of the prefix, and every question begins with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import btp_export
from btp_export import cli
from btp_export.model.open_model import open_model
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SYSTEM = "look at the red circle ."
OTHER = "look at the blue square ."  # as many tokens
LONGER = "look at the red circle and the blue square ."
PROMPT = "what color is the star ?"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that writes system messages."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("system") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    command = ["export", "--model", str(checkpoint), "--plan", "none", "--system", SYSTEM, "--out", str(out)]
    assert cli.main([*command, "--text-tokens", "32", "--max-new-tokens", "8"]) == 0
    return out


def expected(checkpoint: Path, picture: Image.Image, system: str) -> list[int]:
    """What transformers generates for a conversation that begins with the system message."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[picture.convert("RGB")], text=[text], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def test_answers_are_those_of_transformers(bundle: Path, checkpoint: Path, pictures: list[Image.Image]) -> None:
    model = btp_export.load(bundle, threads=1)
    plain = open_model(str(checkpoint)).spec
    assert model.spec.system == SYSTEM and model.spec.prefix_tokens > plain.prefix_tokens
    answer = model.generate(pictures[:1], PROMPT)[0]
    assert list(answer.token_ids) == expected(checkpoint, pictures[0], SYSTEM)
    other = model.generate(pictures[:1], PROMPT, system=OTHER)[0]
    assert list(other.token_ids) == expected(checkpoint, pictures[0], OTHER)
    assert list(answer.token_ids) != list(other.token_ids), "the message matters"


def test_another_length_says_what_to_export(
    bundle: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures[0].save(tmp_path / "picture.png")
    asked = ["run", str(bundle), "--image", str(tmp_path / "picture.png"), "--prompt", PROMPT]
    assert cli.main([*asked, "--system", LONGER]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "tokens before the image with this system message" in lines[0]
    assert f"--system '{LONGER}'" in lines[2] and len(lines) == 3
    assert cli.main([*asked, "--system", OTHER, "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    answer = btp_export.load(bundle, threads=1).generate(pictures[:1], PROMPT, system=OTHER)[0]
    assert given["token_ids"] == list(answer.token_ids)
    assert cli.main([*asked, "--system", OTHER, "--raw-prompt"]) == 2
    assert "--system with --raw-prompt" in capsys.readouterr().err


def test_verification_and_evaluation_begin_with_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle), "--samples", "2", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert cli.main(["eval", str(bundle), "--samples", "2", "--plans", "none", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    encoded = btp_export.load(bundle, threads=1).encode([Image.new("RGB", (24, 24))], [PROMPT])
    assert encoded.prefix_tokens == Bundle.open(bundle).spec.prefix_tokens


def test_calibration_counts_it(checkpoint: Path, tmp_path: Path) -> None:
    """The statistics of another system message are not reused, also of one that is as long."""
    from btp_export.planning.calibration_settings import CalibrationSettings
    from btp_export.planning.study import calibrate_model

    settings = CalibrationSettings(samples=4)
    notes: list[str] = []
    for system in (SYSTEM, OTHER, SYSTEM):
        calibrate_model(open_model(str(checkpoint), system=system), settings, note=notes.append)
    assert len([text for text in notes if "cache" in text or "reuse" in text]) == 1


@pytest.mark.parametrize(
    ("system", "words"), [(" ", "system message is empty"), ("see <image>", "system message holds <image>")]
)
def test_messages_that_cannot_be_used(system: str, words: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=words):
        open_model(str(checkpoint), system=system)


def test_a_template_that_leaves_it_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    only_user = TEMPLATE.replace("in messages %}", "in messages if message['role'] == 'user' %}")
    (folder / "chat_template.jinja").write_text(only_user)
    with pytest.raises(InputError, match="leaves the system message out"):
        open_model(str(folder), system=SYSTEM)
