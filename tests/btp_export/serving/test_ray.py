"""A bundle as a Ray Serve application, on real Ray with replicas on CPUs: load, a killed replica, another bundle."""

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export.running.runtime import BundleModel
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from tests.btp_export.serving.running import JSON, Reply, ask, question, wait_until

PROMPT = "what color is the circle ?"
OPTIONS = {"name": "tiny", "threads": 1, "cpus": 0.5, "queue": 30}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of one machine with the proxy at a free port."""
    ray = pytest.importorskip("ray")
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")  # a short one: names of sockets are limited
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_LOG_TO_STDERR", "0")
        ray.init(
            num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=folder,
            _node_ip_address="127.0.0.1", log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()  # ends Serve's processes too; serve.shutdown() would take seconds to end them one by one
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running(address: str, served_bundle: Bundle) -> str:
    from ray import serve

    from btp_export.serving import ray_app

    serve.run(ray_app(bundle=served_bundle.root, replicas=2, **OPTIONS), name="bundle")
    return address


class Load:
    """Whole requests from two clients and streamed ones from a third until it is stopped.

    Each client pauses between them, which leaves a little room for the replicas that start meanwhile.
    """

    def __init__(self, address: str, picture: Image.Image, pause: float = 0.05) -> None:
        self._address, self._pause, self._stop = address, pause, threading.Event()
        self._body = {"model": "tiny", "messages": question(picture, PROMPT)}
        self.whole, self.streamed = list[Reply](), list[Reply]()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        while not self._stop.wait(self._pause):
            streamed = number == 0
            body = json.dumps(self._body | {"stream": streamed}).encode()
            reply = ask(self._address, "POST", "/v1/chat/completions", body, JSON)
            (self.streamed if streamed else self.whole).append(reply)


def test_answers(running: str, alone: dict[str, BundleModel], square: Image.Image) -> None:
    [wanted] = next(iter(alone.values())).generate(square, PROMPT)
    body = {"model": "tiny", "messages": question(square, PROMPT)}
    reply = ask(running, "POST", "/v1/chat/completions", json.dumps(body).encode(), JSON)
    assert reply.status == 200 and reply.document["choices"][0]["message"]["content"] == wanted.text
    streamed = ask(running, "POST", "/v1/chat/completions", json.dumps(body | {"stream": True}).encode(), JSON)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == wanted.text
    for wrong, status in (({"temperature": 9}, 400), ({"model": "other"}, 404), ({"max_tokens": 13}, 400)):
        reply = ask(running, "POST", "/v1/chat/completions", json.dumps(body | wrong).encode(), JSON)
        assert (reply.status, set(reply.document)) == (status, {"error"})
    assert ask(running, "GET", "/health", None, {}).status == 200
    assert "btp_tokens_total" in ask(running, "GET", "/metrics", None, {}).text
    [model] = ask(running, "GET", "/v1/models", None, {}).document["data"]
    assert [profile["batch"] for profile in model["profiles"]] == [3, 3]


def test_a_replica_that_is_killed_loses_nothing_that_was_not_streaming(running: str, square: Image.Image) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("Replica", "bundle")
    before = {handle.process_id.remote().result() for _ in range(20)}
    assert len(before) == 2
    with Load(running, square) as load:
        wait_until(lambda: len(load.whole) >= 6, 120)
        os.kill(min(before), signal.SIGKILL)
        at = len(load.whole)
        wait_until(lambda: len(load.whole) >= at + 12, 120)
    assert {reply.status for reply in load.whole} == {200}
    assert len({reply.document["choices"][0]["message"]["content"] for reply in load.whole}) == 1
    assert all(reply.status in (200, 503) for reply in load.streamed)


def test_another_bundle_takes_over_without_a_gap(
    running: str, served_bundle: Bundle, square: Image.Image, tmp_path: Path
) -> None:
    from ray import serve

    from btp_export.serving import ray_app

    other = derive(served_bundle, served_bundle.plan.without_stages(), tmp_path / "other")
    with Load(running, square, pause=0.25) as load:
        wait_until(lambda: len(load.whole) >= 3, 120)
        serve.run(ray_app(bundle=other.root, replicas=1, max_replicas=2, **OPTIONS), name="bundle")
        at = len(load.whole)
        wait_until(lambda: len(load.whole) >= at + 4, 120)
    assert {reply.status for reply in [*load.whole, *load.streamed]} == {200}
    kept = [reply.document["usage"]["prompt_tokens_details"]["tokens_kept"] for reply in load.whole]
    assert kept[0] == [stage.keep for stage in served_bundle.plan.stages] and kept[-1] == []


def test_wrong_options(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from btp_export.serving import ray_app

    with pytest.raises(InputError, match="nowhere"):
        ray_app(bundle=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="replica"):
        ray_app({"bundle": "x", "replicas": "none"})
