"""The server that is forked for each engine: shared, replaced, and ended with the process that it builds for."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.tensorrt.build import fork_server
from engines.tensorrt.build.job import Job
from graphs.records.errors import CheckError, UnavailableError
from tests import children
from tests.engines.tensorrt import build_processes, building
from tests.engines.tensorrt.build_processes import build


@pytest.fixture(autouse=True)
def _rtx() -> None:
    building.need_rtx()


def job_in(folder: Path) -> Job:
    folder.mkdir()
    return building.job(building.product(folder))


def the_server() -> int:
    """The pid of the one that the next build will take."""
    return fork_server.idle[-1].process.pid


def test_builds_share_a_server_that_crashes_do_not_hurt(tmp_path: Path) -> None:
    """The thread that started it may have ended. No descriptor stays open."""
    first, crash, last = (job_in(tmp_path / name) for name in ("first", "crash", "last"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(build, first).result()
    server, descriptors = the_server(), os.listdir("/proc/self/fd")
    with pytest.raises(CheckError, match="SIGSEGV"):
        build(crash.model_copy(update=build_processes.plugin_that("std::raise(SIGSEGV);", tmp_path)))
    build(last)
    assert first.engine.is_file() and last.engine.is_file() and not crash.engine.exists()
    assert the_server() == server and os.listdir("/proc/self/fd") == descriptors


def test_the_server_is_fit_to_be_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one thread and what takes long to import, and neither TensorRT nor CUDA; it holds no log open."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which is 1 for these tests
    with (
        (tmp_path / "log").open("wb") as log,
        fork_server.borrowed("rtx", {**os.environb, b"LD_NEW": b"1"}, log) as new,
    ):
        server = Path(f"/proc/{new.process.pid}")
        assert build_processes.eventually(lambda: (server / "fd" / "0").readlink() == Path(os.devnull), 60)
        maps = (server / "maps").read_text()
        assert "pydantic_core" in maps and "multiarray" in maps
        assert not re.search(r"libcuda|libnv|tensorrt[^/]*\.so", maps)
        assert len(list((server / "task").iterdir())) == 1
    build(job_in(tmp_path / "one"))
    server = Path(f"/proc/{the_server()}")
    assert {str(link.readlink()).partition(":")[0] for link in (server / "fd").iterdir()} == {"/dev/null", "socket"}
    assert (server / "oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()


def test_threads_build_at_once(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def build_one(name: str) -> bool:
        job = job_in(tmp_path / name)
        reports = iter([both.wait])  # at the first report, so that neither ends before both have begun
        build(job, lambda share: [wait() for wait in reports].clear())
        return job.engine.is_file()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(build_one, "ab")) == [True, True]


def test_an_interrupted_build_leaves_neither_child_nor_server(tmp_path: Path) -> None:
    """The caller may go on, as from a Ctrl-C that it answers itself."""
    job = job_in(tmp_path / "one")
    build(job)
    server = the_server()

    def interrupted(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(job, interrupted)
    assert not build_processes.runs(server)
    build(job)


def test_an_idle_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    job = job_in(tmp_path / "one")
    build(job)
    os.kill(server := the_server(), signal.SIGKILL)
    assert build_processes.gone(server)
    build(job)
    assert the_server() != server


def test_a_server_that_is_killed_takes_its_child_along(tmp_path: Path) -> None:
    job, pids = build_processes.waiting_job(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(build, job)
        child, server = build_processes.waiting(pids)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="the memory did not suffice"):
            waits.result(30)
    assert build_processes.gone(child)
    build(job_in(tmp_path / "next"))
    assert the_server() != server


def test_the_child_has_the_present_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, and its own folder; it leaves Ctrl-C alone, and is the first to go when memory runs out."""
    says = (
        'std::fprintf(stderr, "%s %s %s ", std::getenv("BTP_NEW"), std::getenv("TMPDIR"), getcwd(nullptr, 0)); '
        'char score[9] = ""; std::fgets(score, 9, std::fopen("/proc/self/oom_score_adj", "r")); '
        'std::fprintf(stderr, "%d %d %s", !std::getenv("BTP_OLD"), std::signal(SIGINT, SIG_DFL) == SIG_IGN, score); '
        "_exit(7);"
    )
    monkeypatch.setenv("BTP_OLD", "1")
    job = job_in(tmp_path / "one")
    build(job)
    server = the_server()
    monkeypatch.delenv("BTP_OLD")
    monkeypatch.setitem(os.environb, b"BTP_NEW", b"caf\xe9")
    with pytest.raises(CheckError, match="exit code 7"):
        build(job.model_copy(update=build_processes.plugin_that(says, tmp_path)))
    folder = bytes(job.onnx.parent)
    said = (job.onnx.parent / "build.log").read_bytes()
    assert said.endswith(b"caf\xe9 %b %b 1 1 1000\n" % (folder, folder))
    assert the_server() == server


def test_what_only_a_new_program_reads_takes_a_new_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path / "one")
    build(job)
    server = the_server()
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")]))
    build(job)
    assert the_server() != server and not build_processes.runs(server)


def test_a_server_that_does_not_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path / "one")
    (tmp_path / "ml_dtypes.py").write_text("raise ImportError('not for this machine')")
    with monkeypatch.context() as patch, pytest.raises(CheckError, match=r"exit code 1:.* not for this machine"):
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
        build(job)
    build(job)
    assert job.engine.is_file()


def test_a_fork_of_a_process_that_has_built_builds(tmp_path: Path) -> None:
    """With a server of its own; ours is as it was."""
    job = job_in(tmp_path / "one")
    build(job)
    server = the_server()
    job.engine.unlink()
    assert children.exit_code(_build_with_another, job, server) == 0
    assert job.engine.is_file()
    build(job)
    assert the_server() == server


def _build_with_another(job: Job, server: int) -> None:
    build(job)
    assert the_server() != server


def program(script: str, job: Job) -> "subprocess.Popen[bytes]":
    """A process that runs the script and may print; warnings that its end brings are errors."""
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-c",
        build_processes.BUILD + script,
        job.model_dump_json(),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_server_ends_with_its_parent_though_a_fork_of_that_lives(tmp_path: Path) -> None:
    script = "build(); print(fork_server.idle[0].process.pid, flush=True)\nif os.fork(): os._exit(0)\nsys.stdin.read()"
    with program(script, job_in(tmp_path / "one")) as parent:
        assert parent.stdout is not None
        assert build_processes.gone(int(parent.stdout.readline()))


def test_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    """No server and no warning of what was not closed, whatever threads have built, and though SIGCHLD is ignored."""
    script = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "thread = threading.Thread(target=build); thread.start(); thread.join()\n"
        "print(*[server.process.pid for server in fork_server.idle]); build()\n"
        "print(*[server.process.pid for server in fork_server.idle])"
    )
    with program(script, job_in(tmp_path / "one")) as parent:
        said, errors = parent.communicate(timeout=60)
    server, same = map(int, said.split())
    assert (parent.returncode, errors) == (0, b"")
    assert server == same and not build_processes.runs(server)


def test_a_build_ends_with_the_program_that_does_not_wait_for_it(tmp_path: Path) -> None:
    job, pids = build_processes.waiting_job(tmp_path)
    with program("threading.Thread(target=build, daemon=True).start(); sys.stdin.read()", job) as parent:
        processes = build_processes.waiting(pids)
        parent.communicate(timeout=30)
    assert parent.returncode == 0 and not any(map(build_processes.runs, processes))
