"""Activation-aware scales (AWQ: Lin et al., arXiv 2306.00978) for the matrices of one decoder layer.

Inputs of large magnitude deserve finer weights: columns are multiplied by s = mean|x|^alpha before rounding and the
inputs divided by it, alpha searched for the least error of the outputs. The division moves into what makes the input:

    q, k, v   <- input_layernorm            gate, up <- post_attention_layernorm
    o         <- rows of v, a head's rows for all query heads that read them        down <- rows of up

so nothing is left to do at run time. A norm is rounded to its own type first and s is what that makes of it; the rows
of v and up are scales of their codes. Then every matrix is rounded column by column, errors passed on
(calibrate/quantise/compensate.py), symmetric or not, whichever has the smaller error. Ranges are not clipped as AWQ
does it: that moved answers away (docs/decisions/four-bit-weights.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from calibrate.quantise.compensate import compensate_matrix, inverse_factor
from calibrate.quantise.layer_inputs import SHARED, InputStatistics
from calibrate.quantise.rounding import Rounded, round_matrix

ALPHAS: Final = tuple(step / 20 for step in range(20))
NORMS: Final = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
ROWS: Final = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
LEAST: Final = 1e-4  # of a magnitude


@dataclass(frozen=True)
class LayerTensors:
    """One layer's tensors in float32 by name within the layer, and the sizes that say which rows belong together."""

    weights: Mapping[str, torch.Tensor]
    heads: int  # H
    kv_heads: int  # K


@dataclass
class QuantisedLayer:
    """What a layer becomes: rounded matrices by module, and other tensors that changed, in their stored types."""

    matrices: dict[str, Rounded] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def round_layer(layer: LayerTensors, group: int, dtype: torch.dtype) -> QuantisedLayer:
    """Rounding to the nearest alone: the baseline, and what needs no pictures."""
    names = (module for members in SHARED.values() for module in members)
    return QuantisedLayer(
        {name: round_matrix(layer.weights[f"{name}.weight"], group, symmetric=False, dtype=dtype) for name in names}
    )


def search_layer(
    layer: LayerTensors,
    statistics: Mapping[str, InputStatistics],
    group: int,
    dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> QuantisedLayer:
    """Scales, then codes. `dtype` stores the codes' scales, `norm_dtype` the norms."""
    quantised = QuantisedLayer()
    weights = dict(layer.weights)
    scales: dict[str, torch.Tensor] = {}
    for name, members in SHARED.items():
        asked = _search_scale(name, [weights[f"{module}.weight"] for module in members], statistics[name], layer, group)
        scales[name] = _fold(name, asked, weights, quantised, layer, norm_dtype)
    for name, members in SHARED.items():
        inputs = statistics[name].scaled(scales[name])
        factors = [inverse_factor(gram, inputs.count) for gram in inputs.grams]
        for module in members:
            scaled = weights[f"{module}.weight"] * scales[name]
            quantised.matrices[module] = _best(scaled, inputs.rows, factors, group, dtype)
    return quantised


def _search_scale(
    name: str, matrices: list[torch.Tensor], inputs: InputStatistics, layer: LayerTensors, group: int
) -> torch.Tensor:
    """The scale [K] of least output error over all matrices that share the input; ones if none is better."""
    magnitude = inputs.magnitude if name != "o" else _alike(inputs.magnitude, layer)
    magnitude = magnitude.clamp(min=LEAST)
    exact = [inputs.rows @ matrix.T for matrix in matrices]
    sizes = [float(outputs.square().sum()) or 1.0 for outputs in exact]
    best, chosen = float("inf"), torch.ones_like(magnitude)
    for alpha in ALPHAS:
        scale = magnitude**alpha
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(min=LEAST)
        error = 0.0
        for matrix, outputs, size in zip(matrices, exact, sizes, strict=True):
            rounded = round_matrix(matrix * scale, group, symmetric=False, dtype=torch.float32).numbers() / scale
            error += float((inputs.rows @ rounded.T - outputs).square().sum()) / size
        if error < best:
            best, chosen = error, scale
    return chosen


def _alike(magnitude: torch.Tensor, layer: LayerTensors) -> torch.Tensor:
    """Of o's inputs [H D]: the mean over the query heads that read the same head of v."""
    heads = magnitude.view(layer.kv_heads, layer.heads // layer.kv_heads, -1)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def _fold(
    name: str,
    scale: torch.Tensor,
    weights: dict[str, torch.Tensor],
    quantised: QuantisedLayer,
    layer: LayerTensors,
    norm_dtype: torch.dtype,
) -> torch.Tensor:
    """Divide what makes the input by the scale; gives the scale that the columns must be multiplied by."""
    if name in NORMS:
        norm = weights[f"{NORMS[name]}.weight"]
        divided = (norm / scale).to(norm_dtype)
        sound = torch.isfinite(divided) & (divided != 0)
        stored = torch.where(sound, divided, norm.to(norm_dtype))
        quantised.others[f"{NORMS[name]}.weight"] = stored
        return torch.where(
            sound, norm / torch.where(sound, stored.float(), torch.ones_like(norm)), torch.ones_like(norm)
        )
    before = ROWS[name]
    rows = scale if name != "o" else scale.view(layer.kv_heads, layer.heads // layer.kv_heads, -1)[:, 0].reshape(-1)
    weights[f"{before}.weight"] = weights[f"{before}.weight"] / rows[:, None]
    if f"{before}.bias" in weights:
        quantised.others[f"{before}.bias"] = weights[f"{before}.bias"] / rows  # stays float32
    return scale


def _best(
    weight: torch.Tensor, rows: torch.Tensor, factors: Sequence[torch.Tensor], group: int, dtype: torch.dtype
) -> Rounded:
    """Symmetric or not, by the error of the outputs; symmetric codes store no zeros, so they win a tie."""
    exact = rows @ weight.T
    best, chosen = float("inf"), None
    for symmetric in (True, False):
        rounded = compensate_matrix(weight, factors, group, symmetric=symmetric, dtype=dtype)
        error = float((rows @ rounded.numbers().T - exact).square().sum())
        if chosen is None or error < best:
            best, chosen = error, rounded
    assert chosen is not None
    return chosen
