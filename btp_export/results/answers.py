"""`btp-export run`: "btp-run/1"."""

from typing import Literal

from btp_export.results.base import Result
from graphs.records.record import Record
from graphs.records.stored_weights import Activations


class Answer(Record):
    """One picture and prompt answered. Times are those of the batch it was part of."""

    text: str
    tokens_kept: tuple[int, ...]  # by stage
    prefill_ms: float
    decode_ms_per_token: float | None  # null for an answer of a single token
    select_ms: tuple[float, ...]
    vision_ms: float | None
    token_ids: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]  # for each stage that keeps tokens, indices into all image tokens


class RunResult(Answer, Result):
    """The first answer, and all of them under `answers`."""

    format: Literal["btp-run/1"] = "btp-run/1"
    answers: tuple[Answer, ...]
    dummy_weights: bool
    activations: Activations | None = None  # what four-bit weights were multiplied with; null where there are none
