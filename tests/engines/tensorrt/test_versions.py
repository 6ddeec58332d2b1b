"""Facts about versions, held against the lists of options of the public tags (tests/engines/tensorrt/trtexec)."""

from pathlib import Path

import pytest

from engines.tensorrt.versions import OPERATORS, parse_version, traits
from graphs.records.errors import InputError

LISTS = Path(__file__).parent / "trtexec"


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.1"])
def test_options_are_those_of_the_public_samples(version: str) -> None:
    assert traits("tensorrt", version).options == set((LISTS / f"{version}.txt").read_text().split())


def test_options_between_and_beyond_known_versions() -> None:
    def has(version: str, option: str) -> bool:
        return option in traits("tensorrt", version).options

    assert has("10.3", "--fp16") and has("10.16.1", "--fp16") and not has("11.0", "--fp16")
    assert [has(version, "--monitorMemory") for version in ("10.5", "10.6", "10.9")] == [False, True, True]
    assert has("10.3", "--stronglyTyped") and "--stronglyTyped" in traits("tensorrt", "11.1").useless
    assert traits("tensorrt", "11.4").options == traits("tensorrt", "11.1").options
    assert traits("tensorrt", "11.4").known_as == "11.1" and traits("tensorrt", "10.9").known_as == "10.9"
    assert "--plugins" in traits("tensorrt", "10.3").useless
    assert not traits("tensorrt", "10.16").useless & {"--noDataTransfers", "--useCudaGraph"}


def test_precedence_of_functions_and_plugins() -> None:
    """Change log of the parser: 10.7 prefers plugins, 10.15 functions unless the node is marked."""
    collected = {
        version: traits("tensorrt", version).precedence for version in ("10.3", "10.6", "10.7", "10.14", "10.15")
    }
    assert collected == {"10.3": "function", "10.6": "function", "10.7": "plugin", "10.14": "plugin", "10.15": "marked"}
    assert traits("tensorrt", "11.4").precedence == traits("rtx", "1.7.1").precedence == "marked"


def test_operator_sets() -> None:
    """Change log: Attention came with 10.14, RotaryEmbedding and RMSNormalization with 10.15."""
    opsets = {version: traits("tensorrt", version).opset for version in ("10.3", "10.13", "10.14", "10.15", "11.1")}
    assert opsets == {"10.3": 18, "10.13": 18, "10.14": 18, "10.15": 23, "11.1": 23}
    assert traits("rtx", "1.7.1").opset == 23
    assert traits("tensorrt", "10.13").types("Attention") is None
    assert traits("tensorrt", "10.14").types("Attention") == {"float32", "float16", "bfloat16"}
    assert traits("tensorrt", "10.14").types("RMSNormalization") is None
    assert traits("tensorrt", "10.16").types("OptionalHasElement") is None
    for version in ("10.3", "10.13", "10.16", "11.1", "11.4"):
        known = traits("tensorrt", version)
        assert known.opset <= known.highest_opset


def test_a_table_of_operators_as_published() -> None:
    """Rows read off onnx-tensorrt's docs/operators.md."""
    known = traits("tensorrt", "10.3").types
    assert known("Gemm") == known("Softmax") == {"float32", "float16", "bfloat16"}
    assert known("TopK") == {"float32", "float16", "bfloat16", "int32", "int64"}
    assert known("Where") == {"float32", "float16", "bfloat16", "int32", "int64", "bool"}
    assert known("And") == {"bool"} and known("NonMaxSuppression") is None and known("Hardmax") is None
    assert "Optional" not in OPERATORS


def test_strong_typing_and_timing_defaults() -> None:
    assert not traits("tensorrt", "10.16").strongly_typed_only and traits("tensorrt", "11.0").strongly_typed_only
    assert not traits("tensorrt", "10.16").lean_timing and traits("tensorrt", "11.1").lean_timing
    assert traits("rtx", "1.7.1").tool == "tensorrt_rtx" and not traits("rtx", "1.7.1").plugins_documented


@pytest.mark.parametrize("version", ["8.6", "9.3", "10.2"])
def test_old_versions_are_refused(version: str) -> None:
    with pytest.raises(InputError, match=f"TensorRT {version} is not supported"):
        traits("tensorrt", version)


def test_what_is_no_version_is_refused() -> None:
    assert parse_version("10.16.1") == (10, 16, 1)
    for text in ("ten", "10", "", "10.x"):
        with pytest.raises(InputError, match="version"):
            parse_version(text)
    with pytest.raises(InputError, match=r"for RTX 1\.2"):
        traits("rtx", "1.2")
