"""A machine with a GPU in host memory, and folders of engines that run on it, for the tests of the room."""

from pathlib import Path

import pytest

from engines.tensorrt.prepare.prepared_graphs import Choices
from graphs.files.bundle import Bundle
from tests.conftest import BundleMaker
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run.engine_folders import STAGES, machine_with_gpu, new_process, write_engines
from tests.plans import tiny_plan


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and plugins of the other tests are not this one's."""
    new_process(monkeypatch)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    """One GPU, and TensorRT 10.3."""
    return machine_with_gpu(monkeypatch)


@pytest.fixture(scope="session")
def bundle(tiny_bundle: BundleMaker) -> Bundle:
    """The tiny model with one stage that selects and one that drops all."""
    made: Bundle = tiny_bundle(tiny_plan(*STAGES))
    return made


@pytest.fixture(scope="session")
def folders(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of that bundle by kind. Tests that change some make their own."""
    made = {}
    for name, choices in {
        "baked": Choices(opset=18, plugins=False),
        "shared": Choices(opset=18, plugins=False, weights="shared"),
        "whole": Choices(opset=18, plugins=False, weights="shared", assemble="whole"),
    }.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_engines(bundle, made[name], choices)
    return made
