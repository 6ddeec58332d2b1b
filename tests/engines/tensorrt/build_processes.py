"""What the tests of build processes share: a job's build here or in a program, plugins that misbehave, who runs."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.tensorrt.build.job import Built, Job
from engines.tensorrt.build.worker import build_in_child
from tests.engines.native import builds
from tests.engines.tensorrt import building


def build(job: Job, report: Callable[[float], None] = lambda share: None) -> Built:
    """Build in a child, with the graph's folder for everything."""
    folder = job.onnx.parent
    return build_in_child(job, folder, folder / "build.log", report)


# The beginning of a program of its own, as users write one, without `if __name__ == "__main__"`; its argument is a job.
BUILD = """
import os, sys, threading
from engines.tensorrt.build import fork_server
from engines.tensorrt.build.job import Job
from engines.tensorrt.build.worker import build_in_child

job = Job.model_validate_json(sys.argv[1])

def build():
    build_in_child(job, job.onnx.parent, job.onnx.parent / "build.log", lambda share: None)

"""


def plugin_that(does: str, folder: Path) -> dict[str, Any]:
    """A plugin library that does something of its own as soon as it is loaded."""
    source = folder / "bad.cpp"
    source.write_text(
        "#include <csignal>\n#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void loaded() {{ {does} }}\n"
    )
    library = folder / "libbad.so"
    builds.run([builds.compiler(), "-shared", "-fPIC", source, "-o", library])
    return {"plugins": "library", "plugin_library": library, "custom_nodes": {"select": "BtpSelectTokens"}}


def waiting_job(folder: Path) -> tuple[Job, Path]:
    """A job that does not end, and the file into which its child writes its pid and that of its server."""
    pids = folder / "pids"
    does = (
        f'FILE* f = std::fopen("{pids}", "w"); std::fprintf(f, "%d %d\\n", getpid(), getppid()); std::fclose(f); '
        "for (;;) pause();"
    )
    return building.job(building.product(folder), **plugin_that(does, folder)), pids


def waiting(pids: Path) -> list[int]:
    """The pids of a waiting job's child and server, as soon as the child waits."""
    assert eventually(lambda: pids.is_file() and pids.read_text().endswith("\n"), 60)
    return [int(pid) for pid in pids.read_text().split()]


def gone(*pids: int) -> bool:
    """Whether the processes end within 10 s."""
    return eventually(lambda: not any(map(runs, pids)), 10)


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it does within that time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def runs(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return re.search(r"^State:\s+Z", status, re.MULTILINE) is None
