"""Prefill and decode beside what people would use instead: the same weights, threads and context, in turns.

    python -m benchmarks --only side_by_side

Programs: transformers with eager attention, with PyTorch's own, and under torch.compile; onnxruntime-genai; llama.cpp.
Each works in a process of its own and waits while another is measured; a program whose logits are not ours is not
timed. Models: the demo (hidden 128), hidden 2048 with 6 layers and hidden 4096 with 3, in float32, 675 tokens (the
demo: 626) in batch 1; the two large ones with four-bit weights too, Q4_0 in llama.cpp. Then our own pruned bundles
beside the unpruned one, and decode steps in caches of two capacities.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.findings import NotHere, Row, Wishes, number, ratio, skipped
from benchmarks.gguf_file import Kind, write_gguf
from benchmarks.peers import Given
from benchmarks.peers.genai import build
from benchmarks.peers.process import Failed, prefills_in_turns, same, started, steps_in_turns
from btp_export.model.open_model import open_model
from engines.native.libraries import custom_ops
from graphs.files.bundle import Bundle
from graphs.files.folders import scratch_beside
from graphs.pruning.operations import cost

STEPS = 8  # of a round
SHARES = (0.22, 0.11)
ROOM = 128  # new tokens that caches have room for
ROOMY = {"demo": 352}  # the same of large caches; the demo has 1,024 positions in all
INT8 = 0.99  # cosine of logits where rows are rounded to int8
REASON = "what people would use instead"
COMPILED = "transformers_compiled"
PROGRAMS = ("transformers_eager", "transformers_sdpa", COMPILED, "genai", "llama_cpp")


class Model:
    """One set of weights, as each program takes it."""

    def __init__(self, name: str, folder: Path, source: Path, wishes: Wishes, *, four_bits: bool = False) -> None:
        self.name, self.folder, self.source, self.four_bits = name, folder, source, four_bits
        self.wishes = wishes
        self.bundle = models.bundle(source, folder / "bundle", profiles=(f"new={ROOM}", f"new={ROOMY.get(name, 2048)}"))
        self.profile, self.roomy = self.bundle.manifest.profiles
        self.vocab = self.bundle.spec.decoder.vocab_size
        tokens = self.profile.total_tokens
        self.ids = np.random.default_rng(0).integers(5, self.vocab, (1, tokens)).tolist()
        self.step_rounds = min(wishes.rounds, ROOM // STEPS - 1)  # and one that is not counted
        self.room = (self.step_rounds + 1) * STEPS

    def ours(self, bundle: Bundle | None = None, *, profile: str | None = None) -> tuple[str, Given]:
        chosen = profile or self.profile.name
        return "ours", self._given((bundle or self.bundle).root, profile=chosen)

    def other(self, program: str) -> tuple[str, Given]:
        """What another program opens, made now if it is not there. Raises NotHere where it has no such model."""
        if program == "llama_cpp":
            return program, self._given(self._gguf)
        if program == "genai":
            return program, self._given(self._genai)
        if self.four_bits:
            raise NotHere("transformers has no product with four-bit weights on a CPU without further packages")
        return program, self._given(self.source)

    def _given(self, folder: Path, **more: str) -> Given:
        return Given(str(folder), self.ids, self.wishes.threads, self.room, more)

    @cached_property
    def _gguf(self) -> Path:
        kind: Kind = "Q4_0" if self.four_bits else "F32"
        try:
            return write_gguf(open_model(str(self.source)), self.folder / f"{kind}.gguf", kind)
        except ImportError as error:
            raise NotHere(f"{error.name} is not installed") from error

    @cached_property
    def _genai(self) -> Path:
        with scratch_beside(self.folder) as full:  # the decoder alone, which only the builder reads
            out = self.folder / ("genai-projections" if self.four_bits else "genai")
            return build(models.llama(self.source, full / "llama"), out, four_bits=self.four_bits)


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """All comparisons, one model after another, the largest last."""
    for name, make in _models(wishes).items():
        if wishes.part not in name:
            continue
        wishes.note(f"side_by_side: {name}")
        model = make()
        for program in PROGRAMS:
            yield from beside(model, program)
        yield from pruned(model)
        yield capacities(model)


def _models(wishes: Wishes) -> dict[str, Callable[[], Model]]:
    widths = [models.TINY] if wishes.quick else [models.NARROW, models.WIDE]
    made: dict[str, Callable[[], Model]] = {}
    if not wishes.quick:
        made["demo"] = lambda: Model("demo", wishes.folder / "demo", models.demo_checkpoint(), wishes)
    for four_bits in (False, True):
        for width in widths:
            name = f"{width.name}, {'4 bits' if four_bits else 'float32'}"
            made[name] = lambda name=name, width=width, four_bits=four_bits: _made_up(name, width, wishes, four_bits)
    return made


def _made_up(name: str, width: models.Width, wishes: Wishes, four_bits: bool) -> Model:
    folder = wishes.folder / name.replace(" ", "-").replace(",", "")
    source = models.checkpoint(width, folder / "checkpoint", four_bits=four_bits)
    return Model(name, folder, source, wishes, four_bits=four_bits)


def beside(model: Model, program: str) -> Iterator[Row]:
    """Prefill and decode of ours, unpruned, beside one other program."""
    try:
        with started(model.ours(), model.other(program)) as running:
            ours, other = running
            same(ours.prefill()[1], other.prefill()[1], least=INT8 if model.four_bits else 0.9999)
            rounds = model.wishes.rounds
            # Comparing was the first round. torch.compile compiles again in the second or third.
            times = prefills_in_turns(running, rounds, uncounted=2 if program == COMPILED else 0)
            what = f"{model.name}: prefill, ours / {other.label}"
            yield ratio(what, times[0], times[1], unit="ms", limit=1.0, why=REASON)
            steps = steps_in_turns(running, model.step_rounds, STEPS, vocab=model.vocab)
            what = f"{model.name}: a token, ours / {other.label}"
            yield ratio(what, steps[0], steps[1], unit="ms", limit=1.0, why=REASON)
    except (NotHere, Failed, RuntimeError) as error:
        yield skipped(f"{model.name}: beside {program}", error)


def pruned(model: Model) -> Iterator[Row]:
    """Prefill and decode with fewer image tokens beside all of them."""
    for share in SHARES:
        less = models.pruned(model.bundle, model.folder / f"pruned-{share}", share)
        spec, plan, rounds = model.bundle.spec.decoder, less.plan_for(model.profile.name), model.wishes.rounds
        full = cost(spec, model.bundle.plan_for(model.profile.name), model.profile)
        left = cost(spec, plan, model.profile)
        limit, square = full.needed / left.needed, full.decoder / left.decoder
        with started(model.ours(), model.ours(less)) as running:
            times = prefills_in_turns(running, rounds)
            steps = steps_in_turns(running, model.step_rounds, STEPS, vocab=model.vocab)
        found = ratio("", times[0], times[1], unit="ms", limit=limit, why="operations that pruning saves")
        reached = (found.value or 0.0) / limit
        what = f"{model.name}: prefill with {share:.0%} of the image tokens, times as fast"
        portable = "" if custom_ops() else "; selections in their portable form, btp_ort is not built"
        squares = f"{square:.2f} x with whole squares of attention"
        detail = f"{reached:.0%} of it; {found.detail}; {squares}{portable}"
        yield replace(found, what=what, more_is_better=True, detail=detail)
        yield ratio(
            f"{model.name}: a token with {share:.0%} of the image tokens, of the unpruned time",
            steps[1], steps[0], unit="ms", limit=1.0, why="less to read",
        )  # fmt: skip


def capacities(model: Model) -> Row:
    """A decode step in roomy caches beside one in small ones, at the same context."""
    small, large = (profile.capacity_with(profile.image_tokens) for profile in (model.profile, model.roomy))
    with started(model.ours(profile=model.roomy.name), model.ours()) as running:
        for process in running:
            process.prefill()
        steps = steps_in_turns(running, model.step_rounds, STEPS, vocab=model.vocab)
    what = f"{model.name}: a token in caches of {number(large)} rows, of the time in {number(small)}"
    return ratio(what, *steps, unit="ms", limit=1.0, why="the same context is read")
