"""Prefill and decode as CUDA graphs, against the stand-ins: what is captured, replayed, timed, and what cannot be.

The CUDA in host memory does what is on a stream when it is waited for, and ends a capture in which the same thread
waits or allocates. So results that are equal to ONNX Runtime's show that a replay does all the work in the right order.
"""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.chain import Batch
from engines.runners.onnxruntime import OrtLoader
from engines.tensorrt.prepare.prepared_graphs import Choices
from graphs.files.bundle import Bundle
from tests.engines.runners.host_cuda import NOT_IN_A_CAPTURE, Function, HostCuda
from tests.engines.tensorrt.run.conversations import chain, conversation, inputs, onnx_graphs
from tests.engines.tensorrt.run.engine_folders import engines, write_engines

PLAIN = Choices(opset=18, plugins=False)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["baked"]


def row(bundle: Bundle) -> Any:
    return np.zeros((1, bundle.spec.decoder.hidden_size), np.float32)


def captured(machine: HostCuda) -> list[set[str]]:
    """The functions that were called inside of each capture."""
    found = []
    for place, name in enumerate(machine.calls):
        if name == "cudaStreamBeginCapture":
            end = machine.calls.index("cudaStreamEndCapture", place)
            found.append(set(machine.calls[place + 1 : end]))
    return found


def test_prefill_and_decode_are_one_graph_each(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    notes: list[str] = []
    loader, graphs = engines(bundle, folder, note=notes.append)
    model = chain(bundle, graphs, loader)
    for _ in range(3):
        model.prefill(Batch(*inputs(bundle)))
        for _ in range(3):
            model.decode(row(bundle))
    decode, prefill = captured(machine)  # each in its second run
    copies = {"cudaMemcpyAsync"}
    assert decode == copies
    assert prefill == copies | {"cudaMemcpy2DAsync", "cudaEventRecordWithFlags"}
    assert not {name[4:] for name in decode | prefill} & NOT_IN_A_CAPTURE
    assert machine.calls.count("cudaGraphInstantiateWithFlags") == 2
    assert machine.calls.count("cudaGraphLaunch") == 2 + 8
    machine.calls.clear()
    model.prefill(Batch(*inputs(bundle)))
    assert machine.calls.count("cudaGraphLaunch") == machine.calls.count("cudaEventSynchronize") == 1
    assert not {"cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaStreamSynchronize"} & set(machine.calls)
    assert not notes


def test_a_decode_step_is_a_launch_the_new_rows_and_one_wait(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """The row a token goes to differs from step to step; all else is in the graph."""
    loader, graphs = engines(bundle, folder)
    model = chain(bundle, graphs, loader)
    model.prefill(Batch(*inputs(bundle)))
    for _ in range(3):
        machine.calls.clear()
        model.decode(row(bundle))
    rows = machine.calls.count("cudaMemcpy2DAsync")
    assert rows == sum(map(len, model._layers.appended))
    wait = ["cudaEventRecordWithFlags", "cudaEventSynchronize"]
    assert machine.calls == ["cudaSetDevice", "cudaGraphLaunch", *["cudaMemcpy2DAsync"] * rows, *wait]


@pytest.mark.parametrize("capturable", [False, "cudaDeviceSynchronize", "cudaMalloc"])
def test_what_cannot_be_captured_runs_plainly_and_says_so(
    capturable: bool | str, bundle: Bundle, tmp_path: Path, machine: HostCuda
) -> None:
    write_engines(bundle, tmp_path, PLAIN, capturable=capturable)
    notes: list[str] = []
    loader, graphs = engines(bundle, tmp_path, note=notes.append)
    model = chain(bundle, graphs, loader)
    # The files' own nodes, which engines compute too: rows come from logits, and steps make rounding larger.
    reference = chain(bundle, onnx_graphs(bundle), OrtLoader(threads=1, custom_ops=None))
    for seed in (0, 1, 2):
        given = inputs(bundle, seed)
        for got, wanted in zip(conversation(model, given), conversation(reference, given), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))
    assert len(captured(machine)) == 2 and "cudaGraphLaunch" not in machine.calls
    decode, prefill = notes
    assert decode.startswith("no CUDA graph of decode, engines are started one by one: ")
    assert prefill.startswith("no CUDA graph of vision to head, engines are started one by one: ")
    reason = "not permitted when stream is capturing" if capturable is False else "CUDA error 901"
    assert all(reason in text and "\n" not in text and len(text) < 300 for text in notes)


def test_a_graph_that_cannot_be_made_ready(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    machine.cudaGraphInstantiateWithFlags = Function(lambda *given: 801)
    notes: list[str] = []
    loader, graphs = engines(bundle, folder, note=notes.append)
    model = chain(bundle, graphs, loader)
    conversation(model, inputs(bundle))
    [text] = notes
    assert "cudaGraphInstantiateWithFlags failed with CUDA error 801" in text
    assert not machine.graphs


def test_without_cuda_graphs(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    collected = []
    for wanted in (True, False):
        loader, graphs = engines(bundle, folder, cuda_graphs=wanted)
        model = chain(bundle, graphs, loader)
        machine.calls.clear()
        collected.append([conversation(model, inputs(bundle, seed)) for seed in (0, 1, 2)])
        assert ("cudaGraphLaunch" in machine.calls) == ("cudaStreamBeginCapture" in machine.calls) == wanted
    for got, plain in zip(*collected, strict=True):
        for one, other in zip(got, plain, strict=True):
            np.testing.assert_array_equal(one, other)


def test_parts_are_timed_in_a_replay_too(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """Times of a run are its own: marks in the order of the stream, parts that do not overlap."""
    loader, graphs = engines(bundle, folder)
    model = chain(bundle, graphs, loader)
    seen = []
    for _ in range(4):
        times = model.prefill(Batch(*inputs(bundle))).milliseconds
        assert times.keys() == (graphs.keys() - {"decode"}) | {"total"}
        assert all(value > 0 for value in times.values())
        parts = sum(value for name, value in times.items() if name not in ("total", "vision"))
        assert parts < times["total"]
        seen.append(times["total"])
    assert len(set(seen)) == 4


def test_vision_outputs_in_place_of_the_vision_engine(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """Two programs over the same engines: each is captured by itself, and neither spoils the other."""
    loader, graphs = engines(bundle, folder)
    model = chain(bundle, graphs, loader)
    given = inputs(bundle)
    first = model.prefill(Batch(*given)).logits
    features = model.vision_outputs
    for _ in range(3):
        noise = np.zeros_like(given[0])
        np.testing.assert_array_equal(model.prefill(Batch(noise, *given[1:]), vision=features).logits, first)
        np.testing.assert_array_equal(model.prefill(Batch(*given)).logits, first)
    assert len(captured(machine)) == 2


def test_pictures_that_stay_in_their_place(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """A third program, without the vision engine, between runs of the whole one."""
    loader, graphs = engines(bundle, folder)
    model = chain(bundle, graphs, loader)
    pixels, prefix, text, last = inputs(bundle)
    texts = [Batch(pixels, prefix, text * factor, last) for factor in (1, 2)]
    wanted = [model.prefill(batch).logits for batch in texts]
    for _ in range(3):
        for batch, logits in zip(texts, wanted, strict=True):
            run = model.prefill(batch, same_pictures=True)
            assert "vision" not in run.milliseconds
            np.testing.assert_array_equal(run.logits, logits)
        others = model.prefill(Batch(pixels + 1, prefix, text, last), same_pictures=True)
        assert "vision" in others.milliseconds and not np.array_equal(others.logits, wanted[0])
        np.testing.assert_array_equal(model.prefill(texts[0], same_pictures=True).logits, wanted[0])
    assert len(captured(machine)) == 2


def test_memory_that_moves_is_captured_anew(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """Engines share the memory they compute in: an engine that needs more moves it, under both programs."""
    loader, graphs = engines(bundle, folder)
    model = chain(bundle, graphs, loader)
    wanted = [conversation(model, inputs(bundle, seed)) for seed in (0, 1)]
    features = model.vision_outputs
    model.prefill(Batch(*inputs(bundle, 1)), vision=features)
    model.prefill(Batch(*inputs(bundle, 1)), vision=features)
    scratch = loader.session.scratch
    before = scratch.pointer
    held = machine.blocks[before]  # so that the address is not given out again
    scratch.reserve(scratch.size + 1)
    assert held and before not in machine.blocks
    count = len(captured(machine))
    for _ in range(3):
        for seed in (0, 1):
            for got, right in zip(conversation(model, inputs(bundle, seed)), wanted[seed], strict=True):
                np.testing.assert_array_equal(got, right)
        model.prefill(Batch(*inputs(bundle, 1)), vision=features)
    assert len(captured(machine)) == count + 3


def test_two_threads_with_a_model_each(bundle: Bundle, folder: Path, machine: HostCuda) -> None:
    """They share the stream: the stand-in refuses another thread's work within a capture."""
    loader, graphs = engines(bundle, folder)
    models = [chain(bundle, graphs, loader) for _ in range(2)]
    wanted = [conversation(chain(bundle, graphs, loader), inputs(bundle, seed)) for seed in (0, 1)]
    failures: list[BaseException] = []

    def talk(seed: int) -> None:
        try:
            for _ in range(4):
                got = conversation(models[seed], inputs(bundle, seed))
                for one, other in zip(got, wanted[seed], strict=True):
                    np.testing.assert_array_equal(one, other)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in (0, 1)]
    begin = machine.cudaStreamBeginCapture

    def begin_and_wait(*given: Any) -> Any:
        code = begin(*given)
        time.sleep(0.05)  # the other thread goes on meanwhile
        return code

    machine.cudaStreamBeginCapture = Function(begin_and_wait)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
