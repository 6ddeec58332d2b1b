"""The server process: its socket, and signals that let it finish what runs."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from btp_export.serving.app import make_app
from btp_export.serving.limits import Limits
from btp_export.serving.service import Service, Serving
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEAD_BYTES = 64 * 1024  # of a request line with its headers


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError for a host that is not this machine's and a port that is taken."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(where[0]), port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host} port {port}: {reason}",
            wanted="an address of this machine and a port that is free",
            do="--port 0 takes any free one",
        ) from error


def address_of(listening: socket.socket) -> str:
    """http://127.0.0.1:8000"""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "127.0.0.1", "::1")


def names_of(host: str, allowed: tuple[str, ...]) -> frozenset[str] | None:
    """The names by which requests may call a server that listens on `host`: any, unless that is this machine alone."""
    if not is_loopback(host):
        return None
    return LOOPBACK | {name.lower() for name in allowed}


def serve_until_stopped(
    bundle: Bundle,
    serving: Serving,
    listening: socket.socket,
    *,
    api_key: str | None,
    hosts: frozenset[str] | None,
    ready: Callable[[Service], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then what runs is finished, a second one ends it.

    `ready` is called once requests are answered. Raises BtpError if the service cannot start.
    """
    service = Service(bundle, serving)
    app = make_app(service, api_key=api_key, hosts=hosts)
    _Server(configured(app, service.limits), service, lambda: ready(service)).run(sockets=[listening])


def configured(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings: requests are bounded, nothing is logged that a request causes."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",  # which bounds the size of what it has not understood yet
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # a line for every broken request would fill the log for whoever sends them
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


class _Server(uvicorn.Server):
    """uvicorn's server around a service; signals end it well instead of being raised again afterwards."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.start()
            await super().serve(sockets)
        finally:
            await self._service.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.hurry()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
