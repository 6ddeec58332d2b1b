"""Steps in torch, on the machine's own: products of the selection, and a 7B's prefill with the real kernels in it.

    python -m benchmarks.gpu_check.on_torch products|layers CASES NATIVE

CASES is the prepared folder, NATIVE that of the compiled files. Sizes and stages are in prepared.json, so that nothing
of the project but engines.native.kernels is needed here. Everything is timed as a CUDA graph; what is timed is checked
first.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.runner import MISSING, gpu_problems
from benchmarks.gpu_check.steps import DENSE
from engines.native.kernels import Kernels
from graphs.ops.common.trt_python import Tensor as Described

C = 4096
ROUNDS = 9


def main(what: str, cases: str, native: str) -> int:
    kernels = Kernels(Path(native) / "libbtp_kernels.so")
    described = json.loads((Path(cases) / "prepared.json").read_text(encoding="utf-8"))["model"]
    if not torch.cuda.is_available():
        problems = gpu_problems() or ["a torch built with CUDA"]
        print(json.dumps({"missing": f"{problems[0]}; torch {torch.__version__} can use none"}))
        return MISSING
    torch.manual_seed(0)
    with torch.inference_mode():
        result = products(kernels) if what == "products" else layers(kernels, described)
    print(json.dumps({"torch": torch.__version__, **result}))
    return 0


# -- timing ------------------------------------------------------------------------------------------------------------


def graph_ms(run: Callable[[], Any], copies: int = 1) -> float:
    """Median milliseconds of one run, from events around a CUDA graph of `copies`."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            run()
    times: list[float] = []
    for _ in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / copies)
    return statistics.median(times[2:])


def set_tf32(on: bool) -> None:
    """TF32 in torch's matrix products."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


# -- products of the selection -----------------------------------------------------------------------------------------


def products(kernels: Kernels) -> dict[str, Any]:
    """The similarity in three precisions, the scores, and the gather, for V 576 and 2,880; dense products."""
    rows = [dense_product(rows) for rows in (128, 640, 4096)]
    for tokens in (576, 2880):
        hidden = torch.randn(1, tokens, C, device="cuda", dtype=torch.float16)
        unit = unit_rows(hidden)
        exact = unit.double() @ unit.double().transpose(1, 2)
        for name, rows_in in (("fp32", unit), ("tf32", unit), ("fp16", unit.half())):
            set_tf32(name == "tf32")
            product = partial(similarity, rows_in)
            error = float((product().double() - exact).norm() / exact.norm())
            ms = graph_ms(product, copies=5)
            teraflops = 2 * tokens * tokens * C / ms / 1e9
            rows.append({"what": f"similarity {tokens} {name}", "ms": ms, "tflops": teraflops, "error": error})
        set_tf32(False)
        rows.append({"what": f"unit rows {tokens}", "ms": graph_ms(partial(unit_rows, hidden), 5)})
        query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.float16)
        key = torch.randn(1, 32, tokens + 99, 128, device="cuda", dtype=torch.float16)
        ms = graph_ms(partial(scores, query, key, 35, tokens), 5)
        rows.append({"what": f"scores {tokens}", "ms": ms})
        rows.append({"what": f"gather {tokens} of {C} fp16", **timed_gather(kernels, tokens)})
    return {"rows": rows}


def dense_product(rows: int) -> dict[str, Any]:
    """x [rows,4096] w [4096,4096] in float16: what BtpLinear's rate is compared with."""
    x, w = (torch.randn(n, C, device="cuda", dtype=torch.float16) for n in (rows, C))
    ms = graph_ms(partial(torch.matmul, x, w.T), copies=5)
    return {"what": f"{DENSE} {rows}", "ms": ms, "tflops": 2 * rows * C * C / ms / 1e9}


def unit_rows(hidden: Tensor) -> Tensor:
    """[B,n,C] -> rows of length 1, float32."""
    return F.normalize(hidden.float(), dim=-1)


def similarity(unit: Tensor) -> Tensor:
    """[B,n,C] -> [B,n,n]."""
    return unit @ unit.transpose(1, 2)


def scores(query: Tensor, key: Tensor, prefix: int, count: int) -> Tensor:
    """Mean over heads of the last token's attention to the image, [B,n] float32, as the graphs compute it."""
    products = (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(2, 3)
    weights: Tensor = products.softmax(-1)[:, :, 0, prefix : prefix + count].mean(1)
    return weights.contiguous()


def timed_gather(kernels: Kernels, tokens: int) -> dict[str, float]:
    """Half of the image rows of [1,V+99,C], compared with torch's own gather."""
    x = torch.randn(1, tokens + 99, C, device="cuda", dtype=torch.float16)
    kept = torch.randperm(tokens, device="cuda")[: tokens // 2].sort().values.int()[None]
    out = gather(kernels, x, kept, 35, tokens)
    wanted = torch.cat([x[:, :35], x[:, 35 + kept[0].long()], x[:, 35 + tokens :]], 1)
    if not torch.equal(out, wanted):
        raise SystemExit("BtpGatherTokens differs from torch")
    ms = graph_ms(lambda: gather(kernels, x, kept, 35, tokens), 5)
    return {"ms": ms, "gb_per_s": 2 * out.nbytes / ms / 1e6}


# -- the kernels -------------------------------------------------------------------------------------------------------


def describe(tensor: Tensor) -> Described:
    """Address, shape and type, as the kernels' interface takes them."""
    assert tensor.is_contiguous()
    return Described(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device; the emulated kernels of the tests know none."""
    return torch.cuda.current_stream().cuda_stream if tensor.device.type == "cuda" else 0


def select(
    kernels: Kernels, scores: Tensor, pairs: Tensor | None, seeds: Tensor | None, attributes: dict[str, Any]
) -> Tensor:
    """BtpSelectTokens on the current stream: indices [B,keep]."""
    given = [describe(tensor) for tensor in (scores, pairs, seeds) if tensor is not None]
    size = kernels.workspace("select_tokens", given, **attributes) + 16
    workspace = torch.empty(size, dtype=torch.uint8, device=scores.device)
    out = torch.empty(len(scores), attributes["keep"], dtype=torch.int32, device=scores.device)
    kernels.select_tokens(given, out.data_ptr(), workspace.data_ptr(), stream=stream_of(scores), **attributes)
    return out


def gather(kernels: Kernels, x: Tensor, indices: Tensor, start: int, count: int) -> Tensor:
    """BtpGatherTokens on the current stream."""
    out = torch.empty(x.shape[0], x.shape[1] - count + indices.shape[1], *x.shape[2:], dtype=x.dtype, device=x.device)
    given = [describe(x), describe(indices)]
    kernels.gather_tokens(given, out.data_ptr(), stream=stream_of(x), start=start, count=count)
    return out


# -- a 7B's layers -----------------------------------------------------------------------------------------------------


class Layer:
    """One random decoder layer in float16: RMSNorm, rotary SDPA, gated MLP."""

    def __init__(self, sizes: dict[str, Any], device: str = "cuda") -> None:
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        self.heads = sizes["heads"]

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=torch.float16) * (0.5 / math.sqrt(columns))

        self.qkv, self.out = matrix(3 * hidden, hidden), matrix(hidden, hidden)
        self.gate_up, self.down = matrix(2 * inner, hidden), matrix(hidden, inner)
        self.norm = torch.ones(hidden, device=device, dtype=torch.float16)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,S,C] -> the next [B,S,C], query and key [B,H,S,D]."""
        batch, tokens, hidden = x.shape
        normed = F.rms_norm(x, (hidden,), self.norm, 1e-5)
        parts = F.linear(normed, self.qkv).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotated(parts[0], cos, sin), rotated(parts[1], cos, sin), parts[2]
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + F.linear(context.transpose(1, 2).reshape(batch, tokens, hidden), self.out)
        gate, up = F.linear(F.rms_norm(x, (hidden,), self.norm, 1e-5), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down), query, key


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,H,S,D] with cos and sin [B,S,D/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Prefill:
    """All layers on one sequence, pruned by the stages that are given (none: unpruned)."""

    def __init__(
        self, kernels: Kernels, model: list[Layer], sizes: dict[str, Any], stages: list[dict[str, Any]]
    ) -> None:
        self.kernels, self.model, self.prefix, self.image = kernels, model, sizes["prefix"], sizes["image"]
        device, head = model[0].norm.device, sizes["hidden_size"] // sizes["heads"]
        self.stages = {stage["layer"]: stage for stage in stages}
        self.seeds = {
            stage["layer"]: torch.tensor(stage["seeds"], dtype=torch.int32, device=device)
            for stage in stages
            if stage["seeds"] is not None
        }
        tokens = sizes["prefix"] + sizes["image"] + sizes["text"]
        angle = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
        self.rope = tuple(part.to(device, torch.float16)[None].contiguous() for part in (angle.cos(), angle.sin()))
        self.hidden = torch.randn(1, tokens, sizes["hidden_size"], device=device, dtype=torch.float16)
        self.kept: list[Tensor] = []
        self.chosen_from: list[tuple[Tensor, Tensor | None, Tensor | None, dict[str, Any]]] = []

    def __call__(self) -> Tensor:
        x, (cos, sin), image = self.hidden, self.rope, self.image
        query = key = x
        self.kept, self.chosen_from = [], []
        for number, layer in enumerate(self.model):
            if number in self.stages:
                x, cos, sin, image = self._stage(number, x, cos, sin, query[:, :, -1:], key, image)
            x, query, key = layer(x, cos, sin)
        return x

    def _stage(
        self, number: int, x: Tensor, cos: Tensor, sin: Tensor, query: Tensor, key: Tensor, image: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """What the graph select_<j> does: scores, similarity, BtpSelectTokens, BtpGatherTokens of the three streams."""
        stage, end = self.stages[number], self.prefix + image
        if stage["attributes"]["keep"] == 0:
            x, cos, sin = (torch.cat([t[:, : self.prefix], t[:, end:]], 1) for t in (x, cos, sin))
            return x, cos, sin, 0
        pairs = None
        if stage["similarity"]:
            pairs = similarity(unit_rows(x[:, self.prefix : end]))
        given = (scores(query, key, self.prefix, image), pairs, self.seeds.get(number), stage["attributes"])
        kept = select(self.kernels, *given)
        self.kept.append(kept)
        self.chosen_from.append(given)
        x, cos, sin = (gather(self.kernels, t.contiguous(), kept, self.prefix, image) for t in (x, cos, sin))
        return x, cos, sin, kept.shape[1]


def layers(kernels: Kernels, sizes: dict[str, Any]) -> dict[str, Any]:
    """Prefill of the unpruned and of the pruned sequence, in turns, beside the limit that operations set."""
    set_tf32(True)  # as a half-precision bundle is built
    model = [Layer(sizes) for _ in range(sizes["layers"])]
    full, pruned = Prefill(kernels, model, sizes, []), Prefill(kernels, model, sizes, sizes["stages"])
    full()
    finite = bool(pruned().isfinite().all())
    problems = [*check_kept(pruned), *([] if finite else ["the hidden states are not finite"])]
    if problems:
        raise SystemExit("; ".join(problems))
    times = {"full": [graph_ms(full)], "pruned": [graph_ms(pruned), graph_ms(pruned)]}
    times["full"].append(graph_ms(full))
    full_ms, pruned_ms = (statistics.median(times[name]) for name in ("full", "pruned"))
    pruned()  # outside a graph, so that what the stages chose from lies in memory of its own
    stages = [graph_ms(partial(select, kernels, *inputs), 5) for inputs in pruned.chosen_from]
    limit = sizes["flops_limit"]
    return {
        "full_ms": full_ms,
        "pruned_ms": pruned_ms,
        "speedup": full_ms / pruned_ms,
        "flops_limit": limit,
        "share_of_limit": full_ms / pruned_ms / limit,
        "full_tflops": sizes["operations"]["none"] / full_ms / 1e9,
        "select_ms": stages,
        "times": times,
        "memory_bytes": torch.cuda.max_memory_allocated(),
    }


def check_kept(prefill: Prefill) -> list[str]:
    """What is wrong with the kept tokens, against the reference on the GPU's own scores and similarities."""
    from graphs.ops import select_tokens

    problems = []
    for kept, (scored, pairs, seeds, attributes) in zip(prefill.kept, prefill.chosen_from, strict=True):
        wanted = select_tokens.reference(scored, pairs, seeds, **attributes)
        if not torch.equal(kept, wanted):
            problems.append(f"the kernel keeps other tokens than the reference at keep {attributes['keep']}")
    return problems


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
