"""When two results of BtpLinear agree, and its definition once more in float64."""

from typing import Any

import numpy as np

from graphs.ops.linear.cases import Case

SIGNIFICAND = {"float32": 23, "float16": 10, "bfloat16": 7}


def rounded_product(case: Case, *, round_w: bool = True) -> Any:
    """y [M,N] of x's type. round_w: False leaves out the rounding of w."""
    return product(case, round_w=round_w).astype(case.x.dtype)


def product(case: Case, *, round_w: bool = True) -> Any:
    """y [M,N] in float64, one number of w after the other as the definition has it; y is not rounded."""
    n, k, group = len(case.scales), case.x.shape[1], case.attributes["group"]
    flat = case.qweight.reshape(n, -1)
    w = np.empty((n, k))
    for i in range(k):
        q = (flat[:, i // 2] >> 4 * (i % 2)) & 15
        z = np.full(n, 8) if case.zeros is None else (case.zeros[:, i // group // 2] >> 4 * (i // group % 2)) & 15
        w[:, i] = (q.astype(np.int64) - z) * case.scales[:, i // group].astype(np.float64)
    w = w.astype(case.x.dtype).astype(np.float64) if round_w else w
    y = case.x.astype(np.float64) @ w.T
    return y if case.bias is None else y + case.bias.astype(np.float64)


def assert_agree(got: Any, wanted: Any) -> None:
    """got within the rounding of wanted [M,N], both of one type: a step of that type, and 1e-5 of the row's norm.

    The second part is what sums of float32 in another order differ by; for float32 it is all.
    """
    assert got.dtype == wanted.dtype, f"{got.dtype}, wanted {wanted.dtype}"
    assert got.shape == wanted.shape, f"{got.shape}, wanted {wanted.shape}"
    exact, other = wanted.astype(np.float64), got.astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - SIGNIFICAND[wanted.dtype.name])
    allowed = 1e-5 * np.linalg.norm(exact, axis=1, keepdims=True) + step
    over = np.abs(other - exact) > allowed
    assert not over.any(), f"{over.sum()} of {over.size} differ, first {other[over][:4]}, wanted {exact[over][:4]}"
