"""From a bundle's graphs to the graphs of one target and TensorRT version.

The decoder graphs are built anew from the bundle's own spec, plan and weights, for the operator set that the version
knows; with the bundle's own settings they are the bundle's graphs byte for byte. The vision graph is the captured one.
What is then changed:

1. Custom operators: with plugins the function bodies are left out, so that no version can prefer a body to the plugin
   and a missing plugin is an error at once; attributes that a node leaves out are written with their defaults, as
   TensorRT's parser warns of each twice. Without plugins every node gets the body made for exactly its inputs.
   TensorRT has no missing inputs: those between others are left out, of the node and of its body.
2. `shared` weights: the matrices of the projections become network inputs, with a record of where their bytes lie.
   Those that are multiplied with the same rows (q, k and v; gate and up) can be packed into one product.
3. Four-bit weights: four_bits.py.
4. float16 products add up in float32 where that is asked for (accumulate.py).
5. Attention loses its attribute softmax_precision, which no TensorRT imports (seen on RTX 1.7.1: "Setting softmax
   precision is not supported"): its kernels choose. With --opset 18 the softmax is in float32, as written in the graph.
   A decode step's products with the caches are written as sums (attention.py).

Everything is strongly typed as built: each value's type is in the graph. The results stay valid ONNX graphs with the
inputs and outputs of graphs/interfaces.md, and run in ONNX Runtime.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import FunctionProto

from engines.tensorrt.prepare.accumulate import accumulate_in_float32
from engines.tensorrt.prepare.attention import drop_softmax_precision, sum_over_caches
from engines.tensorrt.prepare.four_bits import bake_packed, share_packed, source_of
from engines.tensorrt.prepare.opset18 import lower_to_primitives
from engines.tensorrt.records import Accumulate, Assemble, EngineWeights, WeightInput, WeightSource
from engines.tensorrt.versions import Traits
from graphs import dtypes, names, ops
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.graph_builder import BTP_DOMAIN, PORTABLE_OPSET, BuiltGraph, dims, dtype_of
from graphs.building.portable_bodies import given_to
from graphs.building.whole_graph import assemble_whole
from graphs.files.bundle import Bundle
from graphs.files.onnx_file import read_model, refusing_graph
from graphs.records.manifest import TensorRecord
from graphs.records.plan import PruningPlan
from graphs.records.record import require_name
from graphs.records.shapes import ShapeProfile

MATRIX_BYTES = 4096  # smaller matrices stay constants: an input costs more than it saves


@dataclass(frozen=True)
class Choices:
    """How the graphs are prepared."""

    opset: int
    assemble: Assemble = "segments"
    weights: EngineWeights = "baked"
    pack: bool = True  # with shared weights
    plugins: bool = True  # False: the portable bodies
    keep_packed: bool = False  # four-bit weights as in the bundle, for ONNX Runtime
    accumulate: Accumulate = "native"  # of float16 products


@dataclass(frozen=True)
class PreparedGraph:
    """A graph for TensorRT; `weight_inputs` are those of its inputs that are matrices."""

    name: str
    profile: str
    model: ir.Model
    layers: tuple[int, int] | None
    weight_inputs: tuple[WeightInput, ...] = ()

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """The inputs without weights."""
        weights = {weight.name for weight in self.weight_inputs}
        return tuple(tensor(value) for value in self.model.graph.inputs if value.name not in weights)

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """The outputs."""
        return tuple(tensor(value) for value in self.model.graph.outputs)

    @property
    def custom_nodes(self) -> dict[str, str]:
        """Name -> operator of each node that must become a plugin layer; none where portable bodies are used."""
        has_body = {identifier[:2] for identifier in self.model.functions}
        return {
            str(node.name): node.op_type
            for node in self.model.graph
            if node.domain == BTP_DOMAIN and (node.domain, node.op_type) not in has_body
        }

    def serialize(self) -> bytes:
        """The .onnx file's bytes; the same graph gives the same bytes."""
        data: bytes = ir.serde.serialize_model(self.model).SerializeToString(deterministic=True)
        return data


def suited_opset(bundle: Bundle, traits: Traits, *, assemble: Assemble, plugins: bool) -> int:
    """The bundle's own operator set where the version knows it and can build it, else the version's or primitives.

    RTX 1.7.1 crashes on one graph with Attention in float32, for which it has no kernel, and the loop of a portable
    body (seen for compute capability 8.9 and 12.0; in float16, with plugins, in segments or in primitives it builds).
    """
    build = bundle.manifest.build
    crashes = traits.flavour == "rtx" and build.precision == "float32" and assemble == "whole" and not plugins
    return PORTABLE_OPSET if crashes else min(build.opset, traits.opset)


def prepare(bundle: Bundle, choices: Choices, *, profiles: Sequence[str] | None = None) -> list[PreparedGraph]:
    """The graphs of every profile (or those named), in the order in which they run. No weight is read or copied.

    Raises InputError if a vision graph, which alone is read and not built anew, is damaged or cannot be brought to the
    operator set.
    """
    prepared: list[PreparedGraph] = []
    for name in [profile.name for profile in bundle.manifest.profiles] if profiles is None else profiles:
        with refusing_graph(bundle.graph_path(names.VISION, name)):
            prepared += _prepare_profile(bundle, bundle.profile(name), choices)
    return prepared


def _prepare_profile(bundle: Bundle, profile: ShapeProfile, choices: Choices) -> list[PreparedGraph]:
    built = _build(bundle, profile, bundle.plan_for(profile.name), choices)
    prepared = [PreparedGraph(graph.name, profile.name, graph.model, graph.layers) for graph in built]
    for graph in prepared:
        if choices.weights == "baked" and not choices.keep_packed:
            bake_packed(graph.model, choices.opset)
        if choices.keep_packed:
            pass  # with the bodies that they have
        elif choices.plugins:
            strip_bodies(graph.model)
            write_defaults(graph.model)
            for node in custom_nodes(graph.model):
                leave_out_missing(node)
        else:
            exact_bodies(graph.model, choices.opset)
        drop_softmax_precision(graph.model)
        if not choices.keep_packed:
            sum_over_caches(graph.model)
    if choices.weights == "shared":
        prepared = [replace(graph, weight_inputs=_shared(graph.model, choices)) for graph in prepared]
    if choices.accumulate == "float32":
        for graph in prepared:
            accumulate_in_float32(graph.model, {weight.name for weight in graph.weight_inputs})
    return prepared


def _shared(model: ir.Model, choices: Choices) -> tuple[WeightInput, ...]:
    """The weights that became inputs of the model, in the order of the inputs."""
    packed = share_packed(model, words=choices.plugins)
    return (*packed, *share_weights(model, pack=choices.pack))


def _build(bundle: Bundle, profile: ShapeProfile, plan: PruningPlan, choices: Choices) -> list[BuiltGraph]:
    captured = _captured(bundle.graph_path(names.VISION, profile.name))
    vision = BuiltGraph(names.VISION, captured if choices.opset > 18 else lower_to_primitives(captured), None)
    spec, checkpoint, precision = bundle.spec, bundle.checkpoint(), bundle.manifest.build.precision
    graphs = build_decoder_graphs(spec, checkpoint, plan, profile, opset=choices.opset, precision=precision)
    if choices.assemble == "segments":
        return [vision, *graphs]
    whole = assemble_whole(vision, spec, checkpoint, plan, profile, opset=choices.opset, precision=precision)
    return [whole, *(graph for graph in graphs if graph.name == names.DECODE)]


def _captured(path: Path) -> ir.Model:
    """The vision graph, whose names become files and inputs. Raises InputError for one that cannot."""
    model = read_model(path)
    constants = model.graph.initializers.values()
    stored = [value for value in constants if isinstance(value.const_value, ir.ExternalTensor)]  # not small numbers
    for value in (*model.graph.inputs, *model.graph.outputs, *stored):
        require_name(str(value.name), "a tensor", path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        tensor(value)  # of a known type and a static shape
    return model


def tensor(value: ir.Value) -> TensorRecord:
    """Name, type and static shape of a value."""
    return TensorRecord(name=str(value.name), dtype=dtypes.BY_ONNX[dtype_of(value)].name, shape=dims(value))


# -- 1. custom operators ---------------------------------------------------------------------------------------------


def strip_bodies(model: ir.Model) -> None:
    """Take the function bodies out of the model: only the plugins can run the custom nodes then."""
    model.functions.clear()


def write_defaults(model: ir.Model) -> None:
    """Give each custom node the attributes that it leaves out, with the defaults of the operator's schema."""
    for node in custom_nodes(model):
        operator = ops.of_node(node.op_type)
        for name, attribute in (operator.SCHEMA.attributes if operator is not None else {}).items():
            if name not in node.attributes and not attribute.required:
                node.attributes.add(ir.serde.deserialize_attribute(attribute.default_value))


def exact_bodies(model: ir.Model, opset: int) -> None:
    """Give each custom node the portable body for exactly its inputs and rule.

    A model holds one body for a name, so a whole graph whose stages have different inputs or rules carries a generic
    body, which asks for its inputs with OptionalHasElement: TensorRT does not import that. Where they differ, a node's
    operator is therefore named after its inputs and its rule too.
    """
    model.functions.clear()
    replacements: dict[str, list[tuple[ir.Node, str, FunctionProto]]] = defaultdict(list)
    for node in custom_nodes(model):
        operator = ops.of_node(node.op_type)
        if operator is not None:
            suffix, body = ops.exact_body(operator, opset, *given_to(node))
            for index in leave_out_missing(node):
                del body.input[index]
            replacements[operator.NAME].append((node, suffix, body))
    for bodies in replacements.values():
        several = len({suffix for _, suffix, _ in bodies}) > 1
        for node, suffix, body in bodies:
            if several:
                body.name = node.op_type = body.name + suffix
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function


def custom_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of our operators."""
    return [node for node in model.graph if node.domain == BTP_DOMAIN]


def leave_out_missing(node: ir.Node) -> list[int]:
    """Take missing inputs that stand between others out of the node; gives their places, the last one first.

    Plugins tell what is left apart by its type.
    """
    missing = [index for index, value in enumerate(node.inputs) if value is None]
    given = [value for value in node.inputs if value is not None]
    for index, value in enumerate(given):
        node.replace_input_with(index, value)
    node.resize_inputs(len(given))
    return missing[::-1]


# -- 2. weights as inputs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A Gemm or MatMul with a stored matrix: `value` is what the node reads, `stored` the initialiser behind it."""

    node: ir.Node
    value: ir.Value
    stored: ir.Value

    @property
    def source(self) -> WeightSource:
        """Where the matrix lies."""
        return source_of(self.stored, str(self.stored.name))


def share_weights(model: ir.Model, *, pack: bool) -> list[WeightInput]:
    """Make the matrices inputs of the model; gives what each input is made of, in the order of the inputs.

    A matrix that is stored in another type than the graph computes in becomes an input of the graph's type: the loader
    converts it once, in place of a Cast in every run.
    """
    graph = model.graph
    groups = _packed_groups(graph) if pack else []
    weights = {weight.name: weight for weight in (_pack(graph, group) for group in groups)}
    for product in list(_products(graph)):
        weight = _share(graph, product)
        weights[weight.name] = weight
    _remove_unused(graph)
    return [weights[name] for name in (str(value.name) for value in graph.inputs) if name in weights]


def _products(graph: ir.Graph) -> Iterator[_Product]:
    """The products whose second factor is a stored matrix, used as it is or cast to the graph's type."""
    for node in graph:
        if node.domain or node.op_type not in ("Gemm", "MatMul"):
            continue
        value = node.inputs[1]
        stored = _behind_cast(value) if value is not None else None
        if value is not None and stored is not None:
            yield _Product(node, value, stored)


def _behind_cast(value: ir.Value) -> ir.Value | None:
    producer = value.producer()
    stored = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
    if stored is None or not stored.is_initializer() or not dtypes.BY_ONNX[dtype_of(value)].is_precision:
        return None
    matrix = stored.const_value
    big = isinstance(matrix, ir.ExternalTensor) and len(matrix.shape) == 2 and matrix.nbytes >= MATRIX_BYTES
    return stored if big else None


def _packed_groups(graph: ir.Graph) -> list[list[_Product]]:
    """Projections of the same rows, in the graph's order: the q, k and v of a layer, its gate and up."""
    groups: dict[tuple[int, int, bool], list[_Product]] = defaultdict(list)
    for product in _products(graph):
        node = product.node
        if (
            node.op_type == "Gemm"
            and node.attributes.get_int("transB", 0) == 1
            and node.attributes.get_int("transA", 0) == 0
        ):
            groups[id(node.inputs[0]), dims(product.value)[1], _bias(node) is not None].append(product)
    return [group for group in groups.values() if len(group) > 1 and _used_once(group)]


def _used_once(group: Sequence[_Product]) -> bool:
    """Whether no other node reads one of the matrices, which would need it unpacked."""
    return all(len(product.value.uses()) == 1 and len(product.stored.uses()) == 1 for product in group)


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _pack(graph: ir.Graph, group: Sequence[_Product]) -> WeightInput:
    """One product with the matrices one below the other, its result split: [n,in] -> [n,sum of out] -> each [n,out]."""
    first = group[0]
    rows = [dims(product.value)[0] for product in group]
    width, dtype = dims(first.value)[1], dtype_of(first.value)
    name = _joined([str(product.stored.name) for product in group])
    weight = ir.Value(name=name, shape=ir.Shape((sum(rows), width)), type=ir.TensorType(dtype))
    graph.inputs.append(weight)
    inputs: list[ir.Value | None] = [first.node.inputs[0], weight]
    added: list[ir.Node] = []
    biases = [bias for bias in (_bias(product.node) for product in group) if bias is not None]
    if biases:
        concat = _node("Concat", biases, f"{name}.bias", (sum(rows),), dtype, axis=0)
        added.append(concat)
        inputs.append(concat.outputs[0])
    tokens = dims(first.node.outputs[0])[0]
    gemm = _node("Gemm", inputs, f"{name}.product", (tokens, sum(rows)), dtype, transB=1)
    sizes = ir.tensor(np.array(rows, np.int64), name=f"{name}.rows")
    size_value = ir.Value(name=sizes.name, shape=ir.Shape((len(rows),)), type=ir.TensorType(sizes.dtype))
    size_value.const_value = sizes
    graph.register_initializer(size_value)
    results = [product.node.outputs[0] for product in group]
    parts = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in results]
    split = ir.Node(
        "", "Split", [gemm.outputs[0], size_value], [ir.AttrInt64("axis", 1)], outputs=parts, name=f"{name}.split"
    )
    nodes = [product.node for product in group]
    ir.convenience.replace_nodes_and_values(graph, first.node, nodes, [*added, gemm, split], results, parts)
    return WeightInput(
        **tensor(weight).model_dump(), sources=tuple(product.source for product in group), packing="rows"
    )


def _node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, shape: Sequence[int], dtype: ir.DataType, **numbers: int
) -> ir.Node:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
    return ir.Node("", op_type, inputs, attributes, outputs=[value], name=name)


def _joined(names: Sequence[str]) -> str:
    """`a.q_proj.weight`, `a.k_proj.weight` -> `a.q_proj_k_proj.weight`."""
    split = [name.split(".") for name in names]
    where = next((n for n in range(len(split[0])) if len({tuple(parts[n : n + 1]) for parts in split}) > 1), -1)
    merged = "_".join(parts[where] for parts in split)
    return ".".join([*split[0][:where], merged, *split[0][where:][1:]])


def _share(graph: ir.Graph, product: _Product) -> WeightInput:
    """The matrix as an input under its own name. A second product with the same matrix reads the same input."""
    name, source = str(product.stored.name), product.source
    known = next((value for value in graph.inputs if value.name == name), None)
    if known is None:
        product.stored.name = f"{name}.stored"  # unused from here on, and removed with the other unused ones
        known = ir.Value(name=name, shape=product.value.shape, type=product.value.type)
        graph.inputs.append(known)
    product.value.replace_all_uses_with(known)
    return WeightInput(**tensor(known).model_dump(), sources=(source,))


def _remove_unused(graph: ir.Graph) -> None:
    """Casts and initialisers that nothing reads any more."""
    for node in list(graph):
        if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
