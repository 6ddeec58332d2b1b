"""Which CUDA runtime library is taken, and what is said where none can work."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from engines.runners import cuda
from engines.runners.cuda_stream import Stream
from graphs.records.errors import CheckError, UnavailableError
from tests.engines.runners.host_cuda import Function, HostCuda


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


class Library:
    """A runtime of that version on a machine whose driver is for `driver`."""

    def __init__(self, runtime: int, driver: int) -> None:
        self.versions = {"cudaRuntimeGetVersion": runtime, "cudaDriverGetVersion": driver}

    def __getattr__(self, name: str) -> Any:
        def call(pointer: Any) -> int:
            pointer._obj.value = self.versions[name]
            return 0

        return call


def installed(monkeypatch: pytest.MonkeyPatch, driver: int, **runtimes: int) -> None:
    def load(name: str) -> Library:
        for part, version in runtimes.items():
            if name.endswith(f".so.{part.removeprefix('v')}"):
                return Library(version, driver)
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_the_newest_that_the_driver_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, 13000, v13=13020, v12=12060)
    assert cuda.library().versions["cudaRuntimeGetVersion"] == 13020  # minor versions are compatible
    cuda.library.cache_clear()
    installed(monkeypatch, 12080, v13=13020, v12=12060)
    assert cuda.library().versions["cudaRuntimeGetVersion"] == 12060


@pytest.mark.parametrize(
    ("driver", "message"), [(0, "no NVIDIA driver"), (11040, r"for CUDA 11\.4, the CUDA runtime library is 13\.2")]
)
def test_a_driver_that_serves_none(driver: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, driver, v13=13020, v12=12060)
    with pytest.raises(UnavailableError, match=message):
        cuda.library()


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, 13000)
    with pytest.raises(UnavailableError, match=r"none of libcudart\.so\.13"):
        cuda.library()


def test_errors_have_their_name_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = HostCuda()
    monkeypatch.setattr(cuda, "library", lambda: machine)
    machine.cudaEventSynchronize = Function(lambda event: 700)
    with pytest.raises(CheckError, match="cudaEventSynchronize failed with CUDA error 700"):
        Stream(0).finish()
    machine.total = 1000
    with pytest.raises(UnavailableError, match="0 of 0 MiB are free"):
        cuda.DeviceMemory(1 << 20, device=0)


def test_every_function_that_is_called_is_in_the_real_library() -> None:
    """Its names and their number of arguments are the CUDA runtime's: where one can be loaded, they are all there."""
    for name in cuda._places():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        assert all(hasattr(library, function) for function in cuda.SIGNATURES)
        return
    pytest.skip("no CUDA runtime library is installed: pip install 'btp-export[rtx]' brings one")
