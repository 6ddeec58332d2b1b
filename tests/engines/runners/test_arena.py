"""Memory for all weights: one cudaMalloc, or pieces where that is refused although there is enough."""

import gc

import numpy as np
import pytest

from engines.runners import arena, cuda
from engines.runners.arena import Arena
from graphs.records.errors import CheckError, UnavailableError
from tests.engines.runners.host_cuda import Function, HostCuda, HostDriver

MIB = 2**20
PAGES = 300 * MIB
FLOAT = np.dtype(np.float32)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    """A board with 1 GiB for host and GPU, 300 MiB of it file pages, that refuses more than 32 MiB in one piece."""
    host = HostCuda()
    host.blocks[0] = (None, PAGES)
    host.integrated, host.largest = True, 32 * MIB
    monkeypatch.setattr(cuda, "library", lambda: host)
    monkeypatch.setattr(cuda, "available_memory", lambda: 900 * MIB)
    return host


def driver(machine: HostCuda, monkeypatch: pytest.MonkeyPatch, pieces: int = 1 << 20) -> HostDriver:
    made = HostDriver(machine, pieces=pieces)
    monkeypatch.setattr(arena, "driver", lambda: made)
    return made


def fill(memory: Arena, size: int) -> None:
    """Tensors over the whole arena hold what is written into them."""
    values = np.arange(size // 8, dtype=np.float32)
    low, high = (memory.tensor(FLOAT, values.shape, place) for place in (0, size // 2))
    low.write(values)
    high.write(-values)
    np.testing.assert_array_equal(low.read(), values)
    np.testing.assert_array_equal(high.read(), -values)
    assert high.pointer - low.pointer == size // 2


def test_one_piece_where_it_is_given(machine: HostCuda) -> None:
    memory = Arena(16 * MIB, device=0)
    assert memory.pieces == 1 and machine.used == PAGES + 16 * MIB
    fill(memory, 16 * MIB)
    del memory
    gc.collect()
    assert machine.used == PAGES


def test_pieces_where_one_is_refused(machine: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 MiB and a bit: two whole pieces and a last one of whole units, mapped without a gap, all given back."""
    host = driver(machine, monkeypatch)
    size = 150 * MIB + 512
    memory = Arena(size, device=0)
    assert memory.pieces == 3 and machine.used == PAGES
    assert sorted(host.handles.values()) == [24 * MIB, 64 * MIB, 64 * MIB]
    (start,) = host.ranges
    assert host.usable == set(range(start, start + 152 * MIB, host.GRANULARITY))
    fill(memory, size)
    tensor = memory.tensor(FLOAT, (4,), 256)
    del memory
    gc.collect()
    assert host.mapped, "a tensor keeps the memory"
    del tensor
    gc.collect()
    assert not host.mapped and not host.handles and not host.ranges


def test_the_error_names_the_case(machine: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    host = driver(machine, monkeypatch, pieces=2)
    with pytest.raises(UnavailableError) as caught:
        Arena(300 * MIB, device=0)
    assert "300.0 MiB for weights in one piece, and in small ones after 128.0 MiB" in caught.value.got
    assert "900.0 MiB are available" in caught.value.got and "36.4.7" in caught.value.wanted
    assert "reboot" in caught.value.do
    del caught
    gc.collect()
    assert not host.mapped and not host.handles and not host.ranges


def test_more_than_there_is_is_not_tried_in_pieces(machine: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    host = driver(machine, monkeypatch)
    with pytest.raises(UnavailableError, match=r"has no 1000 MiB more: 900 of 1024 MiB are free"):
        Arena(1000 * MIB, device=0)
    assert not host.ranges


def test_other_memory_names_the_case_too(machine: HostCuda) -> None:
    with pytest.raises(UnavailableError, match=r"refuses 64 MiB although 900 of 1024 MiB are available"):
        cuda.DeviceMemory(64 * MIB, device=0)
    machine.integrated = False
    with pytest.raises(UnavailableError, match=r"has no 64 MiB more: 724 of 1024 MiB are free"):
        cuda.DeviceMemory(64 * MIB, device=0)


def test_room_is_what_can_be_had(machine: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for integrated, available, wanted in (
        (True, 900 * MIB, 900 * MIB),  # file pages that can be dropped count as free
        (True, 100 * MIB, 724 * MIB),
        (False, 900 * MIB, 724 * MIB),
        (True, None, 724 * MIB),
        (True, 4096 * MIB, 1024 * MIB),
    ):
        machine.integrated = integrated
        monkeypatch.setattr(cuda, "available_memory", lambda available=available: available)
        assert cuda.room(0) == wanted


def test_every_function_is_the_drivers() -> None:
    try:
        library = arena.driver()
    except UnavailableError as error:
        pytest.skip(error.got)
    assert all(hasattr(library, name) for name in arena._SIGNATURES)


def test_other_errors_keep_their_code(machine: HostCuda) -> None:
    machine.cudaMalloc = Function(lambda pointer, size: 700)
    with pytest.raises(CheckError, match="cudaMalloc failed with CUDA error 700"):
        Arena(MIB, device=0)
