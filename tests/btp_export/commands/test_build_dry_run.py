"""`btp-export build --dry-run`: a table or one JSON document for any target, nothing written, short errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from btp_export.cli import main
from engines.tensorrt.prepare import build_plan as outline_module
from engines.tensorrt.summaries import Finding


@pytest.mark.parametrize("target", ["jetson-orin-jp6", "h200", "rtx-blackwell"])
def test_json_says_everything_and_nothing_is_written(tiny_bundle: Any, target: str, capsys: Any) -> None:
    bundle = tiny_bundle()
    before = sorted(bundle.root.rglob("*"))
    assert main(["build", str(bundle.root), "--target", target, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"] and document["target"] == target and document["findings"] == []
    assert [graph["name"] for graph in document["graphs"]] == [graph.name for graph in bundle.graphs()]
    assert document["total"]["usable_bytes"] > document["total"]["run_bytes"] > 0
    assert sorted(bundle.root.rglob("*")) == before


def test_the_table_fits_the_console(tiny_bundle: Any, capsys: Any) -> None:
    bundle = tiny_bundle()
    assert main(["build", str(bundle.root), "--target", "jetson-thor", "--unpruned", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "prefill_0" in shown and "lint: the graphs suit this version" in shown and "TensorRT 10.13" in shown
    assert "opset 18 in place of 23" in shown
    assert re.search(r"the engines fit: to run [\d.]+ [KMG]iB of [\d.]+ GiB, to build", shown)


def test_findings_end_with_1(tiny_bundle: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(graph="head", node="the_node", got="a thing", wanted="another", do="change it")
    monkeypatch.setattr(outline_module, "lint", lambda *arguments, **options: [finding])
    assert main(["build", str(tiny_bundle().root), "--target", "l4", "--dry-run"]) == 1
    assert "finding: head: the_node: a thing; wanted: another" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "orin"], "unknown target 'orin'"),
        (["--target", "jetson-orin-jp6", "--tensorrt", "8.6"], "TensorRT 8.6 is not supported"),
        (["--target", "jetson-orin-jp6", "--tensorrt", "11.1"], "TensorRT 11.1 does not come with"),
        (["--target", "l4", "--memory", "0.5"], "--memory"),
        (["--target", "jetson-orin-jp6", "--memory", "6.1"], "the engines need"),
        (["--target", "l4", "--assemble", "pieces"], "pieces"),
        ([], "--target"),
    ],
)
def test_wrong_input_ends_with_2(tiny_bundle: Any, arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["build", str(tiny_bundle().root), "--dry-run", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == "" and 1 <= len(shown.err.splitlines()) <= 3


def test_no_bundle(tmp_path: Path, capsys: Any) -> None:
    assert main(["build", str(tmp_path / "nothing"), "--target", "l4", "--dry-run"]) == 2
    assert "no bundle at" in capsys.readouterr().err
