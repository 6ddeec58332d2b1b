"""A server in a thread of the tests' process, its requests, and pictures as requests carry them."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from PIL import Image

from btp_export.serving import server
from btp_export.serving.app import make_app
from btp_export.serving.service import Service

JSON = {"content-type": "application/json"}


class Server:
    """A service behind one application or several, each with an address of its own."""

    def __init__(self, service: Service, *keys: str | None) -> None:
        self.service = service
        self.addresses: list[str] = []
        self._keys, self._servers = keys, list[uvicorn.Server]()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        self._thread.start()
        wait_until(lambda: len(self._servers) == len(self._keys) and all(one.started for one in self._servers), 240)
        try:
            yield self
        finally:
            for one in self._servers:
                one.should_exit = True
            self._thread.join(20)
            assert not self._thread.is_alive()

    async def _serve(self) -> None:
        await self.service.start()
        tasks = []
        for key in self._keys:
            listening = server.bind("127.0.0.1", 0)
            self.addresses.append(server.address_of(listening))
            app = make_app(self.service, api_key=key, hosts=server.names_of("127.0.0.1", ()))
            self._servers.append(uvicorn.Server(server.configured(app, self.service.limits)))
            tasks.append(asyncio.create_task(self._servers[-1].serve(sockets=[listening])))
        await asyncio.gather(*tasks)
        await self.service.stop()

    def ask(self, body: Any, *, path: str = "/v1/chat/completions", which: int = 0, **headers: str) -> "Reply":
        """Send a JSON document, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return ask(self.addresses[which], "POST", path, data, JSON | headers)

    def get(self, path: str, *, which: int = 0, **headers: str) -> "Reply":
        return ask(self.addresses[which], "GET", path, None, headers)

    def number(self, name: str) -> float:
        """A number of /metrics."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


class Reply:
    def __init__(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.status, self.headers, self.text = status, headers, data.decode()

    @property
    def document(self) -> Any:
        return json.loads(self.text)


def ask(address: str, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def question(picture: Image.Image | str, *turns: str) -> list[dict[str, Any]]:
    """Messages: the picture with the first turn, then in turn answers and questions."""
    address = picture if isinstance(picture, str) else data_uri(picture)
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": turns[0]}]
    later = [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(turns[1:], 1)
    ]
    return [{"role": "user", "content": parts}, *later]


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)
