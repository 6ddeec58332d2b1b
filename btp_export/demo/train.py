"""Trains the demo model on generated scenes: `python -m btp_export.demo.train --seed 0 --out DIR`.

1. The vision tower and the projector learn to name each patch (colour, shape, row, column, centre of an object).
2. The whole model learns to answer, first on 2x2 cells, then 3x3, then the full picture, with the image's own
   positions. The patch loss stays on the projector's output, or the position is lost on the way, and fades at the end.

3. The same two steps for reading (`READING`), from the checkpoint of the first two (`ANSWERS`): rows for new words and
   characters, pictures with signs, and the other questions among them, so that nothing is forgotten.

Scenes are made on the fly from the split "train" and never repeat, so the accuracies in the log are on unseen scenes.
The run can be stopped and continued: `state.pt` holds weights, optimiser and log of a part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from btp_export.demo import model_files
from btp_export.demo.batches import IGNORE, PATCH_TASKS, SPARSE_TASKS, Batch, Batches
from btp_export.demo.evaluate import evaluate
from btp_export.demo.forward import BlockForward
from btp_export.demo.optimiser import Optimiser
from calibrate.data import scenes, signs
from graphs.files.atomic import replacing
from graphs.records.reading import read_object

LOG = "training-log.json"
HELD_OUT = 1200  # scenes of the final table
_END_WEIGHT = 0.4  # end-of-text is nearly always right, and at full weight it drowns the answers


@dataclass(frozen=True)
class Phase:
    """A stretch of steps on rectangles of one size; blocks 0 trains on the patch loss alone."""

    steps: int
    cells: int
    pictures: int
    blocks: int
    signs: float = 0.0  # share of the pictures that show a sign; from 2 on: so many in each, and no question about them


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the seed."""

    phases: tuple[Phase, ...] = (
        Phase(steps=250, cells=4, pictures=16, blocks=0),
        Phase(steps=500, cells=2, pictures=32, blocks=12),
        Phase(steps=200, cells=3, pictures=20, blocks=16),
        Phase(steps=250, cells=4, pictures=16, blocks=20),
    )
    rate: float = 3e-3
    warm_up: int = 40
    # Share of `rate` after so many answering steps, linear between; the last points of accuracy come with the decay.
    decay: tuple[tuple[int, float], ...] = ((0, 1.0), (541, 1.0), (651, 0.913), (751, 0.7725), (950, 0.001))
    patch_weight: float = 0.3
    patch_fade: tuple[int, int] = (800, 900)  # the answering steps over which the patch loss goes away
    patch_tasks: tuple[str, ...] = ("colour", "shape", "row", "column", "centre")
    character_weight: float = 1.0  # of the characters of a sign in the loss of the answers
    first_scene: int = 0  # where the scenes begin that it sees
    reads: bool = False
    layers: int = 12
    hidden: int = 128
    fast: bool = True  # bfloat16 products
    compiled: bool = True

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def answering(self) -> tuple[int, int]:
        """First step that answers questions, and the number of steps from there on."""
        first = sum(phase.steps for phase in itertools.takewhile(lambda phase: phase.blocks == 0, self.phases))
        return first, self.steps - first


ANSWERS = Recipe()
READING = Recipe(
    phases=(
        Phase(steps=500, cells=2, pictures=32, blocks=0, signs=1.0),
        Phase(steps=250, cells=2, pictures=24, blocks=8, signs=0.7),
        Phase(steps=120, cells=4, pictures=12, blocks=0, signs=1.0),
        Phase(steps=80, cells=4, pictures=12, blocks=16, signs=0.6),
        Phase(steps=220, cells=4, pictures=12, blocks=0, signs=4.0),
        Phase(steps=150, cells=4, pictures=12, blocks=16, signs=0.7),
        Phase(steps=150, cells=4, pictures=16, blocks=20, signs=0.4),  # counting, which the signs had cost
    ),
    decay=(
        (0, 0.6),
        (430, 0.6),
        (450, 0.50017),
        (460, 0.6),
        (560, 0.6),
        (670, 0.2),
        (671, 0.4),
        (720, 0.4),
        (820, 0.001),
        (821, 0.3),
        (970, 0.001),
    ),
    patch_weight=0.5,
    patch_fade=(750, 800),
    patch_tasks=tuple(PATCH_TASKS),
    character_weight=3.0,
    first_scene=28000,
    reads=True,
)


@dataclass
class Progress:
    """Where a run is; what is saved besides weights."""

    step: int = 0
    scenes: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One training run; `run` goes on from wherever `progress` stands."""

    def __init__(self, seed: int, recipe: Recipe, start: Path | None = None) -> None:
        """`start` is the checkpoint to go on from; None: new weights."""
        torch.manual_seed(seed)
        self.seed, self.recipe, self.progress = seed, recipe, Progress()
        self.model = _new_model(recipe) if start is None else _grown_model(recipe, start)
        self._classes = {name: PATCH_TASKS[name] for name in recipe.patch_tasks}
        self.patch_head = nn.Linear(recipe.hidden, sum(self._classes.values()))
        tokenizer = model_files.build_tokenizer()
        prefix = torch.tensor(tokenizer.encode(model_files.PREFIX))
        self.forward = BlockForward(self.model, prefix, fast=recipe.fast, compiled=recipe.compiled)
        self.batches = Batches(tokenizer)
        self.optimiser = Optimiser([self.model, nn.ModuleDict({"patch_head": self.patch_head})])
        self._tally = Tally()

    def run(
        self,
        *,
        until: int | None = None,
        report_every: int = 25,
        report: Callable[[dict[str, Any]], None] = lambda entry: None,
        state: Path | None = None,
    ) -> None:
        """Train to step `until` (the end unless told); each line of the log goes to `report` as well."""
        for step, phase in self._schedule(until):
            started = time.perf_counter()
            self._step(step, phase)
            self.progress.step = step + 1
            self.progress.seconds += time.perf_counter() - started
            if self.progress.step % report_every == 0:
                report(self._log(phase))
            if state is not None and (self.progress.step % 50 == 0 or self.progress.step == self.recipe.steps):
                self.save(state)

    def _schedule(self, until: int | None) -> Iterator[tuple[int, Phase]]:
        everything = [phase for phase in self.recipe.phases for _ in range(phase.steps)]
        last = len(everything) if until is None else until
        for step in range(self.progress.step, last):
            yield step, everything[step]

    def _step(self, step: int, phase: Phase) -> None:
        first = scenes.first_scene_seed(self.seed, "train") + self.recipe.first_scene + self.progress.scenes
        batch = self.batches.make(
            first, phase.pictures, cells=phase.cells, blocks=max(phase.blocks, 1), signs=phase.signs
        )
        self.progress.scenes += phase.pictures
        rate, patch_weight = rate_at(self.recipe, step), patch_weight_at(self.recipe, step)
        pixels, patches = torch.from_numpy(batch.pixels), torch.from_numpy(batch.patches)
        if phase.blocks == 0:
            loss = self._patch_loss(self.forward.features(pixels, patches), batch)
        else:
            out = self.forward(pixels, patches, torch.from_numpy(batch.tokens))
            loss = self._answer_loss(out.logits, batch)
            if patch_weight > 0:
                loss = loss + patch_weight * self._patch_loss(out.features, batch)
        torch.autograd.backward(loss)
        norm = self.optimiser.step(rate)
        self._tally.add(loss=float(loss.detach()), gradient=norm)

    def _answer_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits [B, N, Q, words]: mean cross entropy of the answer words, end-of-text at a lower weight."""
        labels = torch.from_numpy(batch.labels)
        weights = torch.ones(logits.shape[-1])
        weights[self.model.config.text_config.eos_token_id] = _END_WEIGHT
        if self.recipe.reads:
            weights[-len(signs.CHARACTERS) :] = self.recipe.character_weight
        right = (logits.detach().argmax(-1) == labels) | (labels == IGNORE)
        self._tally.add_answers(batch.kinds, right.all(-1))
        return functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), weights, ignore_index=IGNORE)

    def _patch_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """features [B, V, C]: summed cross entropy of the patch tasks; empty ground counts less than objects."""
        scaled = functional.rms_norm(features, features.shape[-1:])
        scores = self.patch_head(scaled).flatten(0, 1).split(list(self._classes.values()), dim=-1)
        labels = torch.from_numpy(batch.patch_labels).flatten(0, 1)
        total = features.new_zeros(())
        for i, (task, classes) in enumerate(self._classes.items()):
            weights = torch.ones(classes)
            if task in SPARSE_TASKS:
                weights[0] = 0.1
            total = total + functional.cross_entropy(scores[i], labels[:, i], weights)
            seen = labels[:, i] > 0 if task in SPARSE_TASKS else labels[:, i] >= 0
            self._tally.add_share(f"patch {task}", (scores[i].detach().argmax(-1) == labels[:, i])[seen])
        return total

    def _log(self, phase: Phase) -> dict[str, Any]:
        entry = {"step": self.progress.step, "cells": phase.cells, "rate": rate_at(self.recipe, self.progress.step - 1)}
        entry |= {"seconds": round(self.progress.seconds, 1)} | self._tally.means()
        self.progress.log.append(entry)
        self._tally = Tally()
        return entry

    def save(self, path: Path) -> None:
        """Write everything needed to go on, replacing the file only when it is whole."""
        state = {
            "model": self.model.state_dict(),
            "patch_head": self.patch_head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": asdict(self.progress),
        }
        with replacing(path) as stream:
            torch.save(state, stream)

    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.patch_head.load_state_dict(state["patch_head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])


class Tally:
    """Running means between two lines of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, **values: float) -> None:
        """Add one value to each name."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def add_share(self, name: str, right: Tensor) -> None:
        """Add a vector of booleans."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + float(right.sum()), count + right.numel())

    def add_answers(self, kinds: Any, right: Tensor) -> None:
        """Add exact matches [B, N] to the kinds [B, N] they belong to."""
        kind = torch.from_numpy(kinds)
        for i, name in enumerate(scenes.QUESTION_KINDS):
            self.add_share(name, right[kind == i])

    def means(self) -> dict[str, float]:
        """Mean per name, in the order of first use."""
        return {name: round(total / max(count, 1), 4) for name, (total, count) in self._sums.items()}


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate: each of the two parts warms up; the first falls to a fifth, the second follows `decay`."""
    first, _ = recipe.answering
    if step < first:
        return recipe.rate * min(1.0, (step + 1) / recipe.warm_up) * (1.0 - 0.8 * step / first)
    done = step - first + 1
    places, shares = zip(*recipe.decay, strict=True)
    share = float(np.interp(done, np.array(places), np.array(shares)))
    return recipe.rate * min(1.0, done / recipe.warm_up) * share


def patch_weight_at(recipe: Recipe, step: int) -> float:
    """Weight of the patch loss: level, then linear to 0 over `patch_fade`."""
    first, _ = recipe.answering
    start, end = recipe.patch_fade
    return recipe.patch_weight * min(1.0, max(0.0, (end - (step - first)) / (end - start)))


def _new_model(recipe: Recipe) -> LlavaForConditionalGeneration:
    config = model_files.build_config(layers=recipe.layers, hidden=recipe.hidden, reads=recipe.reads)
    model = LlavaForConditionalGeneration(config)
    prepare_weights(model)
    return model


@torch.no_grad()
def _grown_model(recipe: Recipe, start: Path) -> LlavaForConditionalGeneration:
    """The checkpoint's weights; rows of words that are new to it are as large as the others, their scores the mean."""
    model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32, local_files_only=True)
    known = model.config.text_config.vocab_size
    wanted = model_files.build_config(layers=recipe.layers, hidden=recipe.hidden, reads=recipe.reads)
    model.resize_token_embeddings(wanted.text_config.vocab_size, mean_resizing=False)
    table, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    table[known:].normal_(std=float(table[:known].std()))
    head[known:] = head[:known].mean(0)
    return model.train()


@torch.no_grad()
def prepare_weights(model: LlavaForConditionalGeneration) -> None:
    """Start where patches, positions and words all have a size that the first layers can see.

    Positions of the tower start as sines of row and column: neighbourhood is then visible from the first step.
    """
    embeddings = model.model.vision_tower.embeddings
    embeddings.patch_embedding.weight.normal_(std=0.12)
    side = scenes.IMAGE_SIZE // model_files.PATCH
    channels = embeddings.position_embedding.weight.shape[1]
    index = torch.arange(side * side)
    frequencies = 0.05 * 1.3 ** torch.arange(channels // 4)
    angles = torch.cat([place[:, None] * frequencies[None, :] for place in (index // side, index % side)], dim=1)
    embeddings.position_embedding.weight[1:] = 0.4 * torch.cat([angles.sin(), angles.cos()], dim=1)
    model.model.language_model.embed_tokens.weight.normal_(std=0.5)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)


def main() -> None:
    """Command line: train the parts one after another, write the checkpoint and its log."""
    parser = argparse.ArgumentParser(prog="python -m btp_export.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and of the parts' states")
    parser.add_argument("--answers", type=Path, help="checkpoint of the first part; without, it is trained, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler; slower")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first, compiled = arguments.answers, not arguments.no_compile
    if first is None:
        first = arguments.out / "answers"
        train_part(Trainer(arguments.seed, replace(ANSWERS, compiled=compiled)), first)
    record = read_object(first / LOG, noun="training log")
    train_part(Trainer(arguments.seed, replace(READING, compiled=compiled), first), arguments.out, before=record)


def train_part(trainer: Trainer, folder: Path, *, before: dict[str, Any] | None = None) -> None:
    """Train from where `folder`/state.pt stands, write the checkpoint, evaluate it, and write what was run.

    `before` is the log of the part that the trainer starts from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    if state.exists():
        trainer.load(state)
    trainer.run(state=state, report=lambda entry: print(json.dumps(entry), flush=True))
    model_files.save_checkpoint(trainer.model, folder)
    held_out = evaluate(folder, scenes.samples(HELD_OUT, seed=0, split="eval"))
    write_log(trainer, held_out, folder / LOG, before)


def write_log(trainer: Trainer, held_out: dict[str, Any], path: Path, before: dict[str, Any] | None = None) -> None:
    """What was run, where it went, what came out, and with which versions; the part before it under "before"."""
    record = {
        "command": f"python -m btp_export.demo.train --seed {trainer.seed} --out DIR",
        "seed": trainer.seed,
        "recipe": asdict(trainer.recipe),
        "steps": trainer.progress.step,
        "scenes": trainer.progress.scenes,
        "seconds": round(trainer.progress.seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "held_out": held_out,
        "log": trainer.progress.log,
        "before": before,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
