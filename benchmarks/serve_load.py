"""Load on a server of this machine: times, errors and memory over a while, then requests that are wrong in many ways.

    python -m benchmarks.serve_load my-bundle --seconds 3600 --malformed 10000 [--clients N] [--out FILE.md]

The server is started and ended here and listens on 127.0.0.1 alone. Clients ask one question after another, a few more
of them than the batch, so that batches are full: that is the highest rate that lasts. Exit code 1 if a request failed,
memory grew, or a malformed request was answered with anything but a 4xx.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.pages import put_between_marks
from calibrate.data.samples import scene_samples
from tests.btp_export.serving.malformed import malformed

FLAT = 0.02, 16 * 2**20  # memory may grow by this share, or these bytes, from the first third to the last
PICTURES = 32


@dataclass
class Load:
    """What the clients saw. seconds: of each answered request. statuses: how often each came."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    different: int = 0  # answers that are not the first one's to the same question
    answers: dict[int, str] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes of both processes


@contextlib.contextmanager
def server(bundle: str, threads: int | None) -> Iterator[tuple[str, int]]:
    """Its address and process."""
    more = [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-m", "btp_export", "serve", bundle, "--port", "0", "--json", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        document = ""
        while not document or document.count("{") != document.count("}"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            document += line
        try:
            yield json.loads(document)["address"], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(180)
            if code != 0:
                print(f"the server ended with {code}", file=sys.stderr)


def bodies() -> list[bytes]:
    """Requests about drawn scenes, every third one streamed."""
    made = []
    for number, sample in enumerate(scene_samples(PICTURES, seed=7, split="eval").samples):
        stream = io.BytesIO()
        sample.image.save(stream, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": sample.prompt}]
        request = {"model": "demo", "messages": [{"role": "user", "content": content}], "stream": number % 3 == 0}
        made.append(json.dumps(request).encode())
    return made


def ask(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, str]:
    """Status and text of the answer."""
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        return response.status, text
    if not text.startswith("data: "):
        return 200, json.loads(text)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events):
        return 500, text
    return 200, "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def client(address: str, asked: list[bytes], end: float, load: Load, lock: threading.Lock, seed: int) -> None:
    """One question after another until the end."""
    chance = random.Random(seed)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    while time.monotonic() < end:
        number = chance.randrange(len(asked))
        start = time.monotonic()
        try:
            status, text = ask(connection, asked[number])
        except (OSError, http.client.HTTPException) as error:
            status, text = 0, str(error)
            connection.close()
        with lock:
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.monotonic() - start)
                load.different += load.answers.setdefault(number, text) != text


def resident(pid: int) -> int:
    """Bytes in memory of a process and its children."""
    total = 0
    for process in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                total += int(line.split()[1]) * 1024 if line.startswith("VmRSS") else 0
    return total


def children(pid: int) -> list[int]:
    """Of all threads of the process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def run_load(address: str, pid: int, seconds: float, clients: int) -> Load:
    """The load for so many seconds; memory is read every few of them."""
    load, lock, asked = Load(), threading.Lock(), bodies()
    begin = time.monotonic()
    threads = [
        threading.Thread(target=client, args=(address, asked, begin + seconds, load, lock, seed))
        for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(max(1.0, seconds / 360))
        load.memory.append((time.monotonic() - begin, resident(pid)))
    return load


def grown(memory: list[tuple[float, int]]) -> tuple[int, int]:
    """Median bytes in the first third after the start, and in the last third."""
    sizes = [size for _, size in memory]
    settled = sizes[len(sizes) // 10 :]
    third = max(1, len(settled) // 3)
    return int(np.median(settled[:third])), int(np.median(settled[-third:]))


def run_malformed(address: str, count: int) -> Counter[int]:
    """How often each status came."""
    good = json.loads(next(body for body in bodies() if b'"stream": false' in body))
    return Counter(malformed(address, good, number)[0] for number in range(count))


def table(rows: list[tuple[str, Any]]) -> str:
    """Two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def main() -> int:
    """Run both, print a table, and say whether all of it holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with server(given.bundle, given.threads) as (address, pid):
        load = run_load(address, pid, min(given.seconds, 4 * 3600), given.clients)
        wrong = run_malformed(address, min(given.malformed, 100_000))
        after = resident(pid)
    first, last = grown(load.memory)
    errors = sum(count for status, count in load.statuses.items() if status != 200)
    p50, p95, p99 = (np.percentile(load.seconds, share) if load.seconds else float("nan") for share in (50, 95, 99))
    rows = [
        ("duration", f"{load.memory[-1][0]:.0f} s, {given.clients} clients"),
        ("answers", f"{len(load.seconds)}, {len(load.seconds) / load.memory[-1][0]:.1f} a second"),
        ("p50, p95, p99", f"{p50 * 1000:.0f}, {p95 * 1000:.0f}, {p99 * 1000:.0f} ms"),
        ("errors", errors),
        ("answers that differ from an earlier one to the same question", load.different),
        ("memory, first and last third", f"{first / 2**20:.0f}, {last / 2**20:.0f} MiB"),
        ("malformed requests", ", ".join(f"{status}: {count}" for status, count in sorted(wrong.items()))),
        ("memory after them", f"{after / 2**20:.0f} MiB"),
    ]
    print(table(rows))
    if given.out is not None:
        put_between_marks(given.out, table(rows), title="Load on `btp-export serve`")
    flat = last - first <= max(FLAT[0] * first, FLAT[1])
    all_refused = all(400 <= status < 500 for status in wrong)
    return 0 if errors == 0 and load.different == 0 and flat and all_refused and load.seconds else 1


if __name__ == "__main__":
    raise SystemExit(main())
