"""What calibration measures on the unpruned model: where image tokens change, and where they still matter.

Two observers of the streamed reference, both finished in the one pass over the weights:

- `ChangeObserver`: for each layer the image tokens whose hidden state turns, cosine(input, output) < tau, and the
  attention that the prompt's last token pays to the image.
- `DropObserver`: for each layer the model's answer if every image token were dropped right before that layer. Only the
  text rows are needed for that, so all layers together cost about as much as a few more tokens.

Both look at whole answers: the full model's own, whose tokens ride behind the prompt (calibrate/reference/answers.py).

`Statistics` is what they found, as plain arrays: all that the rest of the calibration looks at, and what is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from calibrate.reference.decoder import forward
from calibrate.reference.observers import LayerView
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.pruning.torch_scores import attention_weights
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report

TOP_SHARES = (0.05, 0.1, 0.25, 0.5)
BOOTSTRAP_SIZES = (16, 64, 256)  # a quarter of the default, the default, four times as many
BOOTSTRAP_ROUNDS = 200  # a standard deviation is known to about 5 % then
_BRANCHES_A_HEAD = 8  # go through the output matrix together: 16 tokens of each are 33 MB a thousand words


@dataclass(frozen=True)
class Statistics:
    """What one unpruned pass over n samples of a decoder of L layers found.

    `counts` [n, L, taus] changed image tokens at each of `taus`; `attention` [n, L] attention mass of the prompt's last
    token on the image; `top_shares` [n, L, 4] the share of it that the best tokens hold (TOP_SHARES of them).
    `answers` [positions] are the ids of the answers, one after another, `lengths` [n] how many each sample has;
    `logits` [positions, vocabulary] float32 the unpruned model's at each of them. Of the first m samples: `divergence`
    [m, L] and `agreement` [m, L] as DropObserver measures them.
    """

    taus: tuple[float, ...]
    counts: np.ndarray
    attention: np.ndarray
    top_shares: np.ndarray
    divergence: np.ndarray
    agreement: np.ndarray
    logits: np.ndarray
    answers: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Statistics]) -> Statistics:
        """Those of samples that were measured a part at a time, as if they had been one."""

        def all_of(name: str) -> np.ndarray:
            arrays = [getattr(part, name) for part in parts]
            return np.concatenate([array for array in arrays if len(array)] or arrays[:1])

        names = [each.name for each in fields(Statistics) if each.name != "taus"]
        return Statistics(taus=parts[0].taus, **{name: all_of(name) for name in names})

    def each(self) -> list[Statistics]:
        """Those of every sample by itself: `joined` makes one of them again."""
        parts = []
        for number, end in enumerate(np.cumsum(self.lengths)):
            one, tokens = slice(number, number + 1), slice(end - self.lengths[number], end)
            parts.append(
                Statistics(
                    taus=self.taus,
                    counts=self.counts[one],
                    attention=self.attention[one],
                    top_shares=self.top_shares[one],
                    divergence=self.divergence[one],
                    agreement=self.agreement[one],
                    logits=self.logits[tokens],
                    answers=self.answers[tokens],
                    lengths=self.lengths[one],
                )
            )
        return parts

    @property
    def samples(self) -> int:
        """n, the samples that were looked at."""
        return len(self.counts)

    def logits_of(self) -> list[np.ndarray]:
        """The logits [answer, vocabulary] of each sample."""
        return np.split(self.logits, np.cumsum(self.lengths)[:-1])

    def answered(self, inputs: Sequence[ReferenceInput]) -> list[ReferenceInput]:
        """The samples with their answers behind them: each token but the last, which nothing follows."""
        ids = np.split(self.answers, np.cumsum(self.lengths)[:-1])
        pairs = zip(inputs, ids, strict=True)
        return [replace(prompt, new_tokens=tuple(int(token) for token in answer[:-1])) for prompt, answer in pairs]

    def counts_at(self, tau: float) -> np.ndarray:
        """Changed tokens [n, L] at one of `taus`."""
        chosen: np.ndarray = self.counts[:, :, self.taus.index(tau)]
        return chosen

    def mean_top_shares(self) -> dict[str, list[float]]:
        """Share of the attention held by the best 5, 10, 25 and 50 % of the tokens, by layer, mean over samples."""
        mean = self.top_shares.mean(axis=0)  # [L, shares]
        return {f"{share:g}": rounded(mean[:, n]) for n, share in enumerate(TOP_SHARES)}


def measure(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    unpruned: PruningPlan,
    *,
    taus: tuple[float, ...],
    dropped: int,
    progress: Report | None = None,
) -> Statistics:
    """One unpruned pass over all inputs, whose `new_tokens` are their answers but for the last token.

    Dropping is measured on the first `dropped` of them.
    """
    change, drop = ChangeObserver(taus), DropObserver(min(dropped, len(inputs)))
    runs = reference.run(inputs, unpruned, observers=(change, drop), progress=progress)
    order = range(len(inputs))
    return Statistics(
        taus=taus,
        counts=np.array([change.counts[run] for run in order], dtype=np.int64),
        attention=np.array([change.attention[run] for run in order], dtype=np.float64),
        top_shares=np.array([change.top_shares[run] for run in order], dtype=np.float64),
        divergence=drop.divergence.astype(np.float64),
        agreement=drop.agreement.astype(bool),
        logits=np.concatenate([run.logits for run in runs]).astype(np.float32),
        answers=np.concatenate(
            [[*sample.new_tokens, run.next_tokens[-1]] for sample, run in zip(inputs, runs, strict=True)]
        ),
        lengths=np.array([len(run.logits) for run in runs]),
    )


@dataclass
class ChangeObserver:
    """Counts changed image tokens per run and layer, at each of `taus`, the cosine below which a token has changed."""

    taus: tuple[float, ...]
    counts: dict[int, list[list[int]]] = field(default_factory=dict)  # by run, then layer, then tau
    attention: dict[int, list[float]] = field(default_factory=dict)  # attention mass on the image, last prompt token
    top_shares: dict[int, list[list[float]]] = field(default_factory=dict)  # by layer: TOP_SHARES of that mass

    def see(self, view: LayerView) -> None:
        """Record one layer of one unpruned run."""
        image = slice(view.image_start, view.image_start + view.image_tokens)
        counts = changed_tokens(view.hidden_in[0, image], view.hidden_out[0, image], self.taus)
        self.counts.setdefault(view.run, []).append(counts)
        query, key = view.query[:, :, view.last : view.last + 1], view.key[:, :, : view.last + 1]
        visible = torch.ones(1, 1, 1, view.last + 1, dtype=torch.bool, device=key.device)
        scores = attention_weights(query, key, visible)[0, :, 0, image].mean(0).double()
        mass = float(scores.sum())
        self.attention.setdefault(view.run, []).append(mass)
        ordered = scores.sort(descending=True).values.cumsum(0) / max(mass, 1e-30)  # in some layers it is 0
        tops = [float(ordered[max(1, round(share * len(ordered))) - 1]) for share in TOP_SHARES]
        self.top_shares.setdefault(view.run, []).append(tops)

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Nothing is left to do after the last layer."""

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """What was counted so far, see calibrate/reference/pass_checkpoints.py."""
        return {}, [[list(part.items()) for part in (self.counts, self.attention, self.top_shares)], list(self.taus)]

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Any) -> None:
        """Take up such a state."""
        self.counts, self.attention, self.top_shares = (dict(items) for items in rest[0])


@dataclass
class DropObserver:
    """Per run the branches that lost every image token before layer 1, 2, ..., L-1, run on as text only.

    Afterwards `divergence` [samples, L]: KL(full || dropped before that layer) in nats, mean over the answer's tokens
    (entry 0: before layer 0, that is without the picture), and `agreement`, whether the likeliest token is the same at
    all of them.
    """

    runs: int  # only the first so many runs are measured
    branches: dict[int, torch.Tensor] = field(default_factory=dict)  # by run: [branches, P + T + answer - 1, C]
    full: dict[int, torch.Tensor] = field(default_factory=dict)  # by run: hidden from the last token on, [answer, C]
    lasts: dict[int, int] = field(default_factory=dict)
    divergence: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    agreement: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def see(self, view: LayerView) -> None:
        """Run the branches of one run through the layer, and branch off before the next one."""
        if view.run >= self.runs:
            return
        text = _text_rows(view.hidden_in.shape[1], view.image_start, view.image_tokens, view.hidden_in.device)
        branches = [] if view.run not in self.branches else [self.branches[view.run]]
        branches.append(view.hidden_in[:, text])
        stepped = forward(view.module, torch.cat(branches), view.cos[:, text], view.sin[:, text])
        self.branches[view.run] = stepped
        self.full[view.run] = view.hidden_out[0, view.last :]
        self.lasts[view.run] = view.last - view.image_tokens

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """The branches so far, see calibrate/reference/pass_checkpoints.py."""
        tensors = {f"branches.{run}": tensor for run, tensor in self.branches.items()}
        return tensors | {f"full.{run}": tensor for run, tensor in self.full.items()}, list(self.lasts.items())

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Any) -> None:
        """Take up such a state."""
        parts = [(name.partition("."), tensor) for name, tensor in tensors.items()]
        self.branches = {int(run): tensor for (kind, _, run), tensor in parts if kind == "branches"}
        self.full = {int(run): tensor for (kind, _, run), tensor in parts if kind == "full"}
        self.lasts = dict(rest)

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Compare the next-token distributions of the branches with the full model's."""
        divergence, agreement = [], []
        for run in sorted(self.branches):
            # In float64: dropping late changes so little that float32's rounding would be most of it.
            full = torch.log_softmax(head(self.full[run]).double(), dim=-1)  # [answer, vocabulary]
            kl, same = [], []
            for branches in torch.split(self.branches[run][:, self.lasts[run] :], _BRANCHES_A_HEAD):
                logs = torch.log_softmax(head(branches).double(), dim=-1)  # [branches, answer, vocabulary]
                kl.append((full.exp() * (full - logs)).sum(-1).clamp_min(0).mean(-1))
                same.append((logs.argmax(-1) == full.argmax(-1)).all(-1))
            divergence.append(torch.cat(kl).cpu().numpy())
            agreement.append(torch.cat(same).cpu().numpy())
        self.branches.clear()  # the passes over candidates need the memory
        self.divergence, self.agreement = np.array(divergence), np.array(agreement)


def changed_tokens(before: torch.Tensor, after: torch.Tensor, taus: Sequence[float]) -> list[int]:
    """How many tokens turn by more than each tau allows: cosine(before, after) < tau, rows of [V, C], in float32."""
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return [int((cosine < tau).sum()) for tau in taus]


def bootstrap_spread(
    values: np.ndarray, *, seed: int, sizes: Sequence[int] = BOOTSTRAP_SIZES, rounds: int = BOOTSTRAP_ROUNDS
) -> dict[str, list[float]]:
    """Standard deviation over bootstrap samples of the mean of `values` [samples, L], by sample size: {"16": [L], ...}.

    It says how far a calibration on so many pictures would be from another one.
    """
    rng = np.random.default_rng(seed)
    spread = {}
    for size in sizes:
        means = np.stack([values[draw].mean(axis=0) for draw in rng.integers(len(values), size=(rounds, size))])
        spread[str(size)] = rounded(means.std(axis=0))
    return spread


def _text_rows(rows: int, image_start: int, image_tokens: int, device: torch.device) -> torch.Tensor:
    """Rows that are not image: the prefix, the text and the answer."""
    after = torch.arange(image_start + image_tokens, rows)
    return torch.cat([torch.arange(image_start), after]).to(device)


def rounded(values: np.ndarray) -> list[float]:
    """As a record holds them: six digits."""
    return [round(float(value), 6) for value in values]
