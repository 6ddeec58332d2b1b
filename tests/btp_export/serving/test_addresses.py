"""Where pictures may come from: data: URIs always, files and the web only where they are allowed, all with limits."""

import base64
import contextlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btp_export.serving.addresses import picture_bytes
from btp_export.serving.limits import Access, Limits
from btp_export.serving.refusals import Refusal

LIMITS = Limits(picture=1000, fetch_seconds=1.0)
CLOSED, HTTP, PRIVATE = Access(), Access(http=True), Access(http=True, private=True)


def refusal(address: str, access: Access = CLOSED, limits: Limits = LIMITS) -> str:
    with pytest.raises(Refusal) as caught:
        picture_bytes(address, access, limits)
    assert caught.value.status == 400 and "/" not in caught.value.message.replace("data:image/png", "").replace(
        "(s)", ""
    )
    return caught.value.message


def test_data_uris() -> None:
    for data in (b"", b"\x00picture\xff", bytes(1000)):
        text = base64.b64encode(data).decode()
        assert picture_bytes(f"data:image/png;base64,{text}", CLOSED, LIMITS) == data
        assert picture_bytes(f"DATA:image/png;x=y;BASE64,{text}", CLOSED, LIMITS) == data
    assert picture_bytes("data:,a%00b", CLOSED, LIMITS) == b"a\x00b"
    assert "not base64" in refusal("data:image/png;base64,a b")
    assert "no line breaks" in refusal("data:image/png;base64,YWJj\nZGVm")
    assert "that is none" in refusal("data:image/png;base64")
    assert "more than 1000 bytes" in refusal(f"data:image/png;base64,{base64.b64encode(bytes(1001)).decode()}")
    assert "more than 1000 bytes" in refusal(f"data:,{'a' * 1001}")


@pytest.mark.parametrize(
    "address", ["", "picture.png", "/etc/passwd", "ftp://x/y", "gopher:x", "javascript:1", "C:\\x"]
)
def test_other_kinds(address: str) -> None:
    assert "unknown kind" in refusal(address, PRIVATE)


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    access = Access(files=folder)
    (folder / "a b.png").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "large").write_bytes(bytes(1001))
    os.mkfifo(folder / "pipe")
    assert picture_bytes(f"file://{folder}/a%20b.png", access, LIMITS) == b"picture"
    assert picture_bytes(f"file://localhost{folder}/a%20b.png", access, LIMITS) == b"picture"
    assert "wanted: a data: URI" in refusal(f"file://{folder}/a%20b.png")
    for name in (f"{folder}/../secret", f"{folder}/link", f"{folder}/%2e%2e/secret", "/etc/passwd", f"{folder}x/a"):
        assert "outside the folder" in refusal(f"file://{name}", access)
    for name in ("none.png", "", "pipe"):
        assert refusal(f"file://{folder}/{name}", access) in ("image_url: no such file", "image_url: not a file")
    assert "more than 1000 bytes" in refusal(f"file://{folder}/large", access)
    assert "another machine" in refusal(f"file://elsewhere{folder}/a", access)


class Web(http.server.BaseHTTPRequestHandler):
    """Pictures, redirects, and what goes wrong."""

    def do_GET(self) -> None:
        name, _, rest = self.path.partition("?")
        if name == "/to":
            self.send_response(302)
            self.send_header("location", rest)
            self.end_headers()
        elif name == "/picture":
            self._send(b"picture")
        elif name == "/large":
            self._send(bytes(1001))
        elif name == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(100))
        elif name == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(40):
                    self.wfile.write(b"a")
                    time.sleep(0.1)
        else:
            self.send_error(404)

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_web(web: str) -> None:
    assert "wanted: a data: URI" in refusal(f"{web}/picture")
    assert "private network" in refusal(f"{web}/picture", HTTP)
    assert picture_bytes(f"{web}/picture", PRIVATE, LIMITS) == b"picture"
    assert picture_bytes(f"{web}/to?/to?/picture", PRIVATE, LIMITS) == b"picture"
    assert "leads on more than 3 times" in refusal(f"{web}/to?/to?/to?/to?/picture", PRIVATE)
    for elsewhere in ("file:///etc/passwd", "ftp://127.0.0.1/", "data:,a"):
        assert "not of the web" in refusal(f"{web}/to?{elsewhere}", PRIVATE)
    assert "status 404" in refusal(f"{web}/nothing", PRIVATE)
    for name in ("large", "endless"):
        assert "more than 1000 bytes" in refusal(f"{web}/{name}", PRIVATE)


def test_the_deadline_is_of_the_whole(web: str) -> None:
    """Not of each read: /slow sends a byte every tenth of a second."""
    start, limits = time.monotonic(), Limits(picture=1000, fetch_seconds=0.4)
    assert "within 0.4 s" in refusal(f"{web}/slow", PRIVATE, limits)
    assert time.monotonic() - start < 3
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "within 0.4 s" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/", PRIVATE, limits)


PRIVATE_HOSTS = [
    "localhost", "127.0.0.1", "0.0.0.0", "[::1]", "[::]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0", "100.64.0.1", "224.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_however_they_are_written(host: str) -> None:
    for said in (refusal(f"http://{host}:9/", HTTP), refusal(f"https://{host}:9/", HTTP)):
        assert "private network" in said or "cannot be read" in said


def test_a_public_name_that_leads_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One private address among those of a name is enough."""
    result = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: result)
    assert "private network" in refusal("http://pictures.example/", HTTP)


@pytest.mark.parametrize("address", ["http://", "http://[::1", "http://a:b/", "http://x:99999/", "http://exa\r\nmple/"])
def test_addresses_that_are_none(address: str) -> None:
    said = "an address without a host" if address == "http://" else "the address cannot be read"
    assert refusal(address, PRIVATE) == f"image_url: {said}"
