"""Steps in ONNX Runtime on CUDA: the operators one by one, two threads, and the commands of btp-export.

    python -m benchmarks.gpu_check.on_ort cases|threads CASES NATIVE
    python -m benchmarks.gpu_check.on_ort demo SCRATCH NATIVE float32|float16
    python -m benchmarks.gpu_check.on_ort export-7b SCRATCH
    python -m benchmarks.gpu_check.on_ort bench-7b SCRATCH NATIVE

Every step looks for the GPU first: nothing that takes time comes before that.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check.calls import Array, Call, read_calls
from benchmarks.gpu_check.runner import MISSING, gpu_problems
from graphs.records.errors import UnavailableError

MODEL = "llava-1.5-7b"
PLAN = "btp-paper"
CUDA = "CUDAExecutionProvider"
PROFILE_EVENTS = "Node"  # category of the profile's events that are nodes


class Failed(Exception):
    """A check that did not hold, or a command that did not end with 0; `missing` where something is not there."""

    def __init__(self, problem: str, *, missing: bool = False) -> None:
        super().__init__(problem)
        self.missing = missing


def main(what: str, *arguments: str) -> int:
    steps: dict[str, Any] = {
        "cases": cases, "threads": threads, "demo": demo, "export-7b": export_7b, "bench-7b": bench_7b,
    }  # fmt: skip
    try:
        require_gpu()
        result = steps[what](*arguments)
    except UnavailableError as error:
        print(json.dumps({"missing": error.got}))
        return MISSING
    except Failed as error:
        print(json.dumps({"missing" if error.missing else "error": str(error)}))
        return MISSING if error.missing else 1
    print(json.dumps(result))
    return 0


def require_gpu() -> None:
    """Raise UnavailableError naming everything that is not there: the GPU, and ONNX Runtime's part for it."""
    import onnxruntime as ort

    problems = gpu_problems()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        problems.append(f"onnxruntime-gpu: onnxruntime {ort.__version__} here has no CUDAExecutionProvider")
    if problems:
        raise UnavailableError("; ".join(problems), "a GPU and onnxruntime-gpu")


# -- the operators -----------------------------------------------------------------------------------------------------


def cases(folder: str, native: str, provider: str = CUDA) -> dict[str, Any]:
    """Every case of the operators' own lists in a session of one node, against the carried output; where nodes ran."""
    from benchmarks.gpu_ort import CustomOps

    failed, places, done = [], Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="btp-profiles-") as profiles:
        ops = CustomOps(Path(native) / "libbtp_ort.so", provider, profiles=Path(profiles))
        for call in read_calls(Path(folder), "case"):
            problem = run_one(ops, call)
            failed += [f"{call.name}: {problem}"] if problem else []
            done += 1
        for file in Path(profiles).glob("*.json"):
            places.update(placement(file))
    if failed:
        raise Failed(f"{len(failed)} of {done} cases: {'; '.join(failed)[:2000]}")
    return {"cases": done, "placement": dict(places)}


def run_one(ops: Any, call: Call) -> str:
    """What is wrong with the output, if anything is."""
    from benchmarks.gpu_ort import ORT_ERRORS

    try:
        got = ops.run(call.op, call.inputs, call.attributes, call.wanted.dtype, call.wanted.ndim)
    except ORT_ERRORS as error:
        return " ".join(str(error).split())[:300]
    return difference(got, call)


def difference(got: Array, call: Call) -> str:
    """Empty where the bits are equal, or close enough for an operator that says how close (calls.Call.tolerance)."""
    if got.shape != call.wanted.shape:
        return f"shape {list(got.shape)}, wanted {list(call.wanted.shape)}"
    if call.tolerance is None:
        wrong = np.flatnonzero(got.reshape(-1).view(np.uint8) != call.wanted.reshape(-1).view(np.uint8))
        return f"{len(wrong)} bytes differ, the first at {wrong[0]}" if len(wrong) else ""
    wide, wanted = got.astype(np.float64), call.wanted.astype(np.float64)
    error = np.abs(wide - wanted).max(-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-300)
    return "" if (error <= call.tolerance).all() else f"a row is off by {error.max():.3g} of its norm"


def placement(profile: Path) -> Counter[str]:
    """Operator and provider of every node that a session's profile saw."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    nodes = [event["args"] for event in events if event.get("cat") == PROFILE_EVENTS and "provider" in event["args"]]
    return Counter(f"{node['op_name']} on {node['provider']}" for node in nodes)


def threads(folder: str, native: str, provider: str = CUDA, seconds: float = 5.0) -> dict[str, Any]:
    """One session run from two threads at once, each with an input of its own: whose workspace is it?"""
    from benchmarks.gpu_ort import CustomOps

    call = next(call for call in read_calls(Path(folder), "case") if "similarity" in call.inputs)
    other = {name: np.ascontiguousarray(array) for name, array in call.inputs.items()}
    other["scores"] = np.ascontiguousarray(call.inputs["scores"][:, ::-1])
    ops = CustomOps(Path(native) / "libbtp_ort.so", provider)
    session = ops.session(call.op, call.inputs, call.attributes, call.wanted.dtype, call.wanted.ndim)
    wanted = [ops.run_session(session, given, call.wanted.dtype) for given in (call.inputs, other)]
    if problem := difference(wanted[0], call):
        raise Failed(f"alone: {problem}")
    counts, wrong, end = [0, 0], [0, 0], time.monotonic() + seconds

    def work(number: int, given: dict[str, Array]) -> None:
        while time.monotonic() < end:
            got = ops.run_session(session, given, call.wanted.dtype)
            wrong[number] += not np.array_equal(got, wanted[number])
            counts[number] += 1

    both = [threading.Thread(target=work, args=(n, given)) for n, given in enumerate((call.inputs, other))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if any(wrong):
        raise Failed(f"{wrong} of {counts} runs differ from the same input alone")
    return {"case": call.name, "runs": counts}


# -- the commands ------------------------------------------------------------------------------------------------------


def demo(scratch: str, native: str, precision: str) -> dict[str, Any]:
    """The demo model: exported, verified on CUDA, and only then measured there."""
    bundle = Path(scratch) / f"demo-{precision}"
    command(native, "export", "--model", "demo", "--plan", PLAN, "--precision", precision, "--out", str(bundle))
    verified = command(native, "verify", str(bundle), "--device", "cuda")
    measured = command(native, "bench", str(bundle), "--device", "cuda", "--rounds", "20")
    kept = ("passed", "kept_agreement", "tokens_equal", "gates", "near_ties")
    return {"verify": {name: verified[name] for name in kept} | {"graphs": verified["graphs"]}, "bench": measured}


def export_7b(scratch: str) -> dict[str, Any]:
    """A 7B of made-up weights in float16, in memory: this takes the processor's time, beside the steps on the GPU."""
    start = time.monotonic()
    out = str(Path(scratch) / "7b")
    command("", "export", "--model", MODEL, "--dummy-weights", "--plan", PLAN, "--precision", "float16", "--out", out)
    return {"seconds": time.monotonic() - start}


def bench_7b(scratch: str, native: str) -> dict[str, Any]:
    """Prefill full and pruned, decode, and the most GPU memory that was taken."""
    with Memory() as memory:
        measured = command(native, "bench", str(Path(scratch) / "7b"), "--device", "cuda", "--rounds", "5")
    return {"bench": measured, "most_memory_mib": memory.most}


def command(native: str, *arguments: str) -> dict[str, Any]:
    """A command of btp-export; its document. Raises Failed with its last words."""
    print("btp-export", *arguments, file=sys.stderr, flush=True)
    scratch = os.environ.get("BTP_GPU_SCRATCH", tempfile.gettempdir())
    environment = os.environ | {"XDG_CACHE_HOME": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
    if native:
        environment["BTP_NATIVE_DIR"] = native
    words = [sys.executable, "-m", "btp_export", *arguments, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        last_lines = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        problem = f"btp-export {arguments[0]} ended with {done.returncode}: {last_lines[:600]}"
        raise Failed(problem, missing=done.returncode == 3)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class Memory:
    """Watches how much of the GPU's memory is taken, in MiB, twice a second."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not self._stop.wait(0.5):
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
            self.most = max(self.most, int(answer) if answer.isdigit() else 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
