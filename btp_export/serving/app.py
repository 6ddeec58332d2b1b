"""The HTTP application in front of a service: OpenAI's paths, health, metrics, and errors in OpenAI's form.

POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME    GET /health    GET /metrics    GET /
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from btp_export.serving.answers import Answer
from btp_export.serving.deadlines import within
from btp_export.serving.gathering import Event, Finish
from btp_export.serving.guard import Guard
from btp_export.serving.limits import Limits
from btp_export.serving.metrics import TYPE, Metrics
from btp_export.serving.page import page
from btp_export.serving.refusals import Refusal, no_model
from btp_export.serving.schemas import ChatRequest, parse_request


class Backend(Protocol):
    """What answers: a service of this process, or handles of others."""

    @property
    def name(self) -> str:
        """The model's, as requests name it."""

    @property
    def description(self) -> dict[str, Any]:
        """What /v1/models says of it beside OpenAI's fields."""

    @property
    def limits(self) -> Limits:
        """The most that a request may take."""

    @property
    def numbers(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Further numbers for /metrics: name -> what it is, and the number now."""

    def trouble(self) -> str | None:
        """Why no answers come, None if they do."""

    def place(self) -> contextlib.AbstractContextManager[None]:
        """A place among the requests under way. Raises Refusal if there is none."""

    def answer(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The answer as it comes. Raises Refusal."""


def make_app(backend: Backend, *, api_key: str | None = None, hosts: frozenset[str] | None = None) -> FastAPI:
    """The application.

    `api_key` is what callers of /v1 and /metrics have to send, if anything. `hosts` are the names that a request may
    call this server by, any without.
    """
    metrics = Metrics()
    for name, (words, value) in backend.numbers.items():
        metrics.gauge(name, words, value)
    app = FastAPI(title="btp-export", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_such_path)
    keyed = [Depends(_key_check(api_key))] if api_key is not None else []
    created = int(time.time())

    @app.get("/")
    async def read_page() -> Response:
        text, policy = page()
        return HTMLResponse(text, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        trouble = backend.trouble()
        status = {"status": "ok"} if trouble is None else {"status": "unavailable", "reason": trouble}
        return JSONResponse(status, 200 if trouble is None else 503)

    @app.get("/metrics", dependencies=keyed)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=TYPE)

    def model() -> dict[str, Any]:
        fields = {"id": backend.name, "object": "model", "created": created, "owned_by": "btp-export"}
        return fields | backend.description

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name}", dependencies=keyed)
    async def one_model(name: str) -> Response:
        if name != backend.name:
            raise no_model(name)
        return JSONResponse(model())

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request) -> Response:
        return await _Chat(backend, metrics, request).response()

    app.add_middleware(Guard, hosts=hosts, answered=metrics.answered)
    return app


class _Chat:
    """One request for a chat completion."""

    def __init__(self, backend: Backend, metrics: Metrics, request: Request) -> None:
        self._backend, self._metrics, self._request = backend, metrics, request
        self._start = time.monotonic()

    async def response(self) -> Response:
        """The answer, whole or as a stream."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._backend.place())
            try:
                asked = parse_request(await read_body(self._request, self._backend.limits))
                events = _while_there(self._backend.answer(asked), self._request.receive)
                stack.push_async_callback(events.aclose)
                first = await anext(events)  # what is refused before the first text has a status of its own
                following = self._watched(first, events)
                answer = Answer(self._backend.name, self._backend.description["fingerprint"])
                if not asked.stream:
                    return JSONResponse(await answer.whole(following))
            except ClientDisconnect:
                self._metrics.gone()
                raise
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _Streamed(answer.chunks(following, with_usage=with_usage), stack.pop_all(), self._metrics.gone)
        raise AssertionError("not reached: the stack swallows no exceptions")

    async def _watched(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        """All events; the last is counted."""
        self._count(first)
        yield first
        async for event in events:
            self._count(event)
            yield event

    def _count(self, event: Event) -> None:
        if isinstance(event, Finish):
            self._metrics.finished(event, time.monotonic() - self._start)


class _Streamed(Response):
    """Server-sent events. `held` is let go of however they end."""

    def __init__(self, chunks: AsyncIterator[bytes], held: contextlib.AsyncExitStack, gone: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._chunks, self._held, self._gone = chunks, held, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ClientDisconnect:
                self._gone()
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_there(events: AsyncGenerator[Event, None], receive: Receive) -> AsyncGenerator[Event, None]:
    """The events as long as the client is there. Raises ClientDisconnect, and ends them, when it goes away."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        while True:
            step = asyncio.ensure_future(anext(events))
            try:
                await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise ClientDisconnect
            finally:
                if not step.done():
                    step.cancel()
                    await asyncio.wait({step})
            try:
                event = step.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        gone.cancel()
        await events.aclose()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limits: Limits) -> bytes:
    """A JSON body. Raises Refusal for another kind, more than the limit, or one that comes too slowly."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps pages of other sites out: browsers ask before they send this type, and get no leave.
        raise Refusal("content-type: wanted application/json", 415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal("content-encoding: wanted none", 415)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body:
        raise _too_large(limits)
    try:
        return await within(limits.seconds, _read(request, limits))
    except asyncio.TimeoutError as error:
        raise Refusal(f"the body did not come within {limits.seconds:g} s", 408) from error


async def _read(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limits.body:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(f"the body has more than {limits.body} bytes", 413, code="too_large")


def _key_check(key: str) -> Callable[[Request], Awaitable[None]]:
    """Raises Refusal for a request without the key; how long that takes says nothing of where they differ."""
    wanted = f"Bearer {key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, wanted):
            raise Refusal("no valid API key", 401, "authentication_error", "invalid_api_key")

    return check


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.document(), error.status, headers=dict(error.headers()))


async def _no_such_path(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    words = {404: "no such path", 405: "not a method of this path"}.get(error.status_code, str(error.detail))
    refusal = Refusal(words, error.status_code, code="not_found" if error.status_code == 404 else None)
    return JSONResponse(refusal.document(), error.status_code, headers=error.headers)
