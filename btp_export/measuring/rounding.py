"""What rounding rows to int8 changes where ONNX Runtime multiplies four-bit weights: a run beside an exact one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from btp_export.results.verification import Int8Rows
from btp_export.running.runtime import BundleModel, load
from graphs.files.bundle import Bundle


def compare_rows(
    bundle: Bundle, images: Sequence[Any], prompts: Sequence[str], *, profile: str, tokens: int, threads: int | None
) -> Int8Rows:
    """The same pictures and prompts through the graphs with int8 rows and with float32 rows."""
    found: list[tuple[np.ndarray, list[tuple[int, ...]]]] = []
    for activations in ("float32", "int8"):
        model = load(bundle, profile=profile, threads=threads, activations=activations)
        answers = model.generate(images, prompts, max_new_tokens=tokens)
        found.append((_first_logits(model, images, prompts), [answer.token_ids for answer in answers]))
    (exact, wanted), (rounded, got) = found
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(exact, rounded, strict=True)]
    same = [one == other for one, other in zip(wanted, got, strict=True)]
    return Int8Rows(logits_cosine=min(cosines), answers_equal=sum(same) / len(same))


def _first_logits(model: BundleModel, images: Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
    """Logits [n,vocab] of the first token of as many samples as a batch holds, in float64."""
    count = model.profile.batch
    prefill = model.prefill(model.encode(images[:count], prompts[:count]))
    return np.asarray(prefill.logits, np.float64)
