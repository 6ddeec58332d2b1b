"""How far a pruned model's answer is from the full model's: KL divergence and agreement at every token of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Change:
    """What pruning did to one answer of the full model, teacher-forced.

    `divergence`: KL(full || pruned) in nats, mean over the answer's tokens. `agreement`: share of them at which both
    models find the same token likeliest. `exact`: whether that is so at all of them.
    """

    divergence: float
    agreement: float
    exact: bool


def change(full: np.ndarray, pruned: np.ndarray) -> Change:
    """From both models' logits [answer, vocabulary] at the tokens of the full model's answer."""
    same = full.argmax(axis=-1) == pruned.argmax(axis=-1)
    return Change(divergence(full, pruned), float(same.mean()), bool(same.all()))


def divergence(full: np.ndarray, pruned: np.ndarray) -> float:
    """KL(full || pruned) in nats between the softmax distributions of logits [..., vocabulary], mean over the rows."""
    log_p, log_q = _log_softmax(full), _log_softmax(pruned)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return float(np.maximum(kl, 0.0).mean())  # rounding puts a difference of nothing below 0


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)  # plans differ by thousandths of a nat
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
