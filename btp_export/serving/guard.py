"""What every request passes: the names a server answers to, headers for browsers, counting, and defects."""

import json
import traceback
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btp_export.console import note
from btp_export.serving.refusals import Refusal, defect

HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
PATHS = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/models")


class Guard:
    """The application, guarded.

    hosts: names a request may call this server by, without port; None: any. A page of another site can make a name of
    its own lead to this machine, and its browser sends that name.
    answered: told the path (those of PATHS by name) and the status of every answer.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, answered: Callable[[str, int], None]) -> None:
        self._app, self._hosts, self._answered = app, hosts, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
                self._answered(path, message["status"])
            try:
                await send(message)
            except Exception as error:  # the server has closed the connection, for instance over broken chunks
                raise ClientDisconnect from error

        try:
            if self._hosts is not None and _host(scope) not in self._hosts:
                raise Refusal("this server is not called by that name (serve --allow-host allows it)", 421)
            await self._app(scope, receive, guarded)
        except ClientDisconnect:
            return
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else defect()
            if refusal.status >= 500:
                note("error: " + "".join(traceback.format_exception(error)))
            if not started:
                await _send(refusal, guarded)


def _host(scope: Scope) -> str:
    """The name of the Host header without its port."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _send(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.document()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
