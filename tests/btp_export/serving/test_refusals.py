"""What a server refuses: every wrong request with a 4xx in OpenAI's form, and it goes on answering."""

import base64
import contextlib
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.btp_export.serving.conftest import KEY, LIMITS
from tests.btp_export.serving.malformed import malformed
from tests.btp_export.serving.running import Reply, Server, data_uri, question, wait_until

CHAT = "/v1/chat/completions"


def refused(reply: Reply, status: int, words: str = "") -> dict[str, Any]:
    """The error of a reply, which is in OpenAI's form and tells nothing of this machine."""
    assert reply.status == status, reply.text
    assert set(reply.document) == {"error"} and set(reply.document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = reply.document["error"]
    assert words in error["message"], error
    assert not re.search(r"Traceback|File \"|\.py|/home|/root|/tmp|/work|/usr", reply.text), reply.text
    return error


def request(square: Image.Image, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": question(square, "where is it ?"), "max_tokens": 1} | fields


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "greater than"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 13}, "max_tokens", "1 to 12"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_completion_tokens": 2}, "max_tokens", "one of them"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"n": 2}, "n", "less than or equal to 1"),
    ({"n": True}, "n", "valid integer"),
    ({"logprobs": True}, "logprobs", "should be False"),
    ({"tools": [{"type": "function"}]}, "tools", "at most 0"),
    ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
    ({"response_format": {"type": "json_object"}}, "response_format", "'text'"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": [""]}, "stop", "at least 1 character"),
    ({"best_of": 2}, "best_of", "not a field"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": "where is it ?"}]}, "messages.0", "0 pictures"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content", "'image_url'"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields(serving: Server, square: Image.Image, fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(serving.ask(request(square, **fields)), 400, words)
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"


def test_wrong_conversations(serving: Server, square: Image.Image) -> None:
    first = question(square, "where is it ?")[0]
    says = {role: {"role": role, "content": "so"} for role in ("user", "assistant", "system")}
    for messages, words in (
        ([first, says["assistant"]], "ends here"),
        ([first, says["user"]], "role user"),
        ([says["assistant"], first], "role assistant"),
        ([first, says["assistant"], says["system"]], "role system"),
        ([first, says["assistant"], first], "1 picture in this message"),
        ([{"role": "user", "content": first["content"][:1] + first["content"]}], "2 pictures"),
        ([{"role": "user", "content": first["content"][:1]}], "without text"),
        (question(square, "what is <image> ?"), "stands for a picture"),
        ([{"role": "system", "content": "a system message"}, first], "system message"),
        (question(square, "where " * 49), "at most 48"),
    ):
        assert refused(serving.ask(request(square, messages=messages)), 400, words)["type"] == "invalid_request_error"


def test_wrong_pictures(serving: Server, square: Image.Image) -> None:
    noise = io.BytesIO()
    square.save(noise, "PNG")
    half = base64.b64encode(noise.getvalue()[: len(noise.getvalue()) // 2]).decode()
    for picture, words in (
        (data_uri(Image.new("RGB", (30, 90))), "wanted: what the bundle is built for"),
        (data_uri(Image.new("1", (1001, 1000))), "at most 1 million pixels"),
        (f"data:image/png;base64,{half}", "cannot read the picture"),
        ("data:image/png;base64,", "not a picture"),
        ("data:image/svg+xml,<svg/>", "not a picture"),
        ("http://localhost:1/", "an address of the web"),
        ("file:///etc/hostname", "a file; wanted"),
    ):
        error = refused(serving.ask(request(square, messages=question(picture, "where ?"))), 400, words)
        assert error["type"] == "invalid_request_error"
    too_large = "data:image/png;base64," + "A" * (LIMITS.picture * 4 // 3 + 8)
    refused(serving.ask(request(square, messages=question(too_large, "where ?"))), 400, "more than 200000 bytes")


def test_bodies_paths_and_headers(serving: Server, square: Image.Image) -> None:
    refused(serving.ask(b"{"), 400, "the body is no JSON")
    refused(serving.ask(b"\xff\xfe"), 400)
    refused(serving.ask(b"[" * 100_000), 400)
    refused(serving.ask(b"null"), 400)
    refused(serving.ask(b" " * (LIMITS.body + 1)), 413, "more than 400000 bytes")
    refused(serving.ask(request(square), **{"content-type": "text/plain"}), 415)
    refused(serving.ask(request(square), **{"content-encoding": "gzip"}), 415)
    refused(serving.ask(request(square, model="other")), 404, "no model 'other'")
    refused(serving.ask({}, path="/v1/completions"), 404)
    refused(serving.get(CHAT), 405)
    refused(serving.get("/../../etc/passwd"), 404)
    refused(serving.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)
    refused(serving.get("/health", host="pictures.example"), 421)
    assert serving.get("/health", host="localhost:80").status == 200


def test_the_key(serving: Server, square: Image.Image) -> None:
    for path in ("/v1/models", "/metrics"):
        error = refused(serving.get(path, which=1), 401)
        assert error["code"] == "invalid_api_key"
    for given in ("", "Bearer", "Bearer ", f"Bearer {KEY}x", f"bearer {KEY}", KEY, "Bearer \xff"):
        refused(serving.ask(request(square), which=1, authorization=given), 401)
    assert serving.get("/v1/models", which=1, authorization=f"Bearer {KEY}").status == 200
    assert serving.get("/health", which=1).status == 200


@contextlib.contextmanager
def held(serving: Server) -> Iterator[None]:
    """The models are busy with somebody else's work: what is asked now waits."""
    with contextlib.ExitStack() as stack:
        for model in serving.service._models.values():
            stack.enter_context(model._lock)
        yield


def sent(serving: Server, body: dict[str, Any]) -> socket.socket:
    """A request on its way, nobody waits for its answer yet."""
    data = json.dumps(body).encode()
    where = urlsplit(serving.addresses[0])
    connection = socket.create_connection((str(where.hostname), int(where.port or 0)))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_and_clients_that_go_away(serving: Server, square: Image.Image, stream: bool) -> None:
    """Nine places: a batch of three that runs, and six that wait."""
    service, gone = serving.service, serving.number("btp_requests_gone_total")
    under_way = service.numbers["under_way"][1]
    with held(serving):
        connections = [sent(serving, request(square, stream=stream)) for _ in range(9)]
        wait_until(lambda: under_way() == 9)
        reply = serving.ask(request(square))
        error = refused(reply, 429, "too many requests")
        assert error["type"] == "rate_limit_error" and int(reply.headers["retry-after"]) >= 1
        connections.pop().close()
        wait_until(lambda: under_way() == 8)
        connections.append(sent(serving, request(square)))  # the place is free
        wait_until(lambda: under_way() == 9)
        for connection in connections:
            connection.close()
        wait_until(lambda: under_way() == 0 and len(service._gathering) == 0)
    wait_until(lambda: serving.number("btp_requests_gone_total") == gone + 10)
    assert serving.ask(request(square)).status == 200


def test_an_answer_that_takes_too_long(serving: Server, square: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    slow = dataclasses.replace(serving.service.serving, limits=dataclasses.replace(LIMITS, seconds=0.3))
    monkeypatch.setattr(serving.service, "serving", slow)
    with held(serving):
        error = refused(serving.ask(request(square)), 504, "no answer within 0.3 s")
    assert error["code"] == "timeout"


def test_a_body_that_does_not_come(serving: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    slow = dataclasses.replace(serving.service.serving, limits=dataclasses.replace(LIMITS, seconds=0.3))
    monkeypatch.setattr(serving.service, "serving", slow)
    where = urlsplit(serving.addresses[0])
    with socket.create_connection((str(where.hostname), int(where.port or 0))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 10"
        connection.sendall(f"{head}\r\n\r\n{{".encode())
        connection.settimeout(10)
        assert b" 408 " in connection.recv(10_000).partition(b"\r\n")[0]


def test_malformed_requests_are_all_4xx(serving: Server, square: Image.Image) -> None:
    start, seen = time.monotonic(), dict[int, int]()
    for number in range(160):
        status, text = malformed(serving.addresses[0], request(square), number)
        seen[status] = seen.get(status, 0) + 1
        assert 400 <= status < 500, (number, status, text)
        assert not re.search(r"Traceback|File \"|/home|/root|/tmp|/work|/usr", text), text
    assert len(seen) >= 5 and time.monotonic() - start < 120, seen
    assert serving.ask(request(square)).status == 200


def test_a_defect_is_logged_and_not_told(
    serving: Server, square: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> bytes:
        raise RuntimeError("the secret is in /etc/passwd")

    monkeypatch.setattr("btp_export.serving.service.picture_bytes", broken)
    error = refused(serving.ask(request(square)), 500)
    assert error["type"] == "server_error" and "/etc/passwd" in capsys.readouterr().err
