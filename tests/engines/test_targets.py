"""Targets are complete and consistent, and refuse names and versions with the way out."""

import pytest

from engines.targets import find_target, known_targets
from engines.tensorrt.versions import traits
from graphs.records.errors import InputError

NAMES = ["a100", "h100", "h200", "jetson-orin-jp6", "jetson-orin-jp7", "jetson-thor", "l4", "rtx-ada", "rtx-blackwell"]
# NVIDIA's compute capabilities, https://developer.nvidia.com/cuda-gpus
CAPABILITIES = dict(zip(NAMES, ["8.0", "9.0", "9.0", "8.7", "8.7", "11.0", "8.9", "8.9", "12.0"], strict=True))
RTX_ACCEPTS = {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}  # of TensorRT for RTX 1.7.1


def test_all_targets_are_there() -> None:
    assert known_targets() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_complete(name: str) -> None:
    target = find_target(name)
    assert target.name == name and target.compute_capability == CAPABILITIES[name]
    assert target.sm == CAPABILITIES[name].replace(".", "")
    assert target.flavour == "tensorrt" or target.compute_capability in RTX_ACCEPTS
    assert target.precision in target.peak and {"float32", "float16", "bfloat16"} == set(target.peak)
    assert target.peak["float32"] < target.peak["float16"] and target.sources
    assert 10**10 < target.bandwidth < 10**13 and 2**33 < target.memory_bytes < 2**38
    assert target.unified_memory == (target.machine == "aarch64")
    for version in target.tensorrt_versions:
        assert traits(target.flavour, version.replace(".x", ".16" if version.startswith("10") else ".1")).options
    assert target.version() == target.tensorrt_versions[0]
    assert not target.measured  # nothing has been run on any of them; changes with the first record in benchmarks/


def test_an_unknown_target_names_the_close_ones() -> None:
    with pytest.raises(InputError) as error:
        find_target("orin_jp6")
    assert "jetson-orin-jp6" in error.value.do and "rtx-ada" in error.value.wanted
    with pytest.raises(InputError, match="unknown target 'h1000'"):
        find_target("h1000")
    with pytest.raises(InputError, match=r"unknown target '\.\./a100'"):
        find_target("../a100")


def test_versions_of_a_target() -> None:
    orin, server = find_target("jetson-orin-jp6"), find_target("h100")
    assert orin.version("10.3") == "10.3" and orin.version("10.3.0") == "10.3.0"
    assert [server.version(text) for text in ("10.9", "10.16.1", "11.1")] == ["10.9", "10.16.1", "11.1"]
    with pytest.raises(InputError, match=r"8\.6 is not supported: JetPack 6\.0"):
        orin.version("8.6")
    with pytest.raises(InputError, match=r"8\.6\.2 is not supported"):
        orin.version("8.6.2")
    with pytest.raises(InputError, match=r"10\.16 does not come with Jetson Orin"):
        orin.version("10.16")
    with pytest.raises(InputError, match=r"9\.3 does not come with"):
        server.version("9.3")
    for text in ("newest", "10", "10.", "", "10.x"):
        with pytest.raises(InputError, match="version"):
            server.version(text)
