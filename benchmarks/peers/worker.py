"""A program that computes when it is told to: lines of JSON come in, lines of JSON go out."""

import base64
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.memory import memory
from benchmarks.peers import Given, Opened, Program


def main() -> None:
    """Open what the first line says, then do what each further line says."""
    name, out = sys.argv[1], os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    program: Program = importlib.import_module(f"benchmarks.peers.{name}").PROGRAM
    given = Given(**json.loads(sys.stdin.readline()))
    start = time.perf_counter()
    opened = program.open(given)
    out.write(json.dumps({"opened": time.perf_counter() - start}) + "\n")
    for line in sys.stdin:
        wanted = json.loads(line)
        out.write(json.dumps(WORK[wanted.pop("do")](opened, **wanted)) + "\n")


def prefill(opened: Opened) -> dict[str, Any]:
    """Milliseconds, and the logits as bytes of float32."""
    start = time.perf_counter()
    logits = np.asarray(opened.prefill(), np.float32)
    spent = (time.perf_counter() - start) * 1000
    return {"ms": spent, "shape": logits.shape, "logits": base64.b64encode(logits.tobytes()).decode()}


def steps(opened: Opened, ids: list[list[int]]) -> dict[str, Any]:
    """Milliseconds of each step, and the last one's logits."""
    times = []
    for row in ids:
        start = time.perf_counter()
        logits = opened.step(row)
        times.append((time.perf_counter() - start) * 1000)
    array = np.asarray(logits, np.float32)
    return {"ms": times, "shape": array.shape, "logits": base64.b64encode(array.tobytes()).decode()}


def used(_: Opened) -> dict[str, Any]:
    """MiB of this process."""
    return memory()


WORK: dict[str, Callable[..., dict[str, Any]]] = {"prefill": prefill, "steps": steps, "memory": used}

if __name__ == "__main__":
    main()
