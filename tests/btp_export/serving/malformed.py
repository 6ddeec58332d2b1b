"""Requests that are wrong in one of many ways, chosen by a number: some for the tests, ten thousand for a benchmark."""

import contextlib
import json
import random
import socket
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


def malformed(address: str, good: dict[str, Any], number: int) -> tuple[int, str]:
    """Send the n-th; the status and the text of the answer."""
    chance = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    return _answer(address, kind(chance, good))


def _answer(address: str, data: bytes) -> tuple[int, str]:
    where = urlsplit(address)
    with socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=30) as connection:
        with contextlib.suppress(OSError):  # the answer is there already
            connection.sendall(data)
        text = b""
        while piece := connection.recv(2**16):
            text += piece
    return int(text.split(b" ", 2)[1]), text.decode("utf-8", "replace")


def _request(body: bytes, *, method: str = "POST", path: str = CHAT, kind: str = "application/json") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {kind}\r\nconnection: close"
    return f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode("latin-1") + body


def _cut_json(chance: random.Random, good: dict[str, Any]) -> bytes:
    body = json.dumps(good).encode()
    return _request(body[: chance.randrange(len(body))])


def _changed_json(chance: random.Random, good: dict[str, Any]) -> bytes:
    """A character outside of strings replaced by one that JSON does not have there."""
    body = bytearray(json.dumps(good).encode())
    place = chance.choice([0, 1, len(body) - 1])
    body[place] = chance.choice(b"\x00\xff);x")
    return _request(bytes(body))


def _noise(chance: random.Random, good: dict[str, Any]) -> bytes:
    return _request(chance.randbytes(chance.randrange(1, 2000)))


WRONG: tuple[Any, ...] = (None, -1, 1e400, "", "x", [], {}, [[]], True, "9" * 400, {"a": [1]}, -(2**70))


def _wrong_value(chance: random.Random, good: dict[str, Any]) -> bytes:
    """A field that no value of WRONG suits, the ones it takes left aside."""
    takes: dict[str, tuple[Any, ...]] = {
        "model": (), "messages": (), "temperature": (None,), "top_p": (None,), "seed": (None,), "max_tokens": (None,),
        "n": (None,), "stream": (None, True), "stop": (None, [], "x", "9" * 400), "stream_options": (None, {}),
        "tools": (None, []), "response_format": (None,), "logit_bias": (None, {}),
    }  # fmt: skip
    field = chance.choice(sorted(takes))
    value = chance.choice([value for value in WRONG if not any(value is one or value == one for one in takes[field])])
    return _request(json.dumps(good | {field: value}).encode())


def _wrong_message(chance: random.Random, good: dict[str, Any]) -> bytes:
    content = good["messages"][0]["content"]
    collected = [
        [{"role": "user", "content": chance.choice(WRONG)}],
        [{"role": chance.choice(WRONG), "content": content}],
        [{"role": "user", "content": [*content, *content]}],
        [{"role": "user", "content": [*content, {"type": chance.choice(WRONG)}]}],
        [{"role": "user", "content": content, "unknown": 1}],
        good["messages"] * chance.randrange(2, 50),
    ]
    return _request(json.dumps(good | {"messages": chance.choice(collected)}).encode())


def _wrong_picture(chance: random.Random, good: dict[str, Any]) -> bytes:
    uri = good["messages"][0]["content"][0]["image_url"]["url"]
    collected = [
        uri[: chance.randrange(len(uri) * 3 // 4)],
        uri.replace("base64,", "base64,!"),
        "data:image/png;base64,aGVsbG8=",
        chance.choice(["http://127.0.0.1/", "file:///etc/passwd", "ftp://a/b", "x" * 5000, "\x00", "data:"]),
    ]
    part = {"type": "image_url", "image_url": {"url": chance.choice(collected)}}
    message = {"role": "user", "content": [part, good["messages"][0]["content"][1]]}
    return _request(json.dumps(good | {"messages": [message]}).encode())


def _wrong_head(chance: random.Random, good: dict[str, Any]) -> bytes:
    body = json.dumps(good).encode()
    return chance.choice(
        [
            _request(body, method=chance.choice(["GET", "PUT", "DELETE", "PATCH", "BREW"])),
            _request(
                body, path=chance.choice(["/v1", "/v1/completions", "//", "/%00", "/" + "a" * 3000, "/../etc/passwd"])
            ),
            _request(body, kind=chance.choice(["text/plain", "application/xml", "multipart/form-data", ""])),
        ]
    )


def _no_http(chance: random.Random, good: dict[str, Any]) -> bytes:
    return chance.choice(
        [
            b"\x16\x03\x01" + chance.randbytes(200) + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\nconnection: close\r\n\r\n",
            f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".encode(),
            f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {chance.choice(['x', '-1', '1, 2'])}\r\n\r\n".encode(),
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".encode(),
            f"GET / HTTP/1.1\r\nx: {'a' * 70_000}\r\n\r\n".encode(),
        ]
    )


KINDS = (
    _cut_json, _changed_json, _noise, _wrong_value, _wrong_message, _wrong_picture, _wrong_head, _no_http,
)  # fmt: skip
