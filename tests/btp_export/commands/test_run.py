"""`btp-export run`: what comes out where, and every refusal's exit code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import btp_export
from btp_export import cli, console
from tests.plans import PLAN

PROMPT = "is there a red circle?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    pictures[0].save(path)
    return path


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Path:
    root: Path = tiny_bundle(PLAN).root
    return root


def test_text_streams_to_standard_output(
    run: Run, bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    original = console.stream
    monkeypatch.setattr("btp_export.commands.run.stream", lambda text: (pieces.append(text), original(text)))
    code, out, err = run("run", bundle, "--image", picture, "--prompt", PROMPT)
    text = btp_export.load(bundle).generate(picture, PROMPT)[0].text
    assert (code, out) == (0, text + "\n")
    assert len(pieces) > 2 and "".join(pieces) == out
    assert "prefill" in err and "image tokens kept: 18, 7, 0" in err


def test_json_is_one_document(run: Run, bundle: Path, picture: Path) -> None:
    code, out, _ = run("run", bundle, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", 5, "--json")
    document = json.loads(out)
    answer = btp_export.load(bundle).generate(picture, PROMPT, max_new_tokens=5)[0]
    assert code == 0
    assert document["text"] == answer.text
    assert document["tokens_kept"] == [18, 7, 0]
    assert document["token_ids"] == list(answer.token_ids)
    assert document["kept"] == [*(indices.tolist() for indices in answer.kept[:2]), []]
    assert document["prefill_ms"] > 0 and document["decode_ms_per_token"] > 0
    assert len(document["select_ms"]) == 3


def test_several_prompts(run: Run, bundle: Path, picture: Path) -> None:
    prompts = ["--prompt", PROMPT, "--prompt", "where is the star?"]
    code, out, _ = run("run", bundle, "--image", picture, *prompts, "--json")
    texts = [answer["text"] for answer in json.loads(out)["answers"]]
    assert (code, len(texts)) == (0, 2)
    assert run("run", bundle, "--image", picture, *prompts)[1] == "\n".join(texts) + "\n"
    shared = run("run", bundle, "--image", picture, "--image", picture, "--prompt", PROMPT)[1]
    assert shared == f"{texts[0]}\n{texts[0]}\n"
    code, out, err = run("run", bundle, "--image", picture, "--show", "kept.png", *prompts)
    assert (code, out) == (2, "") and "2 samples" in err


def test_seed_decides_sampling(run: Run, bundle: Path, picture: Path) -> None:
    def sample(seed: int) -> str:
        settings = ("--temperature", 1.5, "--top-p", 0.95, "--seed", seed)
        return run("run", bundle, "--image", picture, "--prompt", PROMPT, *settings)[1]

    assert sample(1) == sample(1) != sample(2)


def test_kept_tokens_are_drawn(run: Run, bundle: Path, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("btp_export.drawing.kept_tokens")
    target = tmp_path / "kept.png"
    code, _, err = run("run", bundle, "--image", picture, "--prompt", PROMPT, "--show", target)
    assert code == 0 and str(target) in err
    assert Image.open(target).width > 300
    drawn = target.read_bytes()
    target.write_text("mine")
    code, _, err = run("run", bundle, "--image", picture, "--prompt", PROMPT, "--show", target)
    assert code == 2 and "already exists" in err and target.read_text() == "mine"
    (tmp_path / "victim").write_text("theirs")
    target.unlink()
    target.symlink_to(tmp_path / "victim")
    assert run("run", bundle, "--image", picture, "--prompt", PROMPT, "--show", target)[0] == 2
    assert run("run", bundle, "--image", picture, "--prompt", PROMPT, "--show", target, "--force")[0] == 0
    assert target.read_bytes() == drawn and (tmp_path / "victim").read_text() == "theirs"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"bundle": "absent"}, 2, "no bundle at absent"),
        ({"--image": "absent.png"}, 2, "cannot read the picture absent.png"),
        ({"--prompt": ""}, 2, "the prompt is empty"),
        ({"--prompt": "red " * 40}, 2, "--text-tokens 48"),
        ({"--max-new-tokens": 99}, 2, "99 new tokens"),
        ({"--temperature": -1}, 2, "temperature -1"),
        ({"--top-p": 0}, 2, "top-p 0"),
        ({"--seed": -3}, 2, "seed -3"),
        ({"--profile": "big"}, 2, "no profile big"),
        ({"--threads": 0}, 2, "--threads 0"),
        ({"--device": "tpu"}, 2, "unknown device 'tpu'"),
        ({"--show": "kept.xyz"}, 2, "kept.xyz"),
        ({"--show": "kept.psd"}, 2, "ends in .png"),  # Pillow reads it and cannot write it
        ({"--show": "absent/kept.png"}, 2, "no folder absent"),
        ({"--show": "/proc/kept.png"}, 2, "cannot write in /proc"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(
    changes: dict[str, Any], code: int, words: str, run: Run, bundle: Path, picture: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = {"bundle": bundle, "--image": picture, "--prompt": PROMPT} | changes
    flags = [part for name, value in options.items() if name != "bundle" for part in (name, value)]
    got, out, err = run("run", options["bundle"], *flags)
    assert (got, out) == (code, "")
    assert words in err and "Traceback" not in err
    assert 1 <= len(err.strip().splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", "13"], "13 new tokens"),
        (["--temperature", "1", "--top-p", "0"], "top-p 0.0"),
        (["--prompt", " "], "1 pictures and 2 prompts|the prompt is empty"),
        (["--prompt", "red " * 40], "tokens after the image"),
        (["--raw-prompt"], "the raw prompt holds the image placeholder <image> 0 times"),
        (["--system", "be brief"], "tokens before the image with this system message"),
    ],
)
def test_what_no_graph_answers_is_refused_before_they_are_opened(
    options: list[str], words: str, run: Run, bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large model take a minute."""
    monkeypatch.setattr("btp_export.running.runtime.load", lambda *_, **__: pytest.fail("the graphs were opened"))
    code, out, err = run("run", bundle, "--image", picture, "--prompt", PROMPT, *options)
    assert (code, out) == (2, "") and re.search(words, err)


def test_raw_prompt_needs_the_placeholder(run: Run, bundle: Path, picture: Path) -> None:
    code, out, err = run("run", bundle, "--image", picture, "--prompt", PROMPT, "--raw-prompt")
    assert (code, out) == (2, "")
    assert "<image> 0 times" in err


def test_cuda_is_not_available_here(run: Run, bundle: Path, picture: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert run("run", bundle, "--image", picture, "--prompt", PROMPT, "--device", "cuda")[0] == 3
