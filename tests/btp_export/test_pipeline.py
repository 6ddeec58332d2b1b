"""The whole road on the tiny model: the contract's document, a complete bundle, and nothing when a check fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from btp_export.cli import main
from btp_export.measuring import verify
from btp_export.results.job import JobResult
from btp_export.results.verification import Verification
from graphs.files.bundle import Bundle

SHAPES = ["--text-tokens", "16", "--max-new-tokens", "4", "--samples", "4"]


def test_the_whole_road(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    assert main(["--model", str(tiny_checkpoint), "--out", str(out), "--compression", "0.5", *SHAPES, "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert JobResult.model_validate_json(printed).to_json() == printed and result["format"] == "btp-job/1"
    assert result["bundle"] == str(out)
    assert result["plan"] == json.loads((out / "plan.json").read_text())
    assert result["compression"] >= 0.5
    assert result["verify"]["passed"] and result["verify"]["tokens_equal"]
    assert {"name", "cosine", "norm_ratio", "max_abs"} <= set(result["verify"]["graphs"][0])
    assert {"calibrate", "export", "verify", "bench", "report", "total"} <= set(result["seconds"])
    assert result["seconds"]["total"] >= sum(v for k, v in result["seconds"].items() if k != "total") - 0.01
    assert result["eval"] is None  # generated scenes say nothing about a model that was not trained on them
    assert Bundle.open(out, check="full").plan.compression == result["compression"]
    assert {path.name for path in (out / "report").iterdir()} == {"index.html", "report.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_whole_road_in_four_bits(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    arguments = ["--model", str(tiny_checkpoint), "--out", str(out), "--plan", "fastv", "--compression", "0.5", *SHAPES]
    assert main([*arguments, "--weights", "int4"]) == 2
    assert "error: --weights int4: group is 128 and K is 64" in capsys.readouterr().err
    assert main([*arguments, "--weights", "int4-g32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verify"]["passed"] and result["verify"]["tokens_equal"]
    assert "quantise" in result["seconds"]
    bundle = Bundle.open(out, check="full")
    built = bundle.manifest.quantization
    assert built is not None
    assert (built.method, built.groups) == ("awq", {32: 42})
    assert bundle.manifest.model.source == tiny_checkpoint.name
    full = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in bundle.weights.glob("[lr]*.safetensors")) < 0.6 * full
    packed = str(bundle.checkpoint().folder)
    assert main(["export", "--model", packed, "--out", str(tmp_path / "c"), "--plan", "vtw", "--weights", "int4"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_does_not_verify_is_not_put_in_place(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the verdict is made up; everything before it is real, and nothing is measured after it."""
    real = verify.verify_bundle

    def failing(*arguments: Any, **settings: Any) -> Verification:
        failures = ("prefill_1: cosine 0.7", "select_0", "head")
        return real(*arguments, **settings).model_copy(update={"passed": False, "failures": failures})

    monkeypatch.setattr(verify, "verify_bundle", failing)
    monkeypatch.setattr(
        "btp_export.measuring.bench.measure", lambda *_, **__: pytest.fail("measured before it was verified")
    )
    arguments = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--plan", "vtw", *SHAPES]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: the exported graphs do not verify: prefill_1: cosine 0.7; select_0" in captured.err
    assert list(tmp_path.iterdir()) == []
