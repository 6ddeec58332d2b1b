"""`python -m benchmarks`: finds its benchmarks, runs them, and says where, with what and how busy the machine was."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks.findings import NotHere, Row, Wishes, markdown, ratio
from benchmarks.gguf_file import blocks
from benchmarks.machine import this_machine
from benchmarks.models import plan
from btp_export.model.open_model import open_model
from graphs.packing import dequantise, pack


def test_a_benchmark_runs_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    program.main(["--only", "graph_building", "--quick", "--threads", "1", "--out", str(out)])
    page, found = capsys.readouterr().out, json.loads(out.read_text())
    rows = [row for row in found["rows"] if row["benchmark"] == "graph_building"]
    assert len(rows) == 2 and all(0 < row["value"] < 60 and row["missing"] == "" for row in rows)
    machine = this_machine()
    assert {key: found["machine"][key] for key in ("processor", "cores", "versions")} == {
        "processor": machine.processor, "cores": machine.cores, "versions": machine.versions,
    }  # fmt: skip
    assert machine.versions["onnxruntime"] in page and machine.processor in page and "load" in page
    assert found["machine"]["load"] >= 0 and found["settings"]["threads"] == 1
    assert all(row["what"] in page for row in rows)


def test_benchmarks_are_found_in_their_modules() -> None:
    """No list names them: those with the function are run, the other programs are named."""
    found = program.programs()
    assert found["side_by_side"] and found["full_size"] and found["batches"]
    assert not found["serve_load"] and not found["gpu_check"]
    assert "findings" not in found and "peers" not in found and "__main__" not in found


def test_what_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import batches, graph_building

    def lacks(wishes: Wishes) -> None:
        raise NotHere("no such package")

    def breaks(wishes: Wishes) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(batches, "benchmark", lacks)
    monkeypatch.setattr(graph_building, "benchmark", breaks)
    wishes = Wishes(tmp_path, threads=1, note=lambda text: None)
    found = list(program.measure(["batches", "graph_building"], wishes))
    table = markdown(found)
    assert "skipped: no such package" in table and "skipped: ZeroDivisionError: division by zero" in table


def test_a_limit_that_is_missed_is_marked() -> None:
    slower = ratio("a", [3.0] * 6, [2.0] * 6, unit="ms", limit=1.0, why="b")
    assert slower.value == 1.5 and slower.holds is False and "3 ms against 2 ms, 1.50 to 1.50" in slower.detail
    assert "**missed**" in markdown([("x", slower)])
    assert Row("a", 2.0, "x", 1.9, more_is_better=True).holds and Row("a", 2.0, "x").holds is None


def test_q4_0_blocks_are_the_same_weights() -> None:
    """By the format's definition: a scale, then byte j with elements j and j + 16; w = (q - 8) s."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (3, 64)), rng.random((3, 2)).astype(np.float16)
    packed = pack(codes, 32)
    found = np.zeros((3, 64), np.float32)
    for row, data in enumerate(blocks(packed, scales)):
        for group in range(2):
            block = data[18 * group : 18 * (group + 1)]
            scale = float(block[:2].view("<f2")[0])
            for j in range(16):
                found[row, 32 * group + j] = (int(block[2 + j] & 15) - 8) * scale
                found[row, 32 * group + 16 + j] = (int(block[2 + j] >> 4) - 8) * scale
    np.testing.assert_array_equal(found, dequantise(packed, scales, dtype=np.dtype(np.float32)))


def test_plans_leave_the_share_they_are_asked_for(tiny_checkpoint: Path) -> None:
    spec = open_model(str(tiny_checkpoint)).spec
    assert plan(spec, 1.0).stages == ()
    for share in (0.5, 0.25):
        made = plan(spec, share)
        assert len(made.stages) == 2 and made.average_tokens == pytest.approx(share * made.image_tokens, abs=1)


def test_the_page_shows_what_was_recorded() -> None:
    """`python -m benchmarks --write` writes both."""
    recorded = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert program.render(recorded) in program.PAGE.read_text(encoding="utf-8")
    assert recorded["format"] == program.FORMAT and not recorded["settings"]["quick"]


def test_one_benchmark_is_recorded_beside_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its rows take the places of those of the same name; new ones follow the last of its own."""
    from benchmarks import batches

    results, page = tmp_path / "benchmarks.json", tmp_path / "performance.md"
    before = [("batches", Row("a", 1.0, "x")), ("batches", Row("b", 2.0, "x")), ("export_cost", Row("c", 3.0, "s"))]
    wishes = Wishes(tmp_path, threads=1, note=lambda text: None)
    recorded = program.recorded(this_machine(), before, wishes)
    recorded["machine"]["versions"]["a peer"] = "1.0"  # that is not installed now
    results.write_text(json.dumps(recorded))
    page.write_text("<!-- table: begin -->\n<!-- table: end -->\n")
    monkeypatch.setattr(program, "RESULTS", results)
    monkeypatch.setattr(program, "PAGE", page)
    monkeypatch.setattr(batches, "benchmark", lambda _: iter([Row("b", 5.0, "x"), Row("d", 6.0, "x")]))
    program.main(["--only", "batches", "--threads", "1", "--write"])
    document = json.loads(results.read_text())
    assert document["machine"] == recorded["machine"] and "a peer 1.0" in page.read_text()
    rows = document["rows"]
    expected = [("batches", "a", 1.0), ("batches", "b", 5.0), ("batches", "d", 6.0), ("export_cost", "c", 3.0)]
    assert [(row["benchmark"], row["what"], row["value"]) for row in rows] == expected
    assert all(f"| {row['what']} |" in page.read_text() for row in rows)
    with pytest.raises(SystemExit):  # tiny models are no result
        program.main(["--only", "batches", "--quick", "--write"])


@pytest.mark.parametrize("other", ["processor", "numpy", "threads"])
def test_rows_measured_otherwise_are_no_one_table(
    other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "benchmarks.json"
    recorded = program.recorded(this_machine(), [], Wishes(tmp_path, threads=1, note=lambda text: None))
    place = {"processor": recorded["machine"], "numpy": recorded["machine"]["versions"]}.get(
        other, recorded["settings"]
    )
    place[other] = "another"
    results.write_text(json.dumps(recorded))
    monkeypatch.setattr(program, "RESULTS", results)
    with pytest.raises(SystemExit):
        program.main(["--only", "batches", "--threads", "1", "--write"])
    assert f"what is recorded has another {other}" in capsys.readouterr().err
    assert json.loads(results.read_text()) == recorded
