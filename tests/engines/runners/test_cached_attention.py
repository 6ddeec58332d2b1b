"""Decode attention in ONNX Runtime's own node gives what the bundle's form gives, whatever lies behind valid rows."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from engines.runners.onnxruntime import OrtLoader
from engines.verify.gates import GATES, compare
from graphs.dtypes import Precision
from graphs.files.onnx_file import read_graph

LENGTHS = (3, 57)  # of the two samples


def decode_graph(bundle: Any) -> Any:
    """The file of its first profile."""
    (graph,) = [graph for graph in bundle.graphs(bundle.manifest.profiles[0].name) if graph.name == "decode"]
    return bundle.root / graph.file


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


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_node_gives_what_the_graph_says(tiny_bundle: Any, precision: Precision) -> None:
    """Grouped heads, two samples of different lengths. The graph itself would carry NaN from rows it masks."""
    bundle = tiny_bundle(batch=2, precision=precision)
    path = decode_graph(bundle)
    runner = OrtLoader(threads=1)(path)
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in plain.get_outputs()]
    wanted = dict(zip(names, plain.run(names, inputs_of(runner, 0.0)), strict=True))
    found = runner.run(inputs_of(runner, np.nan))
    assert set(found) == set(wanted), "what is written in place is not told"
    for name, value in wanted.items():
        if precision == "float32":
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        cosine, ratio, _ = compare(value, found[name])
        assert cosine >= GATES[precision].cosine and abs(ratio - 1) <= GATES[precision].norm, name
    assert len(runner.in_place) == 2 * bundle.spec.decoder.num_layers


def test_the_new_row_is_written_into_the_cache_itself(tiny_bundle: Any) -> None:
    runner = OrtLoader(threads=1)(decode_graph(tiny_bundle(batch=2)))
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
    """Caches of bfloat16 keep the form of the file."""
    from engines.runners.on_cpu import Native, Replaced, for_cpu

    model = read_graph(decode_graph(tiny_bundle(batch=2)))
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    before = model.SerializeToString()
    assert (
        for_cpu(model, Native(selections=True, halves=True, int8=True)) == Replaced()
        and model.SerializeToString() == before
    )
