"""Compares the kernels with the reference, call by call; works on any device whose addresses the kernels can use."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.native.kernels import Kernels
from graphs.ops import gather_tokens, select_tokens
from graphs.ops.common.trt_python import Tensor as Described
from graphs.ops.gather_tokens.cases import Case as GatherCase
from graphs.ops.select_tokens.cases import Case, large_case
from graphs.records.errors import CheckError

REPLAYS = 3  # of every call's graph: an answer that changes from run to run is a race


def describe(tensor: Tensor) -> Described:
    """Address, shape and type of a dense tensor, as the kernels' interface takes them."""
    assert tensor.is_contiguous()
    return Described(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


class Selection:
    """One BtpSelectTokens call with its tensors on a device; run() launches it on the current stream."""

    def __init__(self, kernels: Kernels, case: Case, device: str) -> None:
        self.kernels, self.attributes, self.device = kernels, case.attributes, device
        self.inputs = {name: torch.from_numpy(array.copy()).to(device) for name, array in case.inputs.items()}
        self.described = [describe(tensor) for tensor in self.inputs.values()]
        workspace = kernels.workspace(self.described, **case.attributes)
        self.workspace = torch.empty(max(workspace, 16), dtype=torch.uint8, device=device)
        self.output = torch.empty(len(case.scores), case.attributes["keep"], dtype=torch.int32, device=device)

    def run(self) -> None:
        stream = stream_of(self.device)
        self.kernels.select_tokens(
            self.described, self.output.data_ptr(), self.workspace.data_ptr(), stream=stream, **self.attributes
        )

    def reference(self) -> Tensor:
        """The reference on the same tensors, where they are."""
        given = self.inputs
        return select_tokens.reference(given["scores"], given.get("similarity"), given.get("seeds"), **self.attributes)


class Gather:
    """One BtpGatherTokens call with its tensors on a device; run() launches it on the current stream."""

    def __init__(self, kernels: Kernels, tokens: Tensor, indices: Tensor, *, start: int, count: int) -> None:
        self.kernels, self.start, self.count, self.device = kernels, start, count, tokens.device.type
        self.tokens, self.indices = tokens, indices
        rows = tokens.shape[1] - count + indices.shape[1]
        self.output = torch.empty(tokens.shape[0], rows, *tokens.shape[2:], dtype=tokens.dtype, device=tokens.device)

    def run(self) -> None:
        inputs = [describe(self.tokens), describe(self.indices)]
        stream = stream_of(self.device)
        self.kernels.gather_tokens(inputs, self.output.data_ptr(), stream=stream, start=self.start, count=self.count)

    def reference(self) -> Tensor:
        return gather_tokens.reference(self.tokens, self.indices, start=self.start, count=self.count)


def stream_of(device: str) -> int:
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else 0


def verify(kernels: Kernels, device: str, *, drawn: int, large: bool = True) -> int:
    """Number of calls that equal the reference. Raises CheckError at the first that does not."""
    checked = 0
    for case in [*select_tokens.cases(), *(large_cases() if large else ()), *drawn_cases(drawn)]:
        call = Selection(kernels, case, device)
        wanted = select_tokens.reference(
            torch.from_numpy(case.scores),
            None if case.similarity is None else torch.from_numpy(case.similarity),
            None if case.seeds is None else torch.from_numpy(case.seeds),
            **case.attributes,
        )
        checked += _compare(call, wanted, f"BtpSelectTokens, case {case.name}")
    for gather in gather_tokens.cases():
        start, count = gather.attributes["start"], gather.attributes["count"]
        rows = Gather(kernels, *_tensors(gather, device), start=start, count=count)
        checked += _compare(rows, rows.reference().cpu(), f"BtpGatherTokens, case {gather.name}")
    return checked


def _compare(call: Selection | Gather, wanted: Tensor, name: str) -> int:
    """One launch, and on CUDA more from a captured graph; the output is poisoned before each."""
    run = call.run
    ways = ["launched", *["replayed"] * REPLAYS] if call.device == "cuda" else ["launched"]
    for way in ways:
        if way == "replayed" and run == call.run:
            run = captured(call).replay
        _poison(call.output)
        run()
        if call.device == "cuda":
            torch.cuda.synchronize()
        if not torch.equal(_bits(call.output.cpu()), _bits(wanted)):
            got = f"{name}, {way}: the kernel differs from the reference"
            raise CheckError(got, "equal bits", "do not use these kernels; report this GPU and case")
    return len(ways)


def captured(call: Any) -> Any:
    """A CUDA graph of one run; raises where the kernels do what a capture forbids (allocation, synchronisation)."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    return graph


def _poison(tensor: Tensor) -> None:
    _bits(tensor).fill_(-7)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _tensors(case: GatherCase, device: str) -> tuple[Tensor, Tensor]:
    tokens = case.tokens
    if tokens.dtype.name == "bfloat16":
        return torch.from_numpy(tokens.view(np.int16).copy()).view(torch.bfloat16).to(device), _indices(case, device)
    return torch.from_numpy(tokens.copy()).to(device), _indices(case, device)


def _indices(case: GatherCase, device: str) -> Tensor:
    return torch.from_numpy(case.indices.copy()).to(device)


def large_cases() -> Iterator[Case]:
    """The large benchmark case, and sizes for every form of the kernel, up to the largest that it takes."""
    yield large_case()
    random = np.random.default_rng(21)
    for tokens in (1025, 3840, 4097, 8192):
        features = random.standard_normal((1, tokens, 16)).astype(np.float32)
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        attributes = {"keep": tokens // 4, "attention_quota": tokens // 16, "diversity_quota": tokens // 16}
        attributes |= {"pool": tokens // 8, "boundary": tokens // 2}
        scores = random.integers(0, tokens // 2, (1, tokens)).astype(np.float32)
        seeds = random.integers(0, tokens, tokens // 8).astype(np.int32)
        yield Case(f"large-{tokens}", scores, features @ features.transpose(0, 2, 1), seeds, attributes)


def drawn_cases(count: int) -> Iterator[Case]:
    """Random legal calls of all sizes up to V 700, every third with ties, every fifth with NaN and infinities."""
    random = np.random.default_rng(20)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)
    for number in range(count):
        tokens, batch = int(random.integers(1, 700)), int(random.integers(1, 4))
        attention, diversity, seeds = (int(random.integers(0, tokens + 1)) for _ in range(3))
        scores = random.standard_normal((batch, tokens)).astype(np.float32)
        similarity = np.tanh(random.standard_normal((batch, tokens, tokens))).astype(np.float32)
        if number % 3 == 0:
            scores, similarity = np.round(scores), np.round(similarity * np.float32(4)) / np.float32(4)
        if number % 5 == 0:
            similarity.reshape(-1)[random.integers(0, similarity.size, 20)] = random.choice(odd, 20)
            scores.reshape(-1)[random.integers(0, scores.size, 5)] = random.choice(odd, 5)
        attributes = {
            "keep": int(random.integers(1, tokens + 1)),
            "attention_quota": attention,
            "diversity_quota": diversity,
            "pool": attention + int(random.integers(0, tokens + 1)),
            "boundary": int(random.integers(0, tokens + 1)),
        }
        if number % 7 == 6:
            yield Case(f"drawn-{number}", scores, None, None, attributes | {"diversity_quota": 0})
            continue
        named = random.integers(0, tokens, seeds).astype(np.int32) if number % 2 else None
        yield Case(
            f"drawn-{number}",
            scores,
            similarity.astype(np.float16) if number % 4 > 1 else similarity,
            named,
            attributes,
        )
