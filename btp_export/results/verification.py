"""`btp-export verify`: "btp-verify/1"."""

from collections.abc import Mapping
from typing import Literal

from btp_export.results.base import Number, Result
from graphs.dtypes import Precision
from graphs.records.record import Record
from graphs.records.stored_weights import Activations


class GateValues(Record):
    """What a graph had to hold: the least cosine, and how far the norm ratio may be from 1."""

    cosine: float
    norm_ratio_within: float


class AppliedGates(GateValues):
    """What the decoder's graphs had to hold, and the kept tokens of graphs and of free runs."""

    kept_agreement: float
    free_run_agreement: float | None = None  # null in documents that are older


class GraphParity(Record):
    """One graph against the reference, the worst over samples and outputs; `worst` is where the cosine was lowest.

    Numbers that are not finite are null, and such a graph does not pass. `gates` are those it was judged by: a graph
    that is computed in another type than it is stored in has that type's.
    """

    name: str
    profile: str
    cosine: Number
    norm_ratio: Number
    max_abs: Number
    worst: str
    gates: GateValues


class Int8Rows(Record):
    """What `run` does where it rounds rows to int8, beside the exact products that were verified.

    `logits_cosine` is the least of the first tokens' logits, `answers_equal` the share of samples with the same tokens.
    """

    logits_cosine: float
    answers_equal: float


class Verification(Result):
    """A bundle against transformers' own modelling code.

    `computed_in` is what the decoder graphs computed in, `precision` what they are stored in, `maths` what the
    reference computed in. `near_ties` names differences between choices that are equal within rounding.
    """

    format: Literal["btp-verify/1"] = "btp-verify/1"
    passed: bool
    graphs: tuple[GraphParity, ...]
    kept_agreement: tuple[float, ...]  # by stage
    tokens_equal: bool
    samples: int
    tokens: int  # generated tokens of each sample that were compared
    profile: str  # the first of `profiles`
    profiles: tuple[str, ...]
    engine: str | None
    streamed: bool
    maths: Precision
    precision: Precision
    computed_in: Precision
    dummy_weights: bool
    gates: AppliedGates
    failures: tuple[str, ...]
    near_ties: tuple[str, ...]
    activations: Activations | None = None  # what four-bit weights were multiplied with; null where there are none
    int8_rows: Int8Rows | None = None  # null too where one layer is open at a time


class FilesVerified(Result):
    """The files of a bundle, each hashed and found as it was exported; what differs is an error and no document."""

    format: Literal["btp-files/1"] = "btp-files/1"
    passed: Literal[True] = True
    files: int
    bytes: int


def joined(verifications: Mapping[str, Verification]) -> Verification:
    """One document of verifications by profile: kept agreement is the least, of what differs otherwise the first's."""
    parts = list(verifications.values())
    if len(parts) == 1:
        return parts[0]
    return parts[0].model_copy(
        update={
            "passed": all(part.passed for part in parts),
            "graphs": tuple(graph for part in parts for graph in part.graphs),
            "kept_agreement": tuple(min(shares) for shares in zip(*(p.kept_agreement for p in parts), strict=True)),
            "tokens_equal": all(part.tokens_equal for part in parts),
            "profiles": tuple(verifications),
            "streamed": any(part.streamed for part in parts),
            "failures": tuple(f"{name}: {text}" for name, part in verifications.items() for text in part.failures),
            "near_ties": tuple(f"{name}: {text}" for name, part in verifications.items() for text in part.near_ties),
        }
    )
