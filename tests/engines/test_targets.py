"""Targets are complete and consistent, and refuse names and versions with the way out."""

import pytest

from engines.targets import board_of, find_target, known_targets
from engines.tensorrt.versions import traits
from graphs.records.errors import InputError

# NVIDIA's compute capabilities, https://developer.nvidia.com/cuda-gpus
CAPABILITIES = {
    "a100": "8.0", "h100": "9.0", "h200": "9.0",
    "jetson-agx-orin-32": "8.7", "jetson-agx-orin-64": "8.7", "jetson-orin-jp6": "8.7", "jetson-orin-jp7": "8.7",
    "jetson-orin-nano-8": "8.7", "jetson-orin-nx-16": "8.7", "jetson-orin-nx-8": "8.7",
    "jetson-thor": "11.0", "jetson-thor-t4000": "11.0", "jetson-thor-t5000": "11.0",
    "l4": "8.9", "rtx-ada": "8.9", "rtx-blackwell": "12.0",
}  # fmt: skip
NAMES = list(CAPABILITIES)
# Dense float16 TFLOPS of NVIDIA's data sheets: a quarter of the GPU's sparse INT8 TOPS, an eighth of its sparse FP4.
BOARDS = {
    "jetson-agx-orin-64": 42.5, "jetson-agx-orin-32": 26.7, "jetson-orin-nx-16": 15.0, "jetson-orin-nx-8": 12.5,
    "jetson-orin-nano-8": 16.7, "jetson-thor-t5000": 258.5, "jetson-thor-t4000": 150.0,
}  # fmt: skip
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
    assert 10**10 < target.bandwidth < 10**13 and 2**33 <= target.memory_bytes < 2**38
    assert target.unified_memory == (target.machine == "aarch64")
    for version in target.tensorrt_versions:
        assert traits(target.flavour, version.replace(".x", ".16" if version.startswith("10") else ".1")).options
    assert target.version() == target.tensorrt_versions[0]
    assert not target.measured  # nothing has been run on any of them; changes with the first record in benchmarks/


@pytest.mark.parametrize(("name", "teraflops"), BOARDS.items())
def test_a_boards_peak_is_that_of_its_data_sheet(name: str, teraflops: float) -> None:
    """It is computed of multiprocessors and clock; the data sheet states it by itself."""
    target = find_target(name)
    assert target.board is not None and target.peak["float16"] == pytest.approx(teraflops * 1e12, rel=0.01)
    ratio = {"8.7": 8, "11.0": 32}[target.compute_capability]
    assert target.peak["float32"] * ratio == target.peak["float16"] == target.peak["bfloat16"]


def test_a_board_is_known_by_its_part_number_or_its_gpu() -> None:
    nano, orin = "nvidia,p3768-0000+p3767-0005 nvidia,p3767-0005 nvidia,tegra234", "nvidia,tegra234"
    for module, processors, memory, wanted in (
        (nano, None, None, "jetson-orin-nano-8"),
        (nano.replace("3767-0005", "3767-0000"), 8, 15 * 2**30, "jetson-orin-nx-16"),
        ("nvidia,p3737-0000+p3701-0004", None, None, "jetson-agx-orin-32"),
        (orin, 14, None, "jetson-agx-orin-32"),
        (orin, 8, 15 * 2**30, "jetson-orin-nx-16"),
        (orin, 8, 7 * 2**30, None),  # an NX or a Nano
        (orin, None, None, None),
        (orin, 10, None, None),
    ):
        found = board_of("8.7", module, processors, memory)
        assert (None if found is None else found.name) == wanted
    thor = board_of("11.0", "", 12, None)
    assert thor is not None and thor.name == "jetson-thor-t4000"
    assert board_of("9.0", nano, 8, None) is None


def test_an_unknown_target_names_the_close_ones() -> None:
    with pytest.raises(InputError) as error:
        find_target("orin_jp6")
    assert "jetson-orin-jp6" in error.value.do and "rtx-ada" in error.value.wanted
    with pytest.raises(InputError, match="unknown target 'h1000'"):
        find_target("h1000")
    with pytest.raises(InputError, match=r"unknown target '\.\./a100'"):
        find_target("../a100")


def test_a_memory_size_may_end_in_gb() -> None:
    assert find_target("jetson-orin-nx-16gb") is find_target("jetson-orin-nx-16")
    with pytest.raises(InputError, match="unknown target"):
        find_target("jetson-orin-jp6gb")


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
