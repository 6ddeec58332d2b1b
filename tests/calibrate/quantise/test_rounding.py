"""Rounding against loops over its definition; scales are folded without a trace and lower the error of the outputs."""

import numpy as np
import pytest
import torch

from calibrate.quantise.layer_inputs import SHARED, InputStatistics
from calibrate.quantise.rounding import round_matrix
from calibrate.quantise.search import LayerTensors, round_layer, search_layer

GROUP = 16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_the_nearest(symmetric: bool, dtype: torch.dtype) -> None:
    weight = drawn(5, 48)
    weight[1, :16] = 0
    weight[2, :16] = weight[2, :16].abs()  # one sign: zero stays a code
    rounded = round_matrix(weight, GROUP, symmetric=symmetric, dtype=dtype)
    assert rounded.scales.dtype == dtype
    for row in range(5):
        for group in range(3):
            part = weight[row, 16 * group : 16 * group + 16].double().numpy()
            scale, zero = float(rounded.scales[row, group]), int(rounded.zeros[row, group])
            low, high = min(part.min(), 0), max(part.max(), 0)
            exact = abs(part).max() / 7 if symmetric else (high - low) / 15
            assert scale == pytest.approx(exact or 1, rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
            assert zero == (8 if symmetric else round(-low / scale))
            for place in range(16):
                tried = [(code - zero) * scale for code in range(16)]
                nearest = min(abs(part[place] - number) for number in tried)
                got = float(rounded.numbers()[row, 16 * group + place])
                assert abs(part[place] - got) == pytest.approx(nearest, abs=1e-6)


def layer_of(hidden: int = 32, heads: int = 4, kv_heads: int = 2, middle: int = 48) -> LayerTensors:
    size = hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv_heads * size, hidden),
        "self_attn.v_proj": (kv_heads * size, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle),
    }  # fmt: skip
    weights = {f"{name}.weight": drawn(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    weights |= {
        f"{norm}.weight": 1 + drawn(hidden, seed=20).abs() for norm in ("input_layernorm", "post_attention_layernorm")
    }
    return LayerTensors(weights | {"self_attn.v_proj.bias": drawn(kv_heads * size, seed=30)}, heads, kv_heads)


def statistics_of(layer: LayerTensors) -> dict[str, InputStatistics]:
    """Inputs with a few loud channels."""
    collected = {}
    for place, (name, members) in enumerate(SHARED.items()):
        k = layer.weights[f"{members[0]}.weight"].shape[1]
        rows = drawn(200, k, seed=40 + place) * torch.exp(1.5 * drawn(k, seed=50 + place))
        collected[name] = InputStatistics(rows.abs().mean(dim=0), [rows.T @ rows], rows, len(rows))
    return collected


def test_scales_are_folded_without_a_trace_and_lower_the_error() -> None:
    """Undoing what moved into norms and rows, the layer computes what it did; and nearer than plain rounding."""
    layer, half = layer_of(), torch.float16
    inputs = statistics_of(layer)
    result, plain = search_layer(layer, inputs, GROUP, half, half), round_layer(layer, GROUP, half)
    w = layer.weights
    moved = {"self_attn.v_proj": 0.0, "mlp.up_proj": 0.0}
    for name, norm in (("qkv", "input_layernorm"), ("gate_up", "post_attention_layernorm")):
        stored = result.others[f"{norm}.weight"]
        assert stored.dtype == half
        factor = stored.float() / w[f"{norm}.weight"]  # of the input
        for module in SHARED[name]:
            effective = result.matrices[module].numbers() * factor
            if module not in moved:
                _nearer(inputs[name].rows, w[f"{module}.weight"], effective, plain.matrices[module].numbers())
            else:
                moved[module] = effective
    rows = result.others["self_attn.v_proj.bias"] / w["self_attn.v_proj.bias"]
    spread = rows.view(2, 1, -1).expand(2, 2, -1).reshape(-1)
    assert not torch.allclose(rows, torch.ones_like(rows)), "o's inputs are loud in some channels"
    near = {"v": moved["self_attn.v_proj"] / rows[:, None], "o": result.matrices["self_attn.o_proj"].numbers() * spread}
    for (name, matrix), read, factor in zip(near.items(), ("qkv", "o"), (1.1, 0.8), strict=True):
        module = f"self_attn.{name}_proj"
        _nearer(inputs[read].rows, w[f"{module}.weight"], matrix, plain.matrices[module].numbers(), factor)


def _nearer(
    rows: torch.Tensor, exact: torch.Tensor, made: torch.Tensor, plain: torch.Tensor, factor: float = 0.8
) -> None:
    wanted = rows @ exact.T
    mine, baseline = (float((rows @ matrix.T - wanted).square().sum()) for matrix in (made, plain))
    assert mine < factor * baseline
    np.testing.assert_array_less(mine, 0.2 * float(wanted.square().sum()))
