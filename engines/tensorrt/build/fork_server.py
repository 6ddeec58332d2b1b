"""A process that has everything imported which a build needs, and forks itself for each engine.

A small engine takes 0.15 s of processor time, the imports 0.4. The server has one thread, as only such a process can be
forked safely, and loads neither TensorRT nor CUDA: a CUDA that was started does not work in a fork, and an engine's
peak memory is to contain the library (docs/decisions/engine-builds.md).

Parent and server share a socket; the child inherits the server's end, so the parent reads there until all have gone:

    parent -> server   the folder to work in, the job, and the environment, with the descriptor of the log
    child -> parent    lines of JSON, those of child.py
    server -> parent   {"ended": exit code}, when the child is gone; negative for a signal

When the parent's end is closed, by whatever ends the parent, the server kills its child and ends. When the server is
killed, Linux kills the child. A server that has nothing to do waits for the next build, of any thread of its parent.
"""

import atexit
import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Final

import graphs
from engines.tensorrt.records import Flavour
from graphs.records.errors import UnavailableError

ROOT: Final = Path(graphs.__file__).parents[1]
# Programs read these once, when they start, and libraries when they are imported: other values take another server.
READ_ONCE: Final = (b"LD_", b"PYTHON", b"GLIBC_", b"MALLOC_", b"POLYGRAPHY_")
ONE_THREAD: Final = {b"OPENBLAS_NUM_THREADS": b"1"}  # numpy's would start others when it is imported
END: Final = b"\0\0"  # of a request; no part of one is empty


class ForkServer:
    """The server as its parent sees it: one build at a time."""

    def __init__(self, flavour: Flavour, environment: Mapping[bytes, bytes], log: IO[bytes]) -> None:
        """Start one for builds with a TensorRT; what it prints until it is ready goes to the log."""
        self._start = _start(flavour, environment)
        self._socket, other = socket.socketpair()
        try:
            with other:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", f"from {__name__} import serve; serve({flavour!r})"],
                    stdin=other.fileno(), stdout=log, stderr=log, env={**environment, **ONE_THREAD}, cwd=ROOT,
                )  # fmt: skip
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        _servers.add(self)

    def fits(self, flavour: Flavour, environment: Mapping[bytes, bytes]) -> bool:
        """Whether it runs, and was started as one for this build would be."""
        return self.process.poll() is None and self._start == _start(flavour, environment)

    def build(self, job: bytes, folder: Path, environment: Mapping[bytes, bytes], log: IO[bytes]) -> Iterator[bytes]:
        """Fork a child for a job. Gives the lines that it and the server write; if the server dies, how that ended."""
        variables = [name + b"=" + value for name, value in environment.items()]
        request = b"\0".join([os.fsencode(folder), job, *variables]) + END
        with contextlib.suppress(ConnectionError):  # it has died; the lines end
            sent = socket.send_fds(self._socket, [request], [log.fileno()])
            self._socket.sendall(request[sent:])
            yield from iter(self._lines.readline, b"")
        yield b'{"ended": %d}' % self.process.wait()

    def end(self) -> None:
        """End the server and its child; returns when neither runs."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(2**16):
                pass
        self._lines.close()
        self._socket.close()
        self.process.wait()
        _servers.discard(self)

    def forget(self) -> None:
        """In a fork of its parent: the server is not ours, and must notice when its parent's end alone is closed."""
        os.close(self._socket.detach())
        self.process.returncode = 0


def _start(flavour: Flavour, environment: Mapping[bytes, bytes]) -> tuple[Flavour, dict[bytes, bytes]]:
    return flavour, {name: value for name, value in environment.items() if name.startswith(READ_ONCE)}


_servers: Final[set[ForkServer]] = set()
idle: Final[list[ForkServer]] = []  # taken and put back by any thread, each in one step


@contextlib.contextmanager
def borrowed(flavour: Flavour, environment: Mapping[bytes, bytes], log: IO[bytes]) -> Iterator[ForkServer]:
    """An idle server, or a new one; it is kept for later builds, or ended if anything is raised or it has died."""
    server = _take(flavour, environment) or ForkServer(flavour, environment, log)
    try:
        yield server
    except BaseException:
        server.end()
        raise
    idle.append(server)


def _take(flavour: Flavour, environment: Mapping[bytes, bytes]) -> ForkServer | None:
    with contextlib.suppress(IndexError):
        while not (server := idle.pop()).fits(flavour, environment):
            server.end()
        return server
    return None


def _end_all() -> None:
    for server in list(_servers):
        server.end()


def _forget_all() -> None:
    for server in _servers:
        server.forget()
    _servers.clear()
    idle.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)


# -- the server ------------------------------------------------------------------------------------------------------


def serve(flavour: Flavour) -> None:
    """Fork a child for each request on standard input, a socket, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever it was for the parent: we wait for our child
    from engines.tensorrt.build.builder import import_polygraphy
    from engines.tensorrt.build.child import run

    with contextlib.suppress(UnavailableError):  # a child that needs it will say so
        import_polygraphy(flavour)
    gc.freeze()  # a child's collections need not go through what is there already, and so copy it
    with socket.socket(fileno=os.dup(0)) as parent, open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        _print_to(nothing.fileno())
        while received := _receive(parent):
            request, log = received
            _print_to(log)
            os.close(log)
            server, (ends, held) = os.getpid(), os.pipe()
            child = os.fork()
            if child == 0:
                run(request, parent, server)
                return
            os.close(held)
            _print_to(nothing.fileno())
            code = _wait(child, ends, parent)
            with contextlib.suppress(ConnectionError):
                parent.sendall(b'\n{"ended": %d}\n' % code)


def _print_to(descriptor: int) -> None:
    for standard in (1, 2):
        os.dup2(descriptor, standard)


def _receive(parent: socket.socket) -> tuple[list[bytes], int] | None:
    """The parts of a request, and the log's descriptor; None when the parent's end is closed."""
    request, descriptors = b"", list[int]()
    while not request.endswith(END):
        try:
            part, more, _, _ = socket.recv_fds(parent, 2**16, 1)
        except ConnectionError:
            return None
        if not part:
            return None
        request, descriptors = request + part, descriptors + more
    return request.removesuffix(END).split(b"\0"), descriptors[0]


def _wait(child: int, ends: int, parent: socket.socket) -> int:
    """The exit code of a child, at whose end the pipe `ends` does; the child is killed if the parent's end closes."""
    with open(ends, "rb", buffering=0) as pipe:
        ready, _, _ = select.select([pipe.fileno(), parent.fileno()], [], [])
    if parent.fileno() in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
