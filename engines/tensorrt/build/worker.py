"""A process of its own for each engine: TensorRT may crash, abort or be killed for its memory, and we go on.

This is the parent's side: it has a fork server (fork_server.py) start the child (child.py), and listens to both.
"""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from engines.tensorrt.build import fork_server
from engines.tensorrt.build.job import Built, Job, Report, out_of_memory
from graphs.files.atomic import fresh
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError
from graphs.records.reading import parse_json

ERRORS: Final = {kind.__name__: kind for kind in (CheckError, InputError, UnavailableError)}
LOG_LINES: Final = 2  # of the log that an error quotes when the child could not say anything


def build_in_child(job: Job, scratch: Path, log: Path, report: Report) -> Built:
    """Build one engine, or check one that is there, in a child process; `scratch` is a folder for its temporary files.

    Raises what build_engine raises, CheckError if the child crashes, UnavailableError if it was killed for its memory.
    The child never outlives this call.
    """
    roots = [os.fsencode(fork_server.ROOT), *filter(None, [os.environb.get(b"PYTHONPATH")])]
    environment = {**os.environb, b"PYTHONPATH": os.pathsep.encode().join(roots), b"TMPDIR": os.fsencode(scratch)}
    with fresh(log) as stream, fork_server.borrowed(job.flavour, environment, stream) as server:
        lines = server.build(job.model_dump_json().encode(), scratch, environment, stream)
        result, code = _listen(lines, report)
    if result is None:
        raise _died(job, code, log)
    if "error" in result:
        raise _error(result["error"])
    return Built.model_validate(result["built"])


def _listen(lines: Iterable[bytes], report: Report) -> tuple[dict[str, Any] | None, int]:
    """Pass progress on until the child has ended; gives its answer, None if it died without one, and its exit code."""
    result = None
    for line in lines:
        try:
            message = parse_json(line)
        except ValueError:
            continue  # cut off: it died while writing
        if "ended" in message:
            return result, message["ended"]
        if "progress" in message:
            report(message["progress"])
        else:
            result = message
    raise AssertionError("a server that says nothing of the child's end")


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
