"""How far one next-token distribution is from another."""

import numpy as np


def divergence(full: np.ndarray, pruned: np.ndarray) -> float:
    """KL(full || pruned) in nats between the softmax distributions of two rows of logits [vocabulary]."""
    log_p, log_q = _log_softmax(full), _log_softmax(pruned)
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
