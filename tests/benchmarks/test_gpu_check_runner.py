"""The runner of the GPU check's steps: time limits, records, what is missing, steps beside others. No GPU is needed."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

from graphs.records.errors import InputError
from tests.engines.native import builds

pytest.importorskip("benchmarks.gpu_check")
from benchmarks.gpu_check import runner, steps


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"))


def run(out: Path, *made: steps.Step, seconds: int = 30) -> dict[str, dict[str, Any]]:
    """The records by step, as they lie in the file."""
    runner.run_call(steps.Call("T", seconds, made), out, out)
    lines = [json.loads(line) for line in (out / "T.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def test_a_step_that_hangs_costs_its_own_time_only(tmp_path: Path) -> None:
    """Its children go with it, what it has said is kept, and the next step runs.

    The step and its child hold one lock, which is free once neither of them lives.
    """
    lock = f"lock = open({str(tmp_path / 'lock')!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX)"
    start = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[lock.fileno()])"
    hang = f"import fcntl, subprocess, sys, time; {lock}; {start}; print('begun', flush=True); time.sleep(60)"
    found = run(
        tmp_path,
        steps.Step("hangs", 1, python(hang)),
        steps.Step("next", 9, python("print('noise'); print('{\"rows\": [1]}'); print('more noise')")),
    )
    assert (found["hangs"]["status"], found["hangs"]["tail"]) == ("timeout", "begun\n")
    assert 1 <= found["hangs"]["seconds"] < 3
    assert (found["next"]["status"], found["next"]["result"]) == ("done", {"rows": [1]})
    end = time.monotonic() + 10
    with (tmp_path / "lock").open("r+") as lock_file:
        while not free(lock_file):
            assert time.monotonic() < end, "the grandchild outlived its step"
            time.sleep(0.01)


def free(lock_file: TextIO) -> bool:
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_each_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    lines = f"pathlib.Path({str(tmp_path / 'T.jsonl')!r}).read_text().count(chr(10))"
    look = f"import pathlib, json; print(json.dumps({{'lines': {lines}}}))"
    found = run(tmp_path, steps.Step("first", 9, python("pass")), steps.Step("second", 9, python(look)))
    assert found["second"]["result"] == {"lines": 2}  # what was prepared, and the first step


def test_failures_say_why_and_stop_nothing(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        steps.Step("fails", 9, python("raise SystemExit('it broke')")),
        steps.Step("killed", 9, python("import os; os.kill(os.getpid(), 9)")),
        steps.Step("lacks", 9, python('print(\'{"missing": "a thing"}\'); raise SystemExit(3)')),
        steps.Step("no-program", 9, ("{native}/no-such-file",)),
        steps.Step("no-tool", 9, python("pass"), needs=("no-such-tool",)),
        steps.Step("no-module", 9, python("pass"), modules=("json", "no_such_module")),
        steps.Step("pointless", 9, python("pass"), after="fails"),
        steps.Step("fine", 9, python("pass")),
    )
    states = {name: one["status"] for name, one in found.items()}
    assert states == {
        "prepared": "done", "fails": "failed", "killed": "failed", "lacks": "missing", "no-program": "missing",
        "no-tool": "missing", "no-module": "missing", "pointless": "failed", "fine": "done",
    }  # fmt: skip
    assert runner.what_is_missing(found["fails"]) == "it broke"
    assert runner.what_is_missing(found["killed"]) == "it ended with -9 and said nothing"
    assert runner.what_is_missing(found["lacks"]) == "a thing"
    assert "no-such-file: No such file" in found["no-program"]["result"]["missing"]
    assert found["no-tool"]["result"]["missing"].startswith("no-such-tool (of the CUDA toolkit)")
    assert found["no-module"]["result"]["missing"].startswith("no_such_module (for Python)")
    assert found["pointless"]["result"]["missing"] == "fails: it broke"


def test_a_step_beside_runs_while_others_do_and_is_waited_for(tmp_path: Path) -> None:
    """It ends once the other's record is there."""
    recorded = f"'quick' in pathlib.Path({str(tmp_path / 'T.jsonl')!r}).read_text()"
    wait = f"import pathlib, time\nwhile not {recorded}: time.sleep(0.01)\nprint('{{\"made\": 1}}')"
    found = run(
        tmp_path,
        steps.Step("beside", 9, python(wait), beside=True),
        steps.Step("quick", 9, python("pass")),
        steps.Step("needs-it", 9, python("pass"), after="beside"),
        seconds=30,
    )
    assert list(found) == ["prepared", "quick", "beside", "needs-it"]
    assert found["beside"]["result"] == {"made": 1} and found["needs-it"]["status"] == "done"


def test_a_step_beside_has_its_seconds_from_the_start_of_the_call(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        steps.Step("beside", 2, python("import time; time.sleep(60)"), beside=True),
        steps.Step("other", 9, python("import time; time.sleep(1)")),
        steps.Step("needs-it", 9, python("pass"), after="beside"),
    )
    assert (found["beside"]["status"], found["needs-it"]["status"]) == ("timeout", "timeout")
    assert 2 <= found["beside"]["seconds"] < 3 and found["beside"]["limit"] == pytest.approx(2, abs=0.2)


def test_what_a_step_leaves_is_for_those_behind_it_and_nobody_takes_what_they_are_due(tmp_path: Path) -> None:
    sleep = "import time; time.sleep({})"
    found = run(
        tmp_path,
        steps.Step("hangs", 1, python(sleep.format(60))),
        steps.Step("quick", 4, python("pass")),
        steps.Step("longer", 1, python(sleep.format(1.5))),
        steps.Step("last", 2, python("pass")),
        seconds=60,
    )
    assert found["hangs"]["status"] == "timeout" and found["hangs"]["limit"] < 2
    assert found["longer"]["status"] == "done" and 3 < found["longer"]["limit"] < 6
    assert found["last"]["status"] == "done"


def test_a_step_that_all_others_need_may_take_the_time_of_the_last(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        steps.Step("vital", 1, python("import time; time.sleep(1.5)"), at_most=9),
        steps.Step("next", 1, python("pass")),
        steps.Step("last", 1, python("pass")),
        seconds=3,
    )
    assert (found["vital"]["status"], found["next"]["status"]) == ("done", "done")


def test_a_folder_that_takes_no_results_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/results takes no results: Not a directory"):
        runner.run_call(steps.Call("T", 9, ()), tmp_path, tmp_path / "file" / "results")


def test_without_room_in_memory_the_scratch_folder_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often have 64 MB there."""
    monkeypatch.setattr(runner, "SCRATCH_BYTES", 1 << 60)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runner.scratch_folder("T") as scratch:
        assert scratch.parent == tmp_path and scratch.is_dir()
    assert not scratch.exists()


DRIVER = """
#define GIVES extern "C" int
GIVES cuInit(unsigned) { return 0; }
GIVES cuDeviceGetCount(int* count) { *count = 1; return 0; }
GIVES cuDeviceGet(int* device, int number) { *device = 7 + number; return 0; }
GIVES cuDeviceGetAttribute(int* value, int attribute, int device)
{
    *value = attribute == 75 ? 12 : 1;
    return device == 7 && (attribute == 75 || attribute == 76) ? 0 : 1;
}
"""


def test_the_driver_says_which_gpu_is_there(tmp_path: Path) -> None:
    """A driver's place is taken by four functions: neither nvidia-smi nor a CUDA runtime is asked."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    builds.run([builds.compiler(), *builds.STRICT, "-shared", tmp_path / "driver.cpp", "-o", tmp_path / "libcuda.so.1"])
    script = "from benchmarks.gpu_check import runner; print(runner.gpu_problems(), runner.gpu_architecture())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=builds.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[] 121\n", done.stderr


def test_when_the_time_is_over_the_rest_is_skipped(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        steps.Step("long", 9, python("import time; time.sleep(60)")),
        steps.Step("late", 9, python("pass")),
        seconds=2,
    )
    assert found["long"]["status"] == "timeout" and found["long"]["seconds"] < 4
    assert found["late"]["status"] == "skipped"
