"""Memory and disk of engines, counted from the prepared graphs before anything is built.

Where the numbers come from (`ORIGIN` says it to users): shapes and weights are the graph's own. The sizes of engines
were read off TensorRT for RTX 1.7.1, built without a GPU: two decoder layers with 202 MB of constants gave 203 MB, with
the matrices as inputs 1.0 MB; 32 such layers 6.5 MB. The build's memory is the upper end of what users report, 3 to 4
times the model; RTX took 2.6 GB for 812 MB of constants, and 350 MB for 32 layers without. Not yet compared with a
build on a device.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import onnx_ir as ir

from engines.targets import GIB, Target
from engines.tensorrt.prepare.accumulate import is_narrowing, is_widening
from engines.tensorrt.prepare.attention import is_term
from engines.tensorrt.prepare.four_bits import nbytes_of
from engines.tensorrt.prepare.prepared_graphs import PreparedGraph
from engines.tensorrt.records import Estimate, WeightInput, tensor_bytes
from graphs import dtypes, ops
from graphs.building.graph_builder import BTP_DOMAIN, dims, dtype_of
from graphs.files.onnx_file import refusing_graph
from graphs.ops.common.trt_python import Tensor

UNPACKED: Final = "DequantizeLinear"  # of four-bit constants: part of the product behind it
ENGINE_BASE: Final = 500_000  # bytes of an engine beside its constants
ENGINE_LAYER: Final = 200_000  # and for each decoder layer
BUILD_BASE: Final = 350_000_000  # memory of a build without constants
BUILD_FACTOR: Final = 4  # memory of a build, in units of the constants it bakes
RESERVE_DISCRETE: Final = 1 * GIB  # the CUDA context's
ORIGIN: Final = (
    f"engine: its constants + {ENGINE_BASE / 1e6:.1f} MB + {ENGINE_LAYER / 1e6:.1f} MB a layer "
    "(sizes seen with TensorRT for RTX 1.7.1)",
    f"build: {BUILD_BASE / 1e6:.0f} MB + {BUILD_FACTOR} x the constants (users report 3 to 4 x the model)",
    "run: all engines of a profile, shared weights once, inputs and outputs, and the values alive at once in one graph",
    "not yet compared with a build on a device",
)


@dataclass(frozen=True)
class Totals:
    """What all engines need together. `weight_bytes` are those of shared weights, on the device once."""

    run_bytes: int  # of the profile that needs most
    build_peak_bytes: int  # of the graph that needs most; graphs are built one after another
    disk_bytes: int  # engine files
    weight_bytes: int


def estimate(graph: PreparedGraph) -> Estimate:
    """The bytes of one engine. Raises InputError for a damaged graph, as a vision graph from a file can be."""
    with refusing_graph(f"the graph {graph.name}"):
        return _estimate(graph)


def _estimate(graph: PreparedGraph) -> Estimate:
    nodes = list(graph.model.graph)
    by_plugin = graph.custom_nodes
    constants = _constant_bytes(graph.model.graph)
    layers = sum(node.op_type in ("Attention", "Softmax") for node in nodes)
    return Estimate(
        weight_bytes=constants + sum(weight_bytes(weight) for weight in graph.weight_inputs),
        engine_bytes=constants + ENGINE_BASE + ENGINE_LAYER * layers,
        activation_bytes=_peak_activations(nodes, by_plugin),
        io_bytes=sum(tensor_bytes(tensor) for tensor in (*graph.inputs, *graph.outputs)),
        build_peak_bytes=BUILD_BASE + BUILD_FACTOR * constants,
    )


def totals(graphs: Sequence[PreparedGraph], estimates: Sequence[Estimate]) -> Totals:
    """What the engines need together; `estimates` are those of `graphs`."""
    shared = {weight.name: weight_bytes(weight) for graph in graphs for weight in graph.weight_inputs}
    lasting: dict[str, int] = {}
    scratch: dict[str, int] = {}  # engines run one after another in the same memory
    for graph, estimate in zip(graphs, estimates, strict=True):
        lasting[graph.profile] = lasting.get(graph.profile, 0) + estimate.engine_bytes + estimate.io_bytes
        scratch[graph.profile] = max(scratch.get(graph.profile, 0), estimate.activation_bytes)
    return Totals(
        run_bytes=max(lasting[profile] + scratch[profile] for profile in lasting) + sum(shared.values()),
        build_peak_bytes=max(estimate.build_peak_bytes for estimate in estimates),
        disk_bytes=sum(estimate.engine_bytes for estimate in estimates),
        weight_bytes=sum(shared.values()),
    )


def usable_memory(target: Target, memory_bytes: int | None = None) -> int:
    """Bytes for engines on the target, or on one of its kind with another memory: without what the system takes."""
    whole = target.memory_bytes if memory_bytes is None else memory_bytes
    return whole - (target.system_bytes if target.unified_memory else RESERVE_DISCRETE)


def weight_bytes(weight: WeightInput) -> int:
    """Bytes of a weight input on the device."""
    return tensor_bytes(weight)


def _constant_bytes(graph: ir.Graph) -> int:
    """Bytes of the constants in an engine: in the type they are cast to, where they are only cast."""
    total = 0
    for value in graph.initializers.values():
        users = value.consumers()
        cast = len(users) == 1 and users[0].op_type == "Cast" and not is_widening(users[0])
        dtype = dtype_of(users[0].outputs[0]) if cast else dtype_of(value)
        total += nbytes_of(dtype, dims(value))
    return total


def _peak_activations(nodes: Sequence[ir.Node], by_plugin: Container[str]) -> int:
    """Most bytes of values inside the graph that are alive at once, in the order of its nodes; fusion makes it less.

    by_plugin: names of the custom nodes that plugins run.
    """
    remaining: dict[ir.Value, int] = {}
    alive = peak = 0
    for node in nodes:
        for value in node.outputs:
            if not value.is_graph_output() and value.uses() and not _in_kernel(node, value):
                remaining[value] = len(value.consumers())
                alive += _value_bytes(value)
        peak = max(peak, alive + (_scratch_bytes(node, by_plugin) if node.domain == BTP_DOMAIN else 0))
        for value in {given for given in node.inputs if given in remaining}:
            remaining[value] -= 1
            if not remaining[value]:
                alive -= _value_bytes(value)
                del remaining[value]
    return peak


def _in_kernel(node: ir.Node, value: ir.Value) -> bool:
    """Whether a kernel takes the value in: a cast of a product, an unpacked constant, the sum before a cast, a term."""
    if node.op_type == UNPACKED or is_widening(node) or is_term(node):
        return True
    return any(is_narrowing(user) for user in value.consumers())


def _value_bytes(value: ir.Value) -> int:
    return prod(dims(value)) * dtypes.BY_ONNX[dtype_of(value)].nbytes


def _scratch_bytes(node: ir.Node, by_plugin: Container[str]) -> int:
    """Memory that a custom operator needs beside its inputs and outputs: its plugin's workspace, or its body's."""
    given = [value for value in node.inputs if value is not None]
    if str(node.name) in by_plugin:
        form = next((form.OPERATOR for form in ops.forms("trt_python") if node.op_type == form.OPERATOR.NAME), None)
        if form is None:
            return 0
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        values = [attributes[name] for name in form.ATTRIBUTES]
        values += [attributes.get(name, default) for name, default in form.OPTIONS.items()]
        tensors = [Tensor(0, dims(value), dtypes.BY_ONNX[dtype_of(value)].name) for value in given]
        return int(form(*values).workspace(tensors))
    operator = ops.of_node(node.op_type)
    if operator is None or not hasattr(operator, "scratch_bytes"):
        return 0
    return int(operator.scratch_bytes([dims(value) for value in given]))
