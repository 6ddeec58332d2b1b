"""What the host adds to each token of a 7B's engines: choosing it, its embedding row, starting the step, the logits.

    python -m benchmarks.host_per_token [--tokens 200] [--write]

The loop, the chain and the TensorRT program are those that run on a device. In place of the CUDA runtime stands a
library compiled here whose functions return at once, so what is measured is all that is ours, the calls into CUDA
included, and neither the GPU's time nor the driver's. Prints milliseconds of processor time a token, which on an idle
machine is the time it takes; --write keeps them in benchmarks/results/host_per_token.md.
"""

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.findings import NotHere, Row, Wishes
from btp_export.running.embedding import TokenEmbedding
from btp_export.running.generation import Answer, chooser, generate
from btp_export.running.logit_rules import LogitRules
from btp_export.running.sampling import Sampling
from engines.chain import Chain
from engines.native.host import host_library
from engines.runners import cuda
from engines.runners.cuda_stream import Stream
from engines.runners.interface import Buffer, Dtype, Program, Step, TensorSpec
from engines.tensorrt.run.bound import TrtBound
from engines.tensorrt.run.program import TrtProgram
from graphs import names
from graphs.records.generation import GenerationSettings
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile

RESULTS = Path(__file__).parent / "results" / "host_per_token.md"
LIMIT_MS = 0.2
ROUNDS = 5
HALF = np.dtype(np.float16)

# The functions that give something back; the others of cuda.py return 0.
STUB = r"""
#include <stdlib.h>
#include <string.h>
static size_t next_handle = 1;
static int give(size_t *to) { *to = next_handle++; return 0; }
static int room(size_t *to, size_t size) {
    *to = ((size_t)calloc(1, size + 256) + 255) / 256 * 256;
    return 0;
}
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
const char *cudaGetErrorString(int code) { (void)code; return "none"; }
int cudaMalloc(size_t *to, size_t size) { return room(to, size); }
int cudaHostAlloc(size_t *to, size_t size, int flags) { (void)flags; return room(to, size); }
int cudaStreamCreateWithFlags(size_t *to) { return give(to); }
int cudaEventCreateWithFlags(size_t *to) { return give(to); }
int cudaStreamEndCapture(size_t stream, size_t *to) { (void)stream; return give(to); }
int cudaGraphInstantiateWithFlags(size_t *to) { return give(to); }
int cudaEventElapsedTime(float *to) { *to = 0; return 0; }
"""


@dataclass(frozen=True)
class Model:
    """The shapes that matter here, and how the model's own settings choose tokens."""

    name: str
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    vocab: int
    image: int
    grid: tuple[int, int]
    prompt: int
    settings: GenerationSettings
    stages: tuple[Stage, ...] = field(default=())


def stages(image: int, layers: int) -> tuple[Stage, ...]:
    """Three stages that halve and a last one that drops the image, as the published plan does."""
    counts = (image // 2, image // 4, image // 8, 0)
    places = (layers // 8, layers // 4, layers // 2, layers * 3 // 4)
    return tuple(
        Stage(layer=layer, keep=keep, attention_quota=keep, pool=keep, boundary=0, diversity_quota=0)
        if keep
        else Stage(layer=layer, keep=0)
        for layer, keep in zip(places, counts, strict=True)
    )


MODELS = (
    Model("LLaVA-1.5-7B", 32, 4096, 32, 128, 32064, 576, (24, 24), 620, GenerationSettings()),
    Model("Qwen2.5-VL-7B", 28, 3584, 4, 128, 152064, 1296, (36, 36), 1340, GenerationSettings(repetition_penalty=1.05)),
)
WAYS = {
    "greedy": Sampling(),
    "temperature 0.7": Sampling(temperature=0.7),
    "temperature 0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9),
    "temperature 2": Sampling(temperature=2.0),
}


class EmptyContext:
    """An engine's context that has nothing to do."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def use(self, owner: object, buffers: Any) -> int:
        return 1

    def enqueue(self) -> None:
        return


class EmptyLoader:
    """Runners with the right inputs and outputs, whose engines do nothing, on the stream of the real program."""

    device = "cuda:0"

    def __init__(self, specs: dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec]]]) -> None:
        self.session: Any = SimpleNamespace(device=0, stream=Stream(0))
        self._specs = specs

    def __call__(self, path: Path) -> Any:
        inputs, outputs = self._specs[path.name]
        context: Any = EmptyContext(self.session)
        return SimpleNamespace(
            inputs=inputs, outputs=outputs, bind=lambda i, o: TrtBound(path.name, context, {**i, **o})
        )

    def allocate(self, dtype: Dtype, shape: Any) -> Buffer:
        return cuda.CudaBuffer.allocate(dtype, shape, device=0, transfers=self.session.stream)

    def program(self, steps: list[Step], *, writes: list[Buffer], reads: list[Buffer]) -> Program:
        return TrtProgram(self.session, steps, writes=writes, reads=reads, replay=True, note=print)


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """A row for each model and way of choosing; `quick`: one of them, for a few tokens."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        raise NotHere("there is no C compiler for the library in CUDA's place")
    for name, way, cost in measured(MODELS[: 1 if wishes.quick else None], 5 if wishes.quick else 200):
        what, detail = (
            f"{name}, {way}: choosing a token and its embedding row",
            f"with starting the step {cost.all:.3f} ms",
        )
        yield Row(what, cost.choosing + cost.row, "ms", LIMIT_MS, "what the host may add", detail=detail)


@dataclass(frozen=True)
class Cost:
    """Milliseconds a token: choosing it, reading its embedding row, and everything from logits to waiting."""

    choosing: float
    row: float
    all: float


def measured(models: Sequence[Model], tokens: int) -> Iterator[tuple[str, str, Cost]]:
    """Model, way of choosing, and what a token costs."""
    with tempfile.TemporaryDirectory() as folder:
        held = load_stub(Path(folder))
        for model in models:
            for way, sampling in WAYS.items():
                yield model.name, way, measure(model, sampling, tokens, Path(folder))
        del held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = list(measured(MODELS, options.tokens))
    lines = ["| model | tokens are chosen by | choosing, ms | embedding row, ms | both, ms | limit, ms | all, ms |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, way, cost in rows:
        both = cost.choosing + cost.row
        lines += [
            f"| {name} | {way} | {cost.choosing:.3f} | {cost.row:.3f} | {both:.3f} | {LIMIT_MS} | {cost.all:.3f} |"
        ]
    print("\n".join(lines))
    if options.write:
        RESULTS.write_text(page(lines, options.tokens), encoding="utf-8")


def load_stub(folder: Path) -> ctypes.CDLL:
    """A library in the place of the CUDA runtime: found by its name from now on, because it is loaded already."""
    given = {line.split("(")[0].split()[-1].lstrip("*") for line in STUB.splitlines() if "cuda" in line}
    rest = [f"int {name}(void) {{ return 0; }}" for name in cuda.SIGNATURES if name not in given]
    source, library = folder / "stub.c", folder / "libcudart.so.13"
    source.write_text(STUB + "\n".join(rest) + "\n")
    command = [os.environ.get("CC", "cc"), "-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def measure(model: Model, sampling: Sampling, tokens: int, folder: Path) -> Cost:
    """Medians over ROUNDS of the mean milliseconds a token."""
    chain, embedding = open_chain(model, tokens), open_embedding(model, folder)
    logits = np.random.default_rng(0).standard_normal((1, model.vocab)).astype(np.float32) * 3
    logits[0, 7] = 18
    chain._decode.outputs[0][...] = logits  # what the engine would leave there
    prompt = np.full(model.prompt, model.vocab - 1)
    costs = []
    for round_ in range(ROUNDS + 1):
        generator, rules = np.random.default_rng(round_), LogitRules(model.settings, [2], prompt, tokens)
        choose, rows = Timed(chooser(rules, sampling, generator)), Timed(embedding.rows)
        answer = Answer(choose, frozenset(), tokens)
        for lengths in chain._lengths:
            lengths[...] = 0
        chain._places[...] = 0
        begin = time.thread_time()
        generate([answer], logits, lambda ids: chain.decode(rows(ids)))  # noqa: B023
        costs.append((choose.seconds, rows.seconds, time.thread_time() - begin))
    return Cost(*(median(column) / tokens * 1000 for column in zip(*costs[1:], strict=True)))


class Timed:
    """A function, and the processor time of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.thread_time()
        result = self._function(*arguments)
        self.seconds += time.thread_time() - begin
        return result


def open_embedding(model: Model, folder: Path) -> TokenEmbedding:
    """An embedding matrix in a file, of the model's size."""
    path = folder / f"{model.name}.bin"
    if not path.exists():
        np.memmap(path, HALF, "w+", shape=(model.vocab, model.hidden))[...] = 0.5
    table = np.memmap(path, HALF, "r", shape=(model.vocab, model.hidden))
    tensor = SimpleNamespace(read=lambda: table)
    bundle: Any = SimpleNamespace(checkpoint=lambda: {"language_model.embed_tokens.weight": tensor})
    return TokenEmbedding(bundle, HALF)


def open_chain(model: Model, tokens: int) -> Chain:
    """The decode step of the model's shapes, over engines that do nothing."""
    plan = PruningPlan(
        model_type="llava",
        num_layers=model.layers,
        image_tokens=model.image,
        grid=model.grid,
        stages=stages(model.image, model.layers),
    )
    profile = ShapeProfile(
        name="bench",
        image_size=(336, 336),
        grid=model.grid,
        prefix_tokens=35,
        image_tokens=model.image,
        text_tokens=64,
        new_tokens=tokens + 1,
    )
    half, table = model.head_dim // 2, np.ones((profile.max_positions, model.head_dim // 2), np.float32)
    shapes = {"hidden": (1, 1, model.hidden), "cos": (1, 1, half), "sin": (1, 1, half)}
    inputs = {name: TensorSpec(name, HALF, shape) for name, shape in shapes.items()}
    logits = {"logits": TensorSpec("logits", np.dtype(np.float32), (1, model.vocab))}
    decoded, prefilled = dict(logits), dict(logits)
    for segment in plan.segments():
        length = names.length(segment.index)
        inputs[length] = TensorSpec(length, np.dtype(np.int32), (1,))
        last = names.last(segment.index)
        prefilled[last] = TensorSpec(last, np.dtype(np.int32), (1,))
        for name in [name for layer in range(segment.start, segment.stop) for name in names.cache_rows(layer)]:
            rows = profile.capacity_with(segment.image_tokens)
            past = names.past(name)
            inputs[past] = TensorSpec(past, HALF, (1, model.kv_heads, rows, model.head_dim))
            decoded[name] = TensorSpec(name, HALF, (1, model.kv_heads, 1, model.head_dim))
            prefilled[name] = TensorSpec(
                name, HALF, (1, model.kv_heads, profile.tokens_with(segment.image_tokens), model.head_dim)
            )
    for number, stage in enumerate(plan.stages):
        if stage.keep:
            indices = names.indices(number)
            prefilled[indices] = TensorSpec(indices, np.dtype(np.int32), (1, stage.keep))
    whole = {
        "pixel_values": TensorSpec("pixel_values", np.dtype(np.float32), (1, 3, 336, 336)),
        "prefix": TensorSpec("prefix", HALF, (1, profile.prefix_tokens, model.hidden)),
        "text": TensorSpec("text", HALF, (1, profile.text_tokens, model.hidden)),
    }
    loader = EmptyLoader({names.WHOLE: (whole, prefilled), names.DECODE: (inputs, decoded)})
    files = {name: Path(name) for name in (names.WHOLE, names.DECODE)}
    return Chain(files, plan=plan, profile=profile, rope=(table, table), loader=loader)


def page(lines: list[str], tokens: int) -> str:
    """The page of results."""
    versions = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    chosen_by = "btp_host" if host_library() else "numpy, as there is no btp_host"
    return f"""# What the host adds to a token

`python -m benchmarks.host_per_token --write`, {date.today()}, {versions}, load {os.getloadavg()[0]:.1f}:
{tokens} tokens, batch 1, four stages, the median of {ROUNDS} rounds, in processor time of the thread: it never waits.

Choosing takes the checkpoint's rules in (Qwen2.5-VL's has a repetition penalty). `all` is everything between the logits
of one token and the start of waiting for the next: both, the inputs, one CUDA graph, a strided copy for each segment,
and the wait. The limit is for choosing and the embedding row. The calls into CUDA go to a library whose functions
return at once: what the driver and the GPU take comes on top and is no work of ours.

The logits are drawn from a normal distribution of deviation 3, one of them is 18. Tokens are chosen by {chosen_by}.
Those that lie 14 temperatures below the largest nearly always weigh too little to change the choice, so only those
nearer are weighed, and what lies beside them; at temperature 2 that is nearly all.

{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
