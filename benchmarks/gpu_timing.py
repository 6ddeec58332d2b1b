"""Times the kernels with CUDA events around graph replays, beside what the GPU allows.

Limits, measured first: two launches that do nothing, latency of a dependent read from L2, of the reductions of one
selection step, and the bandwidth of a large device-to-device copy (bytes read plus bytes written). Floors, from them:
- selection: launches + steps x (read + reductions) + bytes of the similarity / bandwidth where rule 2 starts from
  nothing. Steps are the picks that wait for the one before them: diversity_quota + what the fill has to add.
- gather: bytes read plus written / bandwidth.
"""

import ctypes
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_verify import Gather, Selection, captured
from engines.native.kernels import Kernels
from graphs.ops import select_tokens
from graphs.ops.select_tokens.cases import Case, large_case
from graphs.records.errors import CheckError

STEPS = 4096
REPLAYS = 20  # between two events, so that their own time does not count


def measure(kernels: Kernels, probe: Path, *, repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Limits of this GPU and one row for each size."""
    limits = _limits(probe, repeats)
    rows = [_selection_row(kernels, case, limits, repeats) for case in _selections()]
    rows += [_gather_row(kernels, sizes, limits, repeats) for sizes in GATHERS]
    return limits, rows


def show(limits: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """The table: what, size, us, floor, how far from it, speed against the PyTorch reference on this GPU, GB/s."""
    print("limits: " + ", ".join(f"{name} {value:.1f}" for name, value in limits.items()))
    print(f"{'what':<34}{'us':>10}{'floor us':>10}{'x floor':>9}{'x PyTorch':>11}{'GB/s':>9}")
    for row in rows:
        faster = f"{row['times_faster_than_reference']:.0f}" if row["times_faster_than_reference"] else "-"
        print(
            f"{row['what']:<34}{row['us']:>10.1f}{row['floor_us']:>10.1f}{row['us'] / row['floor_us']:>9.2f}"
            f"{faster:>11}{row['gb_per_s']:>9.0f}"
        )


def replay_us(call: Any, repeats: int) -> float:
    """Median microseconds of one run, from events around REPLAYS replays of its graph."""
    graph = captured(call)
    times: list[float] = []
    for _ in range(repeats + 3):
        begin, end = _event(), _event()
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    return statistics.median(times[3:])


def eager_us(run: Any, repeats: int) -> float:
    """Median microseconds of a function that launches by itself (the PyTorch reference)."""
    times: list[float] = []
    for _ in range(repeats + 1):
        begin, end = _event(), _event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Probe:
    """A call of probe.cu in the form that captured() takes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def run(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = self.function(*self.arguments, stream)
        if status != 0:
            raise CheckError(f"a probe kernel gave CUDA error {status}")


class _Copy:
    def __init__(self, count: int) -> None:
        self.source = torch.randint(0, 255, (count,), dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)

    def run(self) -> None:
        self.target.copy_(self.source)


def _limits(probe: Path, repeats: int) -> dict[str, float]:
    library = ctypes.CDLL(str(probe))
    cells = 576 * 576  # as many as a similarity of LLaVA-1.5 holds
    order = np.random.default_rng(0).permutation(cells)
    following = np.empty(cells, np.int32)
    following[order] = np.roll(order, -1)  # one cycle through all cells
    cycle = torch.from_numpy(following).cuda()
    out = torch.empty(1024, dtype=torch.int32, device="cuda")
    chase = _Probe(library.probe_chase, ctypes.c_void_p(cycle.data_ptr()), STEPS, ctypes.c_void_p(out.data_ptr()))
    limits = {"two_launches_us": replay_us(_Probe(library.probe_launches, 2), repeats)}
    limits["l2_read_ns"] = replay_us(chase, repeats) * 1e3 / STEPS
    for threads in sorted({_threads(case.scores.shape[1]) for case in _selections()}):
        reduce = _Probe(library.probe_reduce, STEPS, threads, ctypes.c_void_p(out.data_ptr()))
        limits[f"reduce_{threads}_ns"] = replay_us(reduce, repeats) * 1e3 / STEPS
    count = 1 << 30
    limits["copy_gb_per_s"] = 2 * count / replay_us(_Copy(count), max(5, repeats // 20)) / 1e3
    return limits


def _threads(tokens: int) -> int:
    """Threads of the block that goes from pick to pick; kernel.cu, launch()."""
    per_warp = 32 * (4 if tokens <= 4096 else 8)
    return -(-tokens // per_warp) * 32


def _selections() -> list[Case]:
    released = [case for case in select_tokens.cases() if case.name.startswith("released")]
    first = next(case for case in released if case.name == "released-1")
    assert first.similarity is not None
    batch = replace(
        first,
        name="released-1-batch-8",
        scores=np.tile(first.scores, (8, 1)),
        similarity=np.tile(first.similarity, (8, 1, 1)),
    )
    large = large_case()
    assert large.similarity is not None
    half = replace(large, name="large-float16", similarity=large.similarity.astype(np.float16))
    return [*released, batch, large, half]


def _steps(case: Case) -> int:
    """Picks that wait for the one before: diversity_quota, and what rule 4 adds; of the row that needs most."""
    if case.similarity is None:
        return 0
    attributes, tokens = case.attributes, case.scores.shape[1]
    steps = attributes["diversity_quota"]
    most = 0
    for row in range(len(case.scores)):
        scores = torch.from_numpy(case.scores[row : row + 1])
        similarity = torch.from_numpy(case.similarity[row : row + 1])
        base: set[int] = set() if case.seeds is None else {int(seed) for seed in case.seeds}
        none = {"attention_quota": 0, "diversity_quota": 0, "pool": tokens, "boundary": attributes["boundary"]}
        if attributes["attention_quota"] > 0:
            only = none | {"attention_quota": attributes["attention_quota"], "pool": attributes["pool"]}
            base |= set(select_tokens.reference(scores, keep=attributes["attention_quota"], **only)[0].tolist())
        if steps > 0:
            diverse = select_tokens.reference(scores, similarity, keep=steps, **none)
            base |= set(diverse[0].tolist())
        most = max(most, attributes["keep"] - len(base))
    return steps + max(0, most)


def _selection_row(kernels: Kernels, case: Case, limits: dict[str, float], repeats: int) -> dict[str, Any]:
    call = Selection(kernels, case, "cuda")
    us = replay_us(call, repeats)
    reference_us = eager_us(call.reference, 5)
    steps, tokens = _steps(case), case.scores.shape[1]
    step_ns = limits["l2_read_ns"] + limits[f"reduce_{_threads(tokens)}_ns"]
    whole = case.similarity is not None and case.attributes["diversity_quota"] > 0
    moved = case.similarity.nbytes if whole and case.similarity is not None else 0
    floor = limits["two_launches_us"] + steps * step_ns / 1e3 + moved / limits["copy_gb_per_s"] / 1e3
    return {
        "what": f"select {case.name} {tokens}->{case.attributes['keep']}",
        "batch": len(case.scores),
        "steps": steps,
        "us": us,
        "floor_us": floor,
        "reference_us": reference_us,
        "times_faster_than_reference": reference_us / us,
        "gb_per_s": moved / us / 1e3,
    }


# (B, S, hidden, start, count, keep, type): LLaVA-1.5 7B, cos of the same, LLaVA-1.6 7B, and one larger than any L2.
GATHERS = (
    (1, 640, 4096, 35, 576, 288, torch.float16),
    (1, 640, 64, 35, 576, 288, torch.float32),
    (1, 2944, 4096, 35, 2880, 1440, torch.float16),
    (64, 2944, 4096, 35, 2880, 1440, torch.float16),
)


def _gather_row(kernels: Kernels, sizes: tuple[Any, ...], limits: dict[str, float], repeats: int) -> dict[str, Any]:
    batch, rows, hidden, start, count, keep, dtype = sizes
    tokens = torch.randn(batch, rows, hidden, device="cuda").to(dtype)
    indices = torch.stack([torch.randperm(count)[:keep].sort().values for _ in range(batch)]).int().cuda()
    call = Gather(kernels, tokens, indices, start=start, count=count)
    us = replay_us(call, max(5, repeats // 4))
    reference_us = eager_us(call.reference, 10)
    moved = 2 * call.output.numel() * call.output.element_size()
    return {
        "what": f"gather {batch}x{rows}x{hidden} {str(dtype).removeprefix('torch.')}",
        "us": us,
        "floor_us": moved / limits["copy_gb_per_s"] / 1e3,
        "reference_us": reference_us,
        "times_faster_than_reference": reference_us / us,
        "gb_per_s": moved / us / 1e3,
    }
