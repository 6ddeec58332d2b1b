"""What comes back from a GPU as a result file and a table. The sample's numbers are made up; its form is the steps'."""

import json
import shutil
from pathlib import Path

import pytest

from graphs.records.errors import CheckError, InputError

results = pytest.importorskip("benchmarks.gpu_check.results")

SAMPLE = Path(__file__).parent / "sample"
RUN = "select_tokens/released-1"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A folder as it comes back; the last line of call B was cut off."""
    folder = tmp_path / "back"
    folder.mkdir()
    for call in "AB":
        shutil.copy(SAMPLE / f"{call}.jsonl", folder)
    shutil.copy(SAMPLE / "A.txt", folder / "A.log")  # git ignores logs
    return folder


def test_a_sample_becomes_a_file_and_a_table(sample: Path, tmp_path: Path) -> None:
    path, text = results.record([sample], tmp_path)
    assert path == tmp_path / "nvidia-h100-80gb-hbm3.json" and path.with_suffix(".md").read_text() == text
    document = json.loads(path.read_text())
    assert document["facts"]["multiprocessors"] == 132 and document["prepared"]["commit"] == "abc1234"
    assert document["machine"]["driver_version"] == "580.1"
    select, gather, product = document["rows"]
    # Two launches, 100 steps of a read and the reductions of 160 threads, 3 MB at 3 TB/s.
    assert (select["us"], select["before_us"]) == (50.0, 61.0)
    assert select["floor_us"] == pytest.approx(3.0 + 100 * 0.3 + 1.0)
    # 30 MB in 12.5 us of 3 TB/s, 32 of 640 TFLOP/s; the copy alone would take 10 us.
    assert product["gb_per_s"] == pytest.approx(2400) and product["share_of_bandwidth"] == pytest.approx(0.8)
    assert product["share_of_rate"] == pytest.approx(0.05) and product["floor_us"] == pytest.approx(10)
    assert gather == {"name": "gather_tokens/released-1", "us": 2.5, "problem": ""}
    assert document["sanitizers"] == {
        "memcheck": "0 errors",
        "racecheck": "0 hazards displayed (0 errors, 0 warnings)",
        "initcheck": "compute-sanitizer (of the CUDA toolkit)",
    }
    assert document["streams"] is None and document["steps"]["streams"] == {
        "status": "timeout",
        "seconds": 1.0,
        "why": "begun",
    }
    assert [kernel["kernel"] for kernel in document["ncu"]["ncu-small"]] == ["select_tokens", "survey_tokens"]
    assert document["ncu"]["ncu-small"][0]["Duration (us)"] == 41.25
    for part in (
        f"| {RUN} | 50.0 | 61.0 | 100 | 34.0 | 1.47 |",
        "| linear/decode-1 | 12.5 | - | 2400 | 80% | 32.0 | 5% | 1.25 |",
        "333 calls in 1332 launches equal the reference",
        f"replayed, {RUN}: 20000 times, 0 wrong bytes",
        "compute-sanitizer racecheck: 0 hazards",
        "2.50 x of the 3.20 x that operations allow (78%)",
        "150 cases equal the reference; 130 BtpSelectTokens on CUDAExecutionProvider",
        "7b-bench: prefill 30.00 ms, pruned 12.00 ms (80% of the limit), decode 9.00 ms a token, 61000 MiB at most",
        "- streams: timeout. begun",
    ):
        assert part in text


def test_two_folders_are_one_result_and_what_was_done_counts(sample: Path, tmp_path: Path) -> None:
    """A call that was repeated: the step that failed the first time is the one of the second."""
    again = tmp_path / "again"
    again.mkdir()
    done = {"step": "streams", "status": "done", "seconds": 3.0, "tail": "", "result": {"rows": []}}
    time = {"step": "time", "status": "done", "result": {"rows": [], "before_problem": "GLIBC_9.9 not found"}}
    worse = {"step": "verify", "status": "failed", "seconds": 3.0, "tail": "", "result": {"failed": ["one"]}}
    (again / "A.jsonl").write_text("\n".join(map(json.dumps, (done, time | {"seconds": 1.0}, worse))))
    path, text = results.record([sample, again], tmp_path)
    document = json.loads(path.read_text())
    assert "- the kernels before were not timed: GLIBC_9.9 not found" in text
    assert document["streams"] == {"rows": []} and document["verified"]["calls"] == 333


def test_without_an_answer_of_a_gpu_nothing_is_written(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results in"):
        results.record([tmp_path], tmp_path)
    lines = [json.loads(line) for line in (sample / "A.jsonl").read_text().splitlines()]
    facts = next(number for number, line in enumerate(lines) if line["step"] == "facts")
    lines[facts] |= {"status": "missing", "result": {"missing": "an NVIDIA GPU: there is no driver"}}
    (sample / "A.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CheckError, match="no GPU has answered: an NVIDIA GPU: there is no driver"):
        results.record([sample], tmp_path)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.md"))
