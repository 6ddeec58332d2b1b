"""The command: it says where it answers, finishes what runs when it is told to end, and refuses wrong options."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export import cli
from btp_export.commands.serve import KEY_VARIABLE
from graphs.files.bundle import Bundle
from tests.btp_export.serving.running import JSON, ask, question


@contextmanager
def served(bundle: Bundle, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and the document that it prints once it answers."""
    command = [sys.executable, "-m", "btp_export", "serve", str(bundle.root), "--port", "0", "--threads", "1", "--json"]
    with subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdout is not None
        lines = ""
        while not lines.endswith("}\n") or lines.count("{") != lines.count("}"):
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            lines += line
        try:
            yield process, json.loads(lines)
        finally:
            process.kill()


def test_sigterm_finishes_what_runs(served_bundle: Bundle, square: Image.Image) -> None:
    """Two requests wait for a third that never comes; a signal comes instead, and both get their answer."""
    more = ("--name", "mine", "--max-wait", "60000", "--profile", served_bundle.manifest.profiles[0].name)
    with served(served_bundle, *more) as (process, document):
        assert document["format"] == "btp-serve/1" and document["model"] == "mine" and not document["api_key"]
        assert [profile["batch"] for profile in document["profiles"]] == [3]
        body = json.dumps({"model": "mine", "messages": question(square, "where is it ?")}).encode()
        replies: list[Any] = []
        address = document["address"]
        threads = [
            threading.Thread(
                target=lambda: replies.append(ask(address, "POST", "/v1/chat/completions", body, JSON)), daemon=True
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while "btp_queue 2.0" not in ask(address, "GET", "/metrics", None, {}).text:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert [reply.status for reply in replies] == [200, 200]
        assert replies[0].document["choices"] == replies[1].document["choices"]
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and errors == "stopped\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["serve", *arguments])
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return code, err


def test_wrong_options(
    served_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(served_bundle.root)
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (("--port", port), f"cannot listen on 127.0.0.1 port {port}"),
            (("--host", "203.0.113.1", "--port", "0"), "cannot listen on 203.0.113.1"),
            (("--port", "70000"), "--port 70000"),
            (("--allow-private",), "--allow-private without --allow-http"),
            (("--files", str(tmp_path / "none")), "is no folder"),
            (("--api-key-file", str(tmp_path / "empty")), "holds no key"),
            (("--api-key-file", str(tmp_path / "none")), "No such file"),
            (("--profile", "other", "--port", "0"), "other"),
            (("--target", "h100", "--port", "0"), "no engines"),
        ):
            code, errors = run(capsys, root, *options)
            assert code == 2 and words in errors, errors
    assert run(capsys, str(tmp_path / "none"))[0] == 2
    monkeypatch.setenv(KEY_VARIABLE, " ")
    assert "holds no key" in run(capsys, root)[1]


def test_without_the_extra(tmp_path: Path, served_bundle: Bundle) -> None:
    """A module of the name that cannot be imported stands before the real one."""
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\", name='fastapi')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}
    done = subprocess.run(
        [sys.executable, "-m", "btp_export", "serve", str(served_bundle.root)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "pip install 'btp-export[serve]'" in done.stderr
