"""What a user may choose of a calibration: read from text, and checked before any long work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graphs.dtypes import Precision
from graphs.records.errors import InputError
from graphs.records.plan import Importance, SpatialMetric

MOST_SAMPLES = 4096
DEFAULT_SAMPLES = 64
TUNED_SAMPLES = 128  # for a search, which a handful of samples would lead astray
ANSWER_TOKENS = 16  # of the model's own answer to each prompt
MOST_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class CalibrationSettings:
    """What the user may choose.

    The samples: `images` None are drawn pictures in the shares of `mix` (None: all kinds that the model's picture size
    can hold), else a folder, a JSONL file or `hf:owner/name[:split]`. Of each answer at most `answer_tokens` are looked
    at; a plan that moves a kind of picture by more than `kind_bound` nats a token is refused.
    The budget: a compression, counts `keep` or a latency share, else a compression of 0.78; `latency_from` is a
    measurement that the share and the cost are taken from, `target` a device whose limits they follow, with the model's
    weights or "int4" ones. Everything else are the switches of the method.
    """

    images: str | None = None
    prompts: Path | None = None
    mix: str | None = None
    samples: int = DEFAULT_SAMPLES
    answer_tokens: int = ANSWER_TOKENS
    kind_bound: float | None = None
    compression: float | None = None
    keep: tuple[int, ...] | None = None
    latency_share: float | None = None
    latency_from: Path | None = None
    target: str | None = None
    weights: str = "model"
    stages: tuple[int, ...] | None = None
    balance: tuple[float, ...] | None = None
    importance: Importance = "last-token"
    spatial_metric: SpatialMetric = "euclidean"
    rebalance: bool = True
    spatial: bool = True
    drop_bound: float | None = None
    tune: bool = False
    tau: float | None = None
    cache: bool = True
    seed: int = 0
    device: str = "auto"  # cpu, cuda, cuda:<n>; auto: a GPU if there is one
    maths: Precision = "float32"  # what the model computes in
    ray: str | None = None  # address of a cluster that the samples are spread over


def parse_keep(text: str) -> tuple[int, ...]:
    """ "288,144,48,0" -> (288, 144, 48, 0). Raises InputError if it is not a list of whole numbers."""
    return tuple(int(part) for part in _parse(text, "--keep", int, "whole numbers", "288,144,48,0"))


def parse_stages(text: str) -> tuple[int, ...]:
    """ "3,6,14,22" -> (3, 6, 14, 22). Raises InputError if it is not a list of whole numbers."""
    return tuple(int(part) for part in _parse(text, "--stages", int, "whole numbers", "3,6,14,22"))


def parse_shares(text: str, flag: str = "--balance", example: str = "0.4,0.7,1.0") -> tuple[float, ...]:
    """ "0.4,0.7,1.0" -> (0.4, 0.7, 1.0). Raises InputError if it is not a list of numbers from 0 to 1."""
    shares = _parse(text, flag, float, "numbers from 0 to 1", example)
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise InputError(f"{flag} {text}", wanted="numbers from 0 to 1 with commas", do=f"{flag} {example}")
    return tuple(shares)


def _parse(text: str, flag: str, kind: Callable[[str], float], what: str, example: str) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} {text}", wanted=f"{what} with commas", do=f"{flag} {example}") from error


def check_settings(settings: CalibrationSettings) -> None:
    """Raise InputError for settings out of range."""
    if not 1 <= settings.samples <= MOST_SAMPLES:
        raise InputError(f"--samples {settings.samples}", wanted=f"1 to {MOST_SAMPLES}", do="--samples 64")
    if settings.tau is not None and not -1.0 < settings.tau < 1.0:
        raise InputError(f"--tau {settings.tau}", wanted="a cosine between -1 and 1", do="--tau 0.93")
    if settings.drop_bound is not None and not settings.drop_bound > 0.0:
        raise InputError(f"--drop-bound {settings.drop_bound}", wanted="nats above 0", do="--drop-bound 0.02")
    if settings.weights != "model" and settings.target is None:
        raise InputError(f"--weights {settings.weights} without --target", wanted="both", do="--target NAME")
    if settings.target is not None and settings.latency_from is not None:
        raise InputError("both --target and --latency-from", wanted="one cost", do="leave one out")
    if settings.mix is not None and settings.images is not None:
        raise InputError("--mix with --images", wanted="drawn pictures, or your own", do="leave one of them out")
    if not 1 <= settings.answer_tokens <= MOST_ANSWER_TOKENS:
        raise InputError(
            f"--answer-tokens {settings.answer_tokens}", wanted=f"1 to {MOST_ANSWER_TOKENS}", do="--answer-tokens 16"
        )
    if settings.kind_bound is not None and not settings.kind_bound > 0.0:
        raise InputError(f"--kind-bound {settings.kind_bound}", wanted="nats above 0", do="--kind-bound 1")
    if settings.prompts is not None and settings.images is None:
        raise InputError("--prompts without --images", wanted="pictures to ask about", do="--images DIR --prompts FILE")
    if not 0 <= settings.seed < 2**24:
        raise InputError(f"--seed {settings.seed}", wanted="0 to 16777215", do="--seed 0")
    _check_budget(settings)


def _check_budget(settings: CalibrationSettings) -> None:
    compression, share = settings.compression, settings.latency_share
    if compression is not None and not 0.0 <= compression < 1.0:
        raise InputError(f"--compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    if share is not None and not 0.0 < share < 1.0:
        raise InputError(f"--latency-share {share}", wanted="a number above 0 and below 1", do="--latency-share 0.3")
    budgets = {"--compression": compression, "--keep": settings.keep, "--latency-share": share}
    given = [flag for flag, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"both {' and '.join(given[:2])}", wanted="one of them", do="leave one out")
