"""A process of its own for each engine: TensorRT may crash, abort or be killed for its memory, and we go on.

The parent writes the job on the child's standard input. The child answers with lines of JSON on standard output:
{"progress": 0.4}, and at last {"built": {...}} or {"error": {...}}. All that TensorRT and the plugins print goes to the
log file. The child dies with its parent, ignores Ctrl-C (the parent kills it), and is the first that Linux ends when
memory runs out.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import graphs
from engines.tensorrt.build.builder import build_engine, check_engine
from engines.tensorrt.build.job import Built, Job, Report, out_of_memory
from graphs.files.atomic import fresh
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError
from graphs.records.reading import parse_json

ERRORS: Final = {kind.__name__: kind for kind in (CheckError, InputError, UnavailableError)}
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOG_LINES: Final = 2  # of the log that an error quotes when the child could not say anything


def build_in_child(job: Job, scratch: Path, log: Path, report: Report) -> Built:
    """Build one engine, or check one that is there, in a child process; `scratch` is a folder for its temporary files.

    Raises what build_engine raises, CheckError if the child crashes, UnavailableError if it was killed for its memory.
    The child never outlives this call.
    """
    with fresh(log) as stream, _started(job, scratch, stream) as process:
        result = _listen(process, report)
        code = process.wait()
    if result is None:
        raise _died(job, code, log)
    if "error" in result:
        raise _error(result["error"])
    return Built.model_validate(result["built"])


@contextlib.contextmanager
def _started(job: Job, scratch: Path, log: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """The child with its job; killed at the end whatever happens."""
    roots = [str(Path(graphs.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main({os.getpid()})"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=scratch,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:
            stream.write(job.model_dump_json().encode())
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _listen(process: "subprocess.Popen[bytes]", report: Report) -> dict[str, Any] | None:
    """Pass progress on until the child ends; gives its last answer, None if it died without one."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            message = parse_json(line)
        except ValueError:
            return None  # cut off: it died while writing
        if "progress" not in message:
            return dict(message)
        report(message["progress"])
    return None


def _error(fields: dict[str, Any]) -> BtpError:
    return ERRORS[fields["kind"]](fields["got"], fields["wanted"], fields["do"])


def _died(job: Job, code: int, log: Path) -> BtpError:
    """A child that ended without an answer."""
    if code == -signal.SIGKILL:  # nobody else sends it: the system had no memory left
        return out_of_memory(job.graph)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last_lines = f": {' '.join(lines[-LOG_LINES:])[:300]}" if lines else ""
    return CheckError(
        f"{job.graph}: the process that {'loads' if job.there else 'builds'} it ended with {how}{last_lines}",
        "an engine",
        f"see {log}; --engine-weights shared and --assemble segments make smaller builds",
    )


# -- the child -------------------------------------------------------------------------------------------------------


def main(parent: int) -> None:
    """Read a job, build, answer."""
    _tie_to(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # TensorRT's own prints must not get between our lines
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    job = Job.model_validate_json(sys.stdin.buffer.read())
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
    answers.flush()


def no_space(path: Path, error: OSError) -> InputError:
    """The error for a disk that is full."""
    return InputError(
        f"{error.strerror} while writing {path.name} in {path.parent}",
        "enough space for the engines; btp-export build --dry-run shows how much",
        "free some space, or --engine-weights shared",
    )


def _fields(error: BtpError) -> dict[str, str]:
    return {"kind": type(error).__name__, "got": error.got, "wanted": error.wanted, "do": error.do}


def _tie_to(parent: int) -> None:
    """Die when the parent does, leave Ctrl-C to it, and be the first to go when memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        die_with_parent = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(1)
