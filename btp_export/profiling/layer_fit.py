"""The time of one decoder layer on S tokens as a device behaves: tau(S) = max(w, a + b S).

Few tokens take w whatever their number: the layer's weights must be read. From the corner (w - a) / b on the time
grows with the tokens: operations count, and a is what does not depend on them, 0 on an ideal device. Each side is
fitted by least squares of the relative errors. Which sizes are on the flat side is known (a device's limits tell what
memory bounds), or found where the whole fits best. Sides that were not measured stay open: noise of a few percent must
not make a corner, so both sides are only taken where one alone fits clearly worse.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]  # tokens, milliseconds of one layer
Floats = NDArray[np.float64]
NOISE: Final = 0.02  # root mean square of relative errors up to which one side alone is believed
CLEARLY: Final = 2.0  # or so many times the error of both sides


@dataclass(frozen=True)
class LayerFit:
    """`flat` is w, `base` a in milliseconds, `slope` b in milliseconds a token; None on the side that was not measured.

    `error`: by how much of it a measured time is off at most.
    """

    flat: float | None
    base: float
    slope: float | None
    error: float = 0.0

    @property
    def corner(self) -> float | None:
        """Tokens up to which a layer takes as long as for one, None where a side is open."""
        return (self.flat - self.base) / self.slope if self.flat is not None and self.slope else None

    def ms(self, tokens: float) -> float:
        """tau(tokens)."""
        return max(self.flat or 0.0, self.base + (self.slope or 0.0) * tokens)


def fit_layer(points: Points, flat: Collection[int] = ()) -> LayerFit:
    """The fit to at least one measured time. `flat`: sizes that are known to take w, if those left are two at least."""
    tokens, times = (np.array(column, np.float64) for column in zip(*sorted(points), strict=True))
    sizes = np.unique(tokens)
    known = np.isin(tokens, list(flat))
    if known.any() and len(np.unique(tokens[~known])) > 1:
        return _with_error(_fit(tokens, times, known), tokens, times)
    alone = [_fit(tokens, times, np.full(len(tokens), side)) for side in (True, False)]
    both = [_fit(tokens, times, tokens <= size) for size in sizes[:-1]]
    found = min(both, key=lambda fit: _rms(fit, tokens, times), default=alone[1])
    believed = max(NOISE, CLEARLY * _rms(found, tokens, times))
    found = next((fit for fit in alone if _rms(fit, tokens, times) <= believed), found)
    return _with_error(found, tokens, times)


def _fit(tokens: Floats, times: Floats, low: NDArray[np.bool_]) -> LayerFit:
    """Sizes where `low` on the flat side, the others on the rising one; a side without any stays open."""
    flat = _constant(times[low]) if low.any() else None
    if low.all():
        return LayerFit(flat, 0.0, None)
    base, slope = _line(tokens[~low], times[~low])
    return LayerFit(flat, base, slope)


def _constant(times: Floats) -> float:
    return float(np.sum(1 / times) / np.sum(1 / times**2))


def _line(tokens: Floats, times: Floats) -> tuple[float, float]:
    """a >= 0 and b of a + b S; a = 0 where one size was measured."""
    if len(np.unique(tokens)) > 1:
        columns = np.stack([1 / times, tokens / times], axis=1)
        base, slope = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
        if slope <= 0:
            return _constant(times), 0.0
        if base >= 0:
            return float(base), float(slope)
    share = tokens / times
    return 0.0, float(np.sum(share) / np.sum(share**2))


def _with_error(fit: LayerFit, tokens: Floats, times: Floats) -> LayerFit:
    return LayerFit(fit.flat, fit.base, fit.slope, float(np.max(np.abs(_errors(fit, tokens, times)))))


def _errors(fit: LayerFit, tokens: Floats, times: Floats) -> Floats:
    return np.array([fit.ms(size) for size in tokens]) / times - 1


def _rms(fit: LayerFit, tokens: Floats, times: Floats) -> float:
    return float(np.sqrt(np.mean(_errors(fit, tokens, times) ** 2)))
