"""A bundle in ONNX Runtime, as btp_export runs it."""

from collections.abc import Sequence

import numpy as np

from benchmarks.peers import Array, Given, Opened, Program
from btp_export.running.runtime import BundleModel, load
from engines.chain import Batch


class Ours:
    """The image's rows are embedding rows too, so that text-only programs compute the same."""

    def __init__(self, model: BundleModel, ids: Array) -> None:
        self._chain, self._embedding = model.chain, model._embedding
        profile = model.profile
        first, behind = profile.prefix_tokens, profile.prefix_tokens + profile.image_tokens
        rows = np.stack([self._embedding.rows(sample) for sample in ids])
        pixels = np.zeros(profile.pixel_input(model.spec.vision.channels), np.float32)
        last = np.full(len(ids), ids.shape[1] - 1, np.int32)
        self._batch = Batch(pixels, rows[:, :first], rows[:, behind:], last)
        self._vision = {"image_features": rows[:, first:behind]}

    def prefill(self) -> Array:
        return self._chain.prefill(self._batch, vision=self._vision).logits

    def step(self, ids: Sequence[int]) -> Array:
        return self._chain.decode(self._embedding.rows(ids))


def _open(given: Given) -> Opened:
    return Ours(load(given.folder, profile=given.more.get("profile"), threads=given.threads), np.array(given.ids))


PROGRAM = Program("BTP Export", "onnxruntime", _open)
