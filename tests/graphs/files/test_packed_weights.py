"""Matrices of four bits in a checkpoint: equal to loops over the definition, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.files.checkpoint import Checkpoint, open_checkpoint
from graphs.files.packed_weights import packed_linear, read_matrix, read_tensor
from graphs.files.safetensors_file import write_tensors
from graphs.packing import dequantise, pack, pack_zeros
from graphs.records.errors import InputError

RECORD = {"quant_method": "btp", "version": 1, "bits": 4, "method": "read", "source": "awq", "groups": {"16": 1}}


def by_hand(
    qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, n: int, k: int, group: int
) -> np.ndarray:
    """The contract, nibble by nibble, in Python's own numbers."""
    matrix = np.empty((n, k))
    for row in range(n):
        codes = qweight[row].reshape(-1)
        for column in range(k):
            code = int(codes[column // 2]) >> 4 * (column % 2) & 15
            place = column // group
            zero = 8 if zeros is None else int(zeros[row, place // 2]) >> 4 * (place % 2) & 15
            matrix[row, column] = (code - zero) * float(scales[row, place])
    return matrix


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, Any]:
    n, groups, group = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from([16, 32, 64]))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]))
    return {
        "codes": random.integers(0, 16, (n, groups * group)),
        "points": random.integers(0, 16, (n, groups)) if draw(st.booleans()) else None,
        "scales": random.normal(size=(n, groups)).astype(kind),
        "group": group,
    }


@settings(deadline=None)
@given(matrices())
def test_what_is_packed_stands_for_what_the_contract_says(drawn: dict[str, Any]) -> None:
    codes, points, scales, group = (drawn[key] for key in ("codes", "points", "scales", "group"))
    qweight, zeros = pack(codes, group), None if points is None else pack_zeros(points)
    n, k = codes.shape
    exact = by_hand(qweight, scales, zeros, n, k, group)
    np.testing.assert_array_equal(dequantise(qweight, scales, zeros), exact.astype(scales.dtype))
    wide = dequantise(qweight, scales, zeros, dtype=np.dtype(np.float32))
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, exact.astype(np.float32))


def folder_of(tmp_path: Path, tensors: dict[str, np.ndarray], record: dict[str, Any] | None = None) -> Checkpoint:
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": record or RECORD}))
    return open_checkpoint(tmp_path)


def tensors_of(n: int = 3, k: int = 48, group: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "a.qweight": random.integers(0, 256, (n, k // group, group // 2), np.uint8),
        "a.scales": random.normal(size=(n, k // group)).astype(np.float16),
        "a.zeros": random.integers(0, 256, (n, 2), np.uint8),
        "a.input_scale": random.normal(size=k).astype(np.float16),
        "b.weight": random.normal(size=(2, 2)).astype(np.float32),
    }


def test_what_a_checkpoint_holds_and_what_modules_get(tmp_path: Path) -> None:
    tensors = tensors_of()
    checkpoint = folder_of(tmp_path, tensors)
    linear = packed_linear(checkpoint, "a")
    assert linear is not None
    assert (linear.n, linear.k, linear.group, linear.bits) == (3, 48, 16, 4)
    assert linear.nbytes == sum(array.nbytes for name, array in tensors.items() if name.startswith("a."))
    assert packed_linear(checkpoint, "b") is None
    exact = by_hand(tensors["a.qweight"], tensors["a.scales"], tensors["a.zeros"], 3, 48, 16)
    np.testing.assert_array_equal(read_matrix(checkpoint, "a"), exact.astype(np.float16))
    scaled = exact * tensors["a.input_scale"].astype(np.float64)
    np.testing.assert_allclose(read_tensor(checkpoint, "a.weight"), scaled, rtol=1e-7)
    np.testing.assert_array_equal(read_tensor(checkpoint, "b.weight"), tensors["b.weight"])
    with pytest.raises(InputError, match=r"no tensor b\.qweight"):
        read_matrix(checkpoint, "b")
    with pytest.raises(InputError, match=r"no tensor c\.weight"):
        read_tensor(checkpoint, "c.weight")


def test_the_record_is_ours_and_no_setting_of_transformers(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, tensors_of())
    assert checkpoint.config == {}
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.groups == {16: 1}
    foreign = folder_of(tmp_path, tensors_of(), {"quant_method": "awq"})
    assert foreign.quantization is None
    assert foreign.config == {"quantization_config": {"quant_method": "awq"}}
    for change in ({"bits": 8}, {"version": 2}, {"surprise": 1}, {"groups": {"x": 1}}):
        with pytest.raises(InputError, match="not a valid record of packed weights"):
            folder_of(tmp_path, tensors_of(), RECORD | change)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("a.qweight", np.zeros((3, 6, 4), np.uint8), r"a\.qweight is U8 \[3, 6, 4\]"),  # groups of 8
        ("a.qweight", np.zeros((3, 3, 8), np.int8), r"a\.qweight is I8"),
        ("a.scales", np.zeros((3, 4), np.float16), r"a\.scales is F16 \[3, 4\]"),
        ("a.scales", np.zeros((3, 3), np.int32), r"a\.scales is I32"),
        ("a.zeros", np.zeros((3, 3), np.uint8), r"a\.zeros is U8 \[3, 3\]"),
        ("a.input_scale", np.zeros(3, np.float16), r"a\.input_scale is F16 \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    checkpoint = folder_of(tmp_path, tensors_of() | {name: array})
    with pytest.raises(InputError, match=message):
        packed_linear(checkpoint, "a")
