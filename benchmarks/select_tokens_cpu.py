"""Times of BtpSelectTokens on the CPU, one thread: torch reference, portable bodies and custom op in ONNX Runtime.

    python -m benchmarks.select_tokens_cpu

Each form is compared with the reference before it is timed. Prints median and best of the runs and how busy the machine
is; passes no judgement.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import FunctionProto, TensorProto, helper

from benchmarks.findings import NotHere, Row, Wishes, skipped
from engines.native.libraries import custom_ops, how_to_build
from graphs.ops import DOMAIN, VERSION, select_tokens
from graphs.ops.select_tokens import Case
from graphs.ops.select_tokens.cases import budget_cases, large_case

OPSET = 23
AIM_MS = 5.0  # for 576 -> 127
ONCE, FEW, MANY = 1, 3, 50  # runs: of what takes a minute, of what takes seconds, and of what takes less


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """The native operator at the demo's and LLaVA-1.5's 576 tokens, and at 2,880; `quick`: once, at 576."""
    if custom_ops() is None:
        raise NotHere(how_to_build("btp_ort"))
    cases = [case for case in budget_cases() if not wishes.quick or case.scores.shape[1] < 1000]
    for case in cases[: 1 if wishes.quick else None]:
        session = session_of(case, None)
        if not np.array_equal(session.run(None, case.inputs)[0], reference_of(case)):
            yield skipped(case.name, "the indices are not the reference's")
            continue
        spent = times(lambda: session.run(None, case.inputs), ONCE if wishes.quick else MANY)  # noqa: B023
        what = f"coverage, {case.scores.shape[1]} -> {case.attributes['keep']} tokens"
        limit, why = (AIM_MS, "the aim at 576 tokens") if case.scores.shape[1] < 1000 else (None, "")
        yield Row(what, statistics.median(spent), "ms", limit, why, detail=f"best {min(spent):.2f} ms")


def main() -> None:
    torch.set_num_threads(1)
    released = next(case for case in select_tokens.cases() if case.name == "released-1")
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} (1 minute), opset {OPSET}")
    for case in (released, large_case(), *budget_cases()):
        measure(case)
    print(f"load {os.getloadavg()[0]:.1f}")


def measure(case: Case) -> None:
    """Compare and time the forms on one case."""
    tensors, wanted = tensors_of(case), reference_of(case)
    large = case.scores.shape[1] > 1000
    rule = {name: case.attributes[name] for name in ("diversity_rule", "weighted") if name in case.attributes}
    print(f"{case.name}: {case.scores.shape[1]} -> {case.attributes['keep']}")
    show("reference (torch)", lambda: select_tokens.reference(*tensors, **case.attributes), FEW if large else MANY)
    exact = select_tokens.body(OPSET, similarity=True, seeds=case.seeds is not None, **rule)
    forms: list[tuple[str, FunctionProto | None]] = [
        ("body, generic (ONNX Runtime)", select_tokens.function(OPSET)),
        ("body, exact (ONNX Runtime)", exact),
        ("custom op (ONNX Runtime)", None),
    ]
    for label, body in forms:
        if body is None and custom_ops() is None:
            print(f"  {label:<30} not built: {how_to_build('btp_ort')}")
            continue
        session = session_of(case, body)
        if not np.array_equal(session.run(None, case.inputs)[0], wanted):
            raise SystemExit(f"{label} does not give the reference's indices")
        slow = ONCE if rule else FEW
        show(label, lambda: session.run(None, case.inputs), slow if large and body else MANY)  # noqa: B023


def tensors_of(case: Case) -> list[torch.Tensor | None]:
    """Scores, similarity and seeds."""
    arrays = (case.scores, case.similarity, case.seeds)
    return [None if array is None else torch.from_numpy(array) for array in arrays]


def reference_of(case: Case) -> np.ndarray:
    """The indices by definition."""
    indices: np.ndarray = select_tokens.reference(*tensors_of(case), **case.attributes).numpy()
    return indices


def session_of(case: Case, body: FunctionProto | None) -> onnxruntime.InferenceSession:
    """A session of one node; without a body the native library (docs/native.md) runs it."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in case.inputs.items()
    ]
    output = helper.make_tensor_value_info("indices", TensorProto.INT32, (1, case.attributes["keep"]))
    node = helper.make_node(select_tokens.NAME, list(case.inputs), ["indices"], domain=DOMAIN, **case.attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "selection", values, [output])
    model = helper.make_model(graph, opset_imports=opsets, functions=[body] if body else [], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if body is None:
        options.register_custom_ops_library(str(custom_ops()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def show(label: str, run: Callable[[], Any], runs: int) -> None:
    spent = times(run, runs)
    print(f"  {label:<30} median {statistics.median(spent):8.2f} ms   best {min(spent):8.2f} ms")


def times(run: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each run."""
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


if __name__ == "__main__":
    main()
