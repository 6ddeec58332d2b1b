"""`btp-export bench`: "btp-bench/1"."""

from typing import Literal

from pydantic import Field

from btp_export.results.base import Count, Milliseconds, Result
from graphs.dtypes import Precision
from graphs.records.record import Record
from graphs.records.stored_weights import Activations


class PrefillTimes(Record):
    """The decoder chain with selection and head. `flops_limit` is the speed-up that saved operations allow.

    It counts attention as a whole square, `causal_limit` up to its diagonal, as far as both models compute it.

    `speedup_interval` holds the median of the rounds' speed-ups with a probability of 95 % or more; null for fewer than
    6 rounds. Where it holds 1, the measurement does not tell the two apart.
    """

    full_ms: Milliseconds
    pruned_ms: Milliseconds
    speedup: float
    speedup_interval: tuple[float, float] | None = None
    flops_limit: float
    causal_limit: float | None = None
    share_of_limit: float

    @property
    def share_of_causal_limit(self) -> float | None:
        """None in documents that are older than the limit."""
        return None if self.causal_limit is None else self.speedup / self.causal_limit


class DecodeTimes(Record):
    """One token more; `speedup_interval` as that of the prefill."""

    ms_per_token: Milliseconds
    full_ms_per_token: Milliseconds
    speedup: float
    speedup_interval: tuple[float, float] | None = None


class CacheBytes(Record):
    """Key and value caches."""

    full: Count
    pruned: Count


class Operations(Record):
    """Operations in matrix products of one prefill, with whole squares of attention."""

    full: Count
    pruned: Count
    selection: Count


class Bench(Result):
    """Time and memory, pruned beside unpruned; medians in milliseconds.

    `variation` is how far the middle half of the prefill times lies apart, as a share of the median, of the model that
    varies more.
    """

    format: Literal["btp-bench/1"] = "btp-bench/1"
    prefill: PrefillTimes
    select_ms: tuple[Milliseconds, ...]  # by stage
    decode: DecodeTimes
    cache_bytes: CacheBytes
    variation: float
    vision_ms: Milliseconds
    flops: Operations
    profile: str
    batch: int = Field(ge=1)
    precision: Precision
    rounds: int
    threads: int | None
    device: str
    engine: str | None
    dummy_weights: bool
    activations: Activations | None = None  # what four-bit weights were multiplied with; null where there are none
