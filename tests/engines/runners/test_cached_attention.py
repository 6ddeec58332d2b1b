"""Decode attention in ONNX Runtime's own node gives what the bundle's form gives, whatever lies behind valid rows."""

from typing import Any

import numpy as np
import onnxruntime

from engines.runners.onnxruntime import OrtLoader
from graphs.files.onnx_file import read_graph

LENGTHS = (3, 57)  # of the two samples


def inputs_of(loaded: Any, behind: float) -> dict[str, np.ndarray]:
    """Random rows in caches, `behind` where they are not valid."""
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {}
    for name, spec in loaded.inputs.items():
        values[name] = rng.standard_normal(spec.shape).astype(spec.dtype)
        if name.startswith("length"):
            values[name] = np.array(LENGTHS, spec.dtype)
        elif name.startswith("past"):
            for sample, length in enumerate(LENGTHS):
                values[name][sample, :, length:] = behind
    return values


def test_the_node_gives_what_the_graph_says(tiny_bundle: Any) -> None:
    """Grouped heads, two samples of different lengths. The graph itself would carry NaN from rows it masks."""
    bundle = tiny_bundle(batch=2)
    (graph,) = [graph for graph in bundle.graphs(bundle.manifest.profiles[0].name) if graph.name == "decode"]
    path = bundle.root / graph.file
    runner = OrtLoader(threads=1)(path)
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in plain.get_outputs()]
    wanted = dict(zip(names, plain.run(names, inputs_of(runner, 0.0)), strict=True))
    found = runner.run(inputs_of(runner, np.nan))
    assert set(found) == set(wanted), "what is written in place is not told"
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(runner.in_place) == 2 * bundle.spec.decoder.num_layers


def test_the_new_row_is_written_into_the_cache_itself(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(batch=2)
    (graph,) = [graph for graph in bundle.graphs(bundle.manifest.profiles[0].name) if graph.name == "decode"]
    runner = OrtLoader(threads=1)(bundle.root / graph.file)
    values = inputs_of(runner, 0.0)
    buffers = {name: runner.loader.allocate(spec.dtype, spec.shape) for name, spec in runner.inputs.items()}
    outputs = {name: runner.loader.allocate(spec.dtype, spec.shape) for name, spec in runner.outputs.items()}
    for name, value in values.items():
        buffers[name].write(value)
    runner.bind(buffers, outputs)()
    cache, new = buffers["past_key_0"].read(), outputs["key_0"].read()
    for sample, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(cache[sample, :, length], new[sample, :, 0])
        cache[sample, :, length] = 0
    np.testing.assert_array_equal(cache, values["past_key_0"])


def test_other_graphs_stay(tiny_bundle: Any) -> None:
    """Attention in half precision keeps the form of the file."""
    from engines.runners.on_cpu import Native, for_cpu

    bundle = tiny_bundle(precision="float16")
    (graph,) = [graph for graph in bundle.graphs(bundle.manifest.profiles[0].name) if graph.name == "decode"]
    model = read_graph(bundle.root / graph.file)
    before = model.SerializeToString()
    assert for_cpu(model, Native(selections=True, int8=True)) == {} and model.SerializeToString() == before
