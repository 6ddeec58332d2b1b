"""What runs in the process of one engine, a fork of fork_server.py: it dies with the server, and is the first that
Linux ends when memory runs out.

It answers with lines of JSON: {"progress": 0.4}, and at last {"built": {...}} or {"error": {...}}. All that TensorRT
and the plugins print goes to the log file, which is standard output and standard error.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, Final

from engines.tensorrt.build.builder import build_engine, check_engine
from engines.tensorrt.build.job import Job, out_of_memory
from graphs.records.errors import BtpError, InputError

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(request: list[bytes], parent: socket.socket, server: int) -> None:
    """Do what is asked and answer the parent. `request`: the folder to work in, the job, the environment, "name=value".

    `server` is the process that forked this one.
    """
    _tie_to(server)
    folder, job, *environment = request
    os.environb.clear()
    for variable in environment:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value
    os.chdir(folder)
    _answer(Job.model_validate_json(job), parent)


def _answer(job: Job, parent: socket.socket) -> None:
    def say(message: dict[str, Any]) -> None:
        parent.sendall(json.dumps(message).encode() + b"\n")

    try:
        built = check_engine(job) if job.there else build_engine(job, lambda share: say({"progress": share}))
        say({"built": built.model_dump(mode="json")})
    except BtpError as error:
        say({"error": _fields(error)})
    except MemoryError:
        say({"error": _fields(out_of_memory(job.graph))})
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        say({"error": _fields(no_space(job.engine, error))})


def no_space(path: Path, error: OSError) -> InputError:
    """The error for a disk that is full."""
    return InputError(
        f"{error.strerror} while writing {path.name} in {path.parent}",
        "enough space for the engines; btp-export build --dry-run shows how much",
        "free some space, or --engine-weights shared",
    )


def _fields(error: BtpError) -> dict[str, str]:
    return {"kind": type(error).__name__, "got": error.got, "wanted": error.wanted, "do": error.do}


def _tie_to(server: int) -> None:
    """Die when the server does, and be the first to go when memory runs out."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        die_with_parent = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != server:  # it died before we asked to be told
        os._exit(1)
