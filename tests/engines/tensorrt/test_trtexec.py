"""What trtexec exports, as sampleReporting.cpp prints it, whole and damaged; and running it, with stand-ins for it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.tensorrt import trtexec
from graphs.records.errors import InputError, UnavailableError
from tests.engines.tensorrt import trtexec_files as files


def test_times(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = [rng.uniform(3, 4) for _ in range(250)]
    path = tmp_path / "a.times.json"
    path.write_text(files.times(values))
    result = trtexec.read_times(path)
    printed = [float(f"{value:g}") for value in values]  # a stream prints six significant digits
    assert result.runs == 250
    assert result.median_ms == pytest.approx(np.median(printed))
    assert result.mean_ms == pytest.approx(np.mean(printed))
    assert (result.min_ms, result.p99_ms) == (min(printed), pytest.approx(np.percentile(printed, 99)))
    assert 0 < result.variation < 0.3


def test_layers_with_names_that_break_json(tmp_path: Path) -> None:
    """C++ does not escape names, and a profile of nothing divides by zero."""
    path = tmp_path / "a.layers.json"
    layers = [('a "b" {c}', [1.0, 2.0]), ("back\\slash", [0.5, 0.5]), ('x", "timeMs" : 9', [2.0, 4.0])]
    path.write_text(files.layers(layers))
    with pytest.raises(ValueError):
        json.loads(path.read_text())
    result = trtexec.read_layers(path)
    assert [(layer.name, layer.mean_ms, layer.median_ms) for layer in result] == [
        (name, sum(times) / 2, sum(times) / 2) for name, times in layers
    ]
    path.write_text(files.layers([("idle", [0.0, 0.0])]))  # its share of the time is printed as -nan
    assert "nan" in path.read_text()
    assert trtexec.read_layers(path) == (trtexec.LayerTime("idle", 0.0, 0.0),)


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=20),
                          st.lists(st.floats(0, 1e4), min_size=1, max_size=5)), max_size=6))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_layers_of_any_name(tmp_path_factory: pytest.TempPathFactory, layers: list[tuple[str, list[float]]]) -> None:
    path = tmp_path_factory.mktemp("layers") / "a.json"
    path.write_text(files.layers(layers), encoding="utf-8")
    result = trtexec.read_layers(path)
    assert [layer.name for layer in result] == [name for name, _ in layers]
    for layer, (_, times) in zip(result, layers, strict=True):
        assert layer.mean_ms == pytest.approx(np.mean(times), rel=1e-5)


def test_layers_written_anew_by_another_program(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(files.layers([("one", [1.0]), ("two", [2.0])]))
    before = trtexec.read_layers(path)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert trtexec.read_layers(path) == before


@pytest.mark.parametrize("number", ["1.5.2", "1..2", "1e", "--1", "1-1", "inf", "nan", "1e999", "-1", "9" * 400])
def test_a_time_that_is_no_number_is_named(number: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(files.layers([("a", [7.25])]).replace('"medianMs" : 7.25', f'"medianMs" : {number}'))
    with pytest.raises(InputError, match=r"a\.json"):
        trtexec.read_layers(path)
    path.write_text(f'[{{"computeMs" : {number}}}]')
    with pytest.raises(InputError, match=r"a\.json"):
        trtexec.read_times(path)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_damaged_files_are_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut off, or with bytes changed: read as something whole, or an InputError with the file's name; never a crash."""
    kind = data.draw(st.sampled_from([trtexec.read_times, trtexec.read_layers]))
    whole = {
        trtexec.read_times: files.times([1.5, 2.5, 3.5]),
        trtexec.read_layers: files.layers([("a", [1.0, 2.0]), ("b", [0.5, 0.5])]),
    }[kind].encode()
    cut = data.draw(st.integers(0, len(whole) - 3))
    changed = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    path.write_bytes(bytes(changed))
    try:
        kind(path)
    except InputError as error:
        assert str(path) in error.got and error.do
        assert len(error.lines()) == 3


@pytest.mark.parametrize("length", [0, 1, 30, 200])
def test_cut_off(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.json"
    for read, whole in (
        (trtexec.read_times, files.times([1.0] * 9)),
        (trtexec.read_layers, files.layers([("a" * 30, [1.0])] * 9)),
    ):
        path.write_text(whole[:length])
        with pytest.raises(InputError, match="cut off or damaged"):
            read(path)
    with pytest.raises(InputError, match="No such file"):
        trtexec.read_times(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "[1]", '[{"computeMs": "fast"}]', '[{"computeMs": -1}]', '[{"computeMs": NaN}]']
)
def test_no_times(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match="computeMs"):
        trtexec.read_times(path)


# -- the program -----------------------------------------------------------------------------------------------------


def program(tmp_path: Path, text: str) -> list[str | Path]:
    path = tmp_path / "trtexec.py"
    path.write_text(text)
    return [sys.executable, path]


def test_a_failed_run_shows_its_last_lines(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "import sys",
            "for i in range(50): print(f'[I] line {i}')",
            "print('[E] Engine deserialization failed', file=sys.stderr)",
            "print('&&&& FAILED TensorRT.trtexec')",
            "sys.exit(1)",
        ]
    )
    log = tmp_path / "logs" / "a.log"
    with pytest.raises(trtexec.TrtexecError, match=r"code 1: .*deserialization failed") as caught:
        trtexec.run(program(tmp_path, text), folder=tmp_path, log=log)
    assert len(caught.value.tail) == trtexec.TAIL and str(log) in caught.value.do
    assert "[I] line 0" in log.read_text()


def test_a_run_that_ends_without_its_results(tmp_path: Path) -> None:
    wanted = tmp_path / "a.times.json"
    with pytest.raises(trtexec.TrtexecError, match=r"ended well but wrote no a\.times\.json"):
        trtexec.run(program(tmp_path, "print('done')"), folder=tmp_path, log=tmp_path / "a.log", wanted=[wanted])
    wanted.write_text("[]")
    trtexec.run(program(tmp_path, "print('done')"), folder=tmp_path, log=tmp_path / "a.log", wanted=[wanted])


def test_finding_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    places = [tmp_path / "bin"]
    with pytest.raises(UnavailableError, match="trtexec was found neither") as caught:
        trtexec.find(places=places)
    assert "--from" in caught.value.do and caught.value.exit_code == 3
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trtexec").write_text("")
    assert trtexec.find(places=places) == tmp_path / "bin" / "trtexec"
    (tmp_path / "trtexec").write_text("#!/bin/sh\n")
    (tmp_path / "trtexec").chmod(0o755)
    assert trtexec.find(places=places) == tmp_path / "trtexec"
    with pytest.raises(UnavailableError, match="cannot be started"):
        trtexec.run([tmp_path / "gone"], folder=tmp_path, log=tmp_path / "a.log")
