"""Starting a program of benchmarks/peers, and letting several work in turns."""

import base64
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.findings import NotHere
from benchmarks.peers import Array, Given, Program

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A program that ended; the text is the last of what it wrote."""


class Process:
    """One program with one open model. opened_s: seconds that opening took, imports not counted."""

    def __init__(self, name: str, given: Given) -> None:
        program: Program = import_module(f"benchmarks.peers.{name}").PROGRAM
        self.label = program.label
        if importlib.util.find_spec(program.module) is None:
            raise NotHere(f"{program.module} is not installed")
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (open as long as the process)
        command = [sys.executable, "-m", "benchmarks.peers.worker", name]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.opened_s: float = self._ask(asdict(given))["opened"]

    def prefill(self) -> tuple[float, Array]:
        """Milliseconds, and logits [B, vocab]."""
        answer = self._ask({"do": "prefill"})
        return answer["ms"], _logits(answer)

    def steps(self, ids: Sequence[Sequence[int]]) -> tuple[list[float], Array]:
        """Milliseconds of each step, and the last one's logits [B, vocab]. ids: [steps][B]."""
        answer = self._ask({"do": "steps", "ids": ids})
        return answer["ms"], _logits(answer)

    def memory(self) -> dict[str, float]:
        """MiB, see benchmarks/memory.py."""
        return self._ask({"do": "memory"})

    def close(self) -> None:
        """End it, and wait until its memory is free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _ask(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(wanted) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it says why below
        line = process.stdout.readline()
        if not line:
            process.wait()
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise Failed(f"{self.label} ended: {' '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _logits(answer: Mapping[str, Any]) -> Array:
    return np.frombuffer(base64.b64decode(answer["logits"]), np.float32).reshape(answer["shape"])


@contextmanager
def started(*programs: tuple[str, Given]) -> Iterator[list[Process]]:
    """All of them at once, ended at the end."""
    running: list[Process] = []
    try:
        for name, given in programs:
            running.append(Process(name, given))
        yield running
    finally:
        for process in running:
            process.close()


def prefills_in_turns(running: Sequence[Process], rounds: int, *, uncounted: int = 1) -> list[list[float]]:
    """Milliseconds of each program's prefills, after those that are not counted: A B, B A, A B, ..."""
    times: list[list[float]] = [[] for _ in running]
    for number in range(-uncounted, rounds):
        for place in _order(len(running), number):
            spent, _ = running[place].prefill()
            if number >= 0:
                times[place].append(spent)
    return times


def steps_in_turns(
    running: Sequence[Process], rounds: int, steps: int, *, vocab: int, batch: int = 1
) -> list[list[float]]:
    """The median milliseconds of each round's steps, of each program; the same tokens for all.

    Contexts grow by `steps` a round, the first of which is not counted.
    """
    rng = np.random.default_rng(1)
    times: list[list[float]] = [[] for _ in running]
    for number in range(-1, rounds):
        ids = rng.integers(5, vocab, (steps, batch)).tolist()
        for place in _order(len(running), number):
            spent, _ = running[place].steps(ids)
            if number >= 0:
                times[place].append(median(spent))
    return times


def _order(count: int, number: int) -> Sequence[int]:
    """Turned around every other round, so that a machine that gets slower favours nobody."""
    return range(count) if number % 2 else range(count - 1, -1, -1)


def same(ours: Array, other: Array, *, least: float = 0.9999) -> None:
    """Raise Failed unless both are the same logits within what float32, or rows of int8, make of them."""
    a, b = ours.ravel().astype(np.float64), other.ravel().astype(np.float64)
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    if not cosine >= least:
        raise Failed(f"other logits (cosine {cosine:.6f}): not the same model, so its time is not compared")
