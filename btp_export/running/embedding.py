"""Embedding rows of tokens, read from the checkpoint as they are needed, and batches of prompts made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from btp_export.model.prompting import Encoded
from engines.chain import Batch
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile

Array = np.ndarray[Any, np.dtype[Any]]
EMBEDDING = "language_model.embed_tokens.weight"


def filled(count: int, batch: int) -> list[int]:
    """Which of `count` samples stand in a batch: the last one fills it up, and its further results are dropped."""
    return [min(place, count - 1) for place in range(batch)]


class TokenEmbedding:
    """The embedding matrix of a bundle [vocab, C], in the file; rows come in `dtype`."""

    def __init__(self, bundle: Bundle, dtype: np.dtype[Any]) -> None:
        # As a plain array: rows of a numpy.memmap are memmaps again, which takes ten times as long as reading one.
        self._table, self._dtype = np.asarray(bundle.checkpoint()[EMBEDDING].read()), dtype

    def rows(self, ids: Sequence[int] | Array) -> Array:
        """Rows [n, C] of ids [n], for reading; no others are read. Raises InputError for ids that the matrix lacks."""
        if len(ids) == 1 and 0 <= ids[0] < len(self._table):  # of each new token: no copy of the row
            return self._table[ids[0] : ids[0] + 1].astype(self._dtype, copy=False)
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._table):
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()}",
                wanted=f"ids below {len(self._table)}, the rows of the embedding",
                do="use the tokenizer that belongs to the weights",
            )
        return np.asarray(self._table[ids]).astype(self._dtype, copy=False)  # taking rows has copied them

    def batch(self, encoded: Encoded, profile: ShapeProfile, samples: Sequence[int]) -> Batch:
        """What a prefill takes of these samples, as many as the profile's batch. Text is filled up with zeros."""
        behind = profile.prefix_tokens + profile.image_tokens
        text = np.zeros((len(samples), profile.text_tokens, self._table.shape[1]), self._dtype)
        for place, number in enumerate(samples):
            ids = encoded.input_ids[number][behind:]
            text[place, : len(ids)] = self.rows(ids)
        return Batch(
            encoded.pixels(samples),
            np.stack([self.rows(encoded.input_ids[number][: profile.prefix_tokens]) for number in samples]),
            text,
            np.array([encoded.lengths[number] - 1 for number in samples], np.int32),
        )
