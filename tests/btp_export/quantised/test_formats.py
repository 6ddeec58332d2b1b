"""Every weight of every format equals its own formula; variants that are not read are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btp_export.quantised.formats import Format, find_format, known_formats, refuse_gguf
from graphs.files.checkpoint import TensorRef, open_tensors
from graphs.files.safetensors_file import write_tensors
from graphs.records.errors import InputError
from tests.btp_export.quantised.packers import (
    Layer,
    draw_layer,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_modelopt,
)

FORMATS = known_formats()
V2 = {"checkpoint_format": "gptq_v2"}
ONE_GROUP: dict[str, Any] = {"config_groups": {"group_0": {"weights": {}}}}
# form, settings of the checkpoint, packer, whether the format has no zeros of its own
VARIANTS: dict[str, tuple[str, dict[str, Any], Callable[[Layer], dict[str, np.ndarray]], bool]] = {
    "awq": ("awq", {}, pack_awq, False),
    "gptq 1": ("gptq", {}, pack_gptq, False),
    "gptq 1 without g_idx": ("gptq", {}, lambda layer: pack_gptq(layer, g_idx=False), False),
    "gptq 2": ("gptq", V2, lambda layer: pack_gptq(layer, version=2), False),
    "gptq 2 by its other name": ("gptq", {"format": "gptq_v2"}, lambda layer: pack_gptq(layer, version=2), False),
    "compressed-tensors symmetric": (
        "compressed_tensors",
        {},
        lambda layer: pack_compressed(layer, zeros="none"),
        True,
    ),
    "compressed-tensors": ("compressed_tensors", {}, pack_compressed, False),
    "compressed-tensors, bytes": (
        "compressed_tensors",
        {},
        lambda x: pack_compressed(x, zeros="bytes"),
        False,
    ),
    "modelopt": ("modelopt", {}, pack_modelopt, True),
}


def parts_of(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, TensorRef]:
    write_tensors(folder / "one.safetensors", {f"q_proj.{part}": array for part, array in tensors.items()})
    return {name.rpartition(".")[2]: ref for name, ref in open_tensors(folder / "one.safetensors").items()}


def read(folder: Path, form: Format, tensors: dict[str, np.ndarray], fields: dict[str, Any] | None = None) -> Any:
    parts, chosen = parts_of(folder, tensors), fields or ONE_GROUP
    matrix = form.matrix(parts, chosen)
    n, k, group = form.shape(parts, chosen)
    assert matrix.qweight.shape == (n, k // group, group // 2)
    return matrix


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_every_weight_is_what_the_formula_says(variant: str, drawn: st.DataObject, tmp_path: Path) -> None:
    name, fields, pack, symmetric = VARIANTS[variant]
    group = drawn.draw(st.sampled_from([16, 32, 48, 64, 128]))
    k = group * drawn.draw(st.integers(1, 3))
    n = 8 * drawn.draw(st.integers(1, 3))
    dtype = drawn.draw(st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]))
    random = np.random.default_rng(drawn.draw(st.integers(0, 2**20)))
    layer = draw_layer(random, n, k, group, symmetric=symmetric, dtype=dtype)
    matrix = read(tmp_path, FORMATS[name], pack(layer), fields)
    assert matrix.scales.dtype == dtype
    np.testing.assert_array_equal(matrix.numbers(np.dtype(np.float32)), layer.numbers().astype(np.float32))
    assert (matrix.zeros is None) == bool((layer.zeros == 8).all())


def test_a_scale_for_a_whole_row_is_written_out(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(0), 8, 96, 96)
    matrix = read(tmp_path, FORMATS["compressed_tensors"], pack_compressed(layer))
    assert matrix.scales.shape == (8, 3), "groups of 32 divide 96"
    np.testing.assert_array_equal(matrix.numbers(np.dtype(np.float32)), layer.numbers().astype(np.float32))


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_activation_order_that_keeps_groups_whole(order: list[int], tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(1), 8, 96, 32)
    layer.groups = np.repeat(order, 32)
    matrix = read(tmp_path, FORMATS["gptq"], pack_gptq(layer))
    assert matrix.scales.shape == (8, 3)
    np.testing.assert_array_equal(matrix.numbers(np.dtype(np.float32)), layer.numbers().astype(np.float32))


def test_activation_order_in_smaller_blocks_is_written_out(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(2), 8, 128, 64)
    layer.groups = np.repeat([0, 1, 1, 0], 32)
    matrix = read(tmp_path, FORMATS["gptq"], pack_gptq(layer))
    assert matrix.scales.shape == (8, 4)
    np.testing.assert_array_equal(matrix.numbers(np.dtype(np.float32)), layer.numbers().astype(np.float32))


def test_activation_order_that_splits_groups_is_refused(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(3), 8, 96, 32)
    layer.groups = np.random.default_rng(3).permutation(layer.groups)
    with pytest.raises(InputError, match=r"q_proj\.g_idx splits the groups"):
        read(tmp_path, FORMATS["gptq"], pack_gptq(layer))
    tensors = pack_compressed(layer) | {"weight_g_idx": layer.groups.astype(np.int32)}
    with pytest.raises(InputError, match=r"weight_g_idx splits the groups"):
        read(tmp_path, FORMATS["compressed_tensors"], tensors)


def gptq_with_zero_16() -> dict[str, np.ndarray]:
    layer = draw_layer(np.random.default_rng(4), 8, 32, 16)
    layer.zeros[3, 1] = 16  # stored as 15
    return pack_gptq(layer)


def changed(pack: Callable[[Layer], dict[str, np.ndarray]], **changes: Any) -> dict[str, np.ndarray]:
    tensors = pack(draw_layer(np.random.default_rng(5), 8, 64, 32))
    return {part: changes[part](array) if part in changes else array for part, array in tensors.items()}


def with_nan(scales: np.ndarray) -> np.ndarray:
    scales = scales.copy()
    scales[0, 0] = np.nan
    return scales


def one_less(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[:-1])


BAD: dict[str, tuple[str, Callable[[], dict[str, np.ndarray]], str]] = {
    "zeros above 15": ("gptq", gptq_with_zero_16, r"qzeros holds zeros above 15"),
    "groups that do not divide K, awq": (
        "awq",
        lambda: changed(pack_awq, scales=lambda s: np.concatenate([s, s[:1]])),
        r"scales has 3 groups for 64 inputs",
    ),
    "groups that do not divide K, gptq": (
        "gptq",
        lambda: changed(pack_gptq, scales=lambda s: np.concatenate([s, s[:1]])),
        r"scales has 3 groups for 64 inputs",
    ),
    "groups of 8": (
        "compressed_tensors",
        lambda: pack_compressed(draw_layer(np.random.default_rng(6), 8, 64, 8)),
        "groups of 8 in rows of 64",
    ),
    "qweight of another shape, awq": ("awq", lambda: changed(pack_awq, qweight=one_less), "scales has 2 groups for 63"),
    "qzeros of another shape": ("awq", lambda: changed(pack_awq, qzeros=one_less), r"qzeros is I32 \[1, 1\]"),
    "another type": ("awq", lambda: changed(pack_awq, qweight=lambda q: q.astype(np.int8)), r"qweight is I8 \[64, 1\]"),
    "fewer rows": (
        "compressed_tensors",
        lambda: changed(pack_compressed, weight_packed=one_less),
        r"weight_packed is I32 \[7, 8\]",
    ),
    "NaN scales, awq": ("awq", lambda: changed(pack_awq, scales=with_nan), r"scales holds nan"),
    "NaN scales, compressed-tensors": (
        "compressed_tensors",
        lambda: changed(pack_compressed, weight_scale=with_nan),
        r"scales holds nan at \[0, 0\]",
    ),
    "no scales": (
        "modelopt",
        lambda: {"weight": np.zeros((4, 32), np.uint8), "pre_quant_scale": np.ones(32, np.float16)},
        r"no q_proj\.weight_scale",
    ),
    "no codes": ("awq", lambda: changed(pack_awq, qweight=lambda q: q[:0]), r"qweight is I32 \[0, 1\]"),
    "codes in a row": ("gptq", lambda: changed(pack_gptq, qweight=lambda q: q.reshape(-1)), r"qweight is I32 \[64\]"),
    "8 bits, gptq": ("gptq", lambda: changed(pack_gptq, g_idx=lambda g: g[:32].copy()), "8 bits a weight"),
}


INCOMPLETE: dict[str, tuple[str, dict[str, Any], Callable[[Layer], dict[str, np.ndarray]], str]] = {
    "order without its index, gptq": (
        "gptq",
        {"desc_act": True},
        lambda layer: pack_gptq(layer, g_idx=False),
        r"no q_proj\.g_idx",
    ),
    "asymmetric without zeros": (
        "compressed_tensors",
        {"config_groups": {"group_0": {"weights": {"symmetric": False}}}},
        lambda layer: pack_compressed(layer, zeros="none"),
        r"no q_proj\.weight_zero_point",
    ),
    "order without its index": (
        "compressed_tensors",
        {"config_groups": {"group_0": {"weights": {"actorder": "group"}}}},
        pack_compressed,
        r"no q_proj\.weight_g_idx",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_tensors_that_the_settings_promise_must_be_there(case: str, tmp_path: Path) -> None:
    name, fields, pack, message = INCOMPLETE[case]
    tensors = pack(draw_layer(np.random.default_rng(8), 8, 64, 32))
    with pytest.raises(InputError, match=message):
        read(tmp_path, FORMATS[name], tensors, fields)


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_cannot_be_are_refused(case: str, tmp_path: Path) -> None:
    name, tensors, message = BAD[case]
    with pytest.raises(InputError, match=message):
        read(tmp_path, FORMATS[name], tensors())


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}


def compressed(**weights: Any) -> dict[str, Any]:
    other = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 4, "type": "int"} | weights}
    return COMPRESSED | {"config_groups": {**COMPRESSED["config_groups"], "group_1": other}}


AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4}
READ_BY: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "AWQ by GPTQModel": (AWQ | {"checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32"}, None, "awq"),
    "AutoAWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        None,
        "awq",
    ),
    "AutoGPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, None, "gptq"),
    "GPTQModel": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "dynamic": {}}, None, "gptq"),
    "llm-compressor": (COMPRESSED, None, "compressed-tensors"),
    "two groups of four bits": (compressed(strategy="channel"), None, "compressed-tensors"),
    "ModelOpt": ({}, {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False}, "modelopt"),
    "ModelOpt, newer": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        {"quant_algo": "W4A16_AWQ"},
        "modelopt",
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "gemv": ({"quant_method": "awq", "version": "gemv"}, None, 'AWQ: version is "gemv"'),
    "gemv by transformers' word": (AWQ | {"format": "gemv"}, None, 'AWQ: format is "gemv"'),
    "gemv by GPTQModel's word": (AWQ | {"checkpoint_format": "gemv_fast"}, None, 'checkpoint_format is "gemv_fast"'),
    "llm-awq": (AWQ | {"backend": "llm-awq"}, None, 'backend is "llm-awq"'),
    "AWQ for Marlin": ({"quant_method": "awq", "version": "marlin"}, None, 'AWQ: version is "marlin"'),
    "AWQ of 8 bits": ({"quant_method": "awq", "bits": 8}, None, "AWQ: bits is 8"),
    "GPTQ of 8 bits": ({"quant_method": "gptq", "bits": 8}, None, "GPTQ: bits is 8"),
    "GPTQ for Marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        None,
        'checkpoint_format is "marlin"',
    ),
    "GPTQ for Marlin, old": (
        {"quant_method": "gptq", "is_marlin_format": True},
        None,
        "is_marlin_format is true",
    ),
    "GPTQ for Marlin by its other name": (
        {"quant_method": "gptq", "bits": 4, "format": "marlin"},
        None,
        'format is "marlin"',
    ),
    "GPTQ of two versions": (
        {"quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq_v2"},
        None,
        "checkpoint_format and format are",
    ),
    "GPTQ, rotated": ({"quant_method": "gptq", "rotation": "hadamard"}, None, 'rotation is "hadamard"'),
    "GPTQ, an unknown version": ({"quant_method": "gptq", "checkpoint_format": "gptq_v3"}, None, '"gptq_v3"'),
    "GPTQ, some layers in 8 bits": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
        None,
        r"GPTQ \(\+:\.\*down\.\*\): bits is 8",
    ),
    "bits by default, which are 8": (
        COMPRESSED | {"config_groups": {"g": {"weights": {"type": "int"}}}},
        None,
        r"\(g\): num_bits is 8",
    ),
    "8 bits in one group": (compressed(num_bits=8), None, r"\(group_1\): num_bits is 8"),
    "FP8 in one group": (compressed(type="float"), None, r'\(group_1\): type is "float"'),
    "another packing": (COMPRESSED | {"format": "marlin-24"}, None, 'format is "marlin-24"'),
    "quantised caches": (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, None, "with a kv_cache_scheme"),
    "transforms": (COMPRESSED | {"transform_config": {"config_groups": {"u": {}}}}, None, "with a transform_config"),
    "sparse": (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, None, "that is sparse"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, "quantised by bitsandbytes"),
    "fp8": ({"quant_method": "fp8"}, None, "quantised by fp8"),
    "a method that nobody knows": ({"quant_method": "new"}, None, "quantised by new"),
    "settings that are a list": (["awq"], None, r'quantization_config of the model is \["awq"\]'),  # type: ignore[dict-item]
    "GPTQ, dynamic that is a list": (
        {"quant_method": "gptq", "dynamic": ["down"]},
        None,
        "GPTQ's dynamic of the model",
    ),
    "GPTQ, a rule that is a word": ({"quant_method": "gptq", "dynamic": {"a": "b"}}, None, "GPTQ's dynamic a of the"),
    "a group that is a number": (COMPRESSED | {"config_groups": {"g": 1}}, None, "group g of the model is 1"),
    "weights that are a list": (COMPRESSED | {"config_groups": {"g": {"weights": [1]}}}, None, "weights of group g"),
    "sparsity that is a word": (
        COMPRESSED | {"sparsity_config": "none"},
        None,
        'sparsity_config of the model is "none"',
    ),
    "a method without a name": ({"bits": 4}, None, "by a method without a name"),
    "ModelOpt in FP8": ({}, {"quant_algo": "FP8"}, 'ModelOpt: quant_algo is "FP8"'),
    "ModelOpt, nothing named": ({"quant_method": "modelopt"}, None, "quant_algo is null"),
    "ModelOpt, quantised caches in config.json": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "kv_cache_scheme": {"num_bits": 8}},
        None,
        "kv_cache_scheme is",
    ),
    "ModelOpt, mixed": ({}, {"quant_algo": "MIXED_PRECISION"}, '"MIXED_PRECISION"'),
    "two quantisers": (
        {"quant_method": "awq", "bits": 4},
        {"quant_algo": "W4A16_AWQ"},
        "quantised twice: awq and modelopt",
    ),
    "read again": ({"quant_method": "btp"}, {"quant_algo": "W4A16_AWQ"}, "quantised twice: btp and modelopt"),
}


def settings_folder(folder: Path, fields: dict[str, Any], file: dict[str, Any] | None) -> dict[str, Any]:
    if file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": file}))
    return {"quantization_config": fields} if fields else {}


@pytest.mark.parametrize("case", READ_BY)
def test_formats_are_found_by_their_settings(case: str, tmp_path: Path) -> None:
    fields, file, name = READ_BY[case]
    result = find_format(tmp_path, settings_folder(tmp_path, fields, file))
    assert result is not None
    assert result[0].name == name


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, file, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        find_format(tmp_path, settings_folder(tmp_path, fields, file))
    assert error.value.wanted
    assert error.value.do


def test_settings_of_the_decoder_and_under_an_older_word_are_found(tmp_path: Path) -> None:
    for config in ({"text_config": {"quantization_config": COMPRESSED}}, {"compression_config": COMPRESSED}):
        found = find_format(tmp_path, config)
        assert found is not None
        assert found == (FORMATS["compressed_tensors"], COMPRESSED)
    with pytest.raises(InputError, match="quantised twice: awq and compressed-tensors"):
        find_format(tmp_path, {"quantization_config": AWQ, "text_config": {"quantization_config": COMPRESSED}})


def test_other_folders_are_nobodys(tmp_path: Path) -> None:
    assert find_format(tmp_path, {}) is None
    assert find_format(tmp_path, {"quantization_config": {"quant_method": "btp"}}) is None
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="holds GGUF files"):
        refuse_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_gguf(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match="no readable quantization"):
        find_format(tmp_path, {})
