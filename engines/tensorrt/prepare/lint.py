"""Do prepared graphs suit a TensorRT version? Told before any TensorRT is touched, on any machine.

Checked: operator set; custom operators (attributes, bodies, which of body and plugin would win); static shapes; names
that trtexec could not be told; external data; every operator and the types of its data against the version's table;
sizes of axes that TensorRT limits. Portable bodies are inlined first, so their insides are checked too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    inliner,
    numpy_helper,
    shape_inference,
)

from engines.tensorrt.prepare.four_bits import SIGNED, nbytes_of
from engines.tensorrt.prepare.prepared_graphs import PreparedGraph
from engines.tensorrt.summaries import Finding
from engines.tensorrt.versions import TOPK_LIMIT, Traits
from graphs import ops
from graphs.building.graph_builder import BTP_DOMAIN
from graphs.files.onnx_file import refusing_graph
from graphs.records.errors import CheckError

DEFECT = "report it as a defect"
AT_LEAST_2D = ("ArgMax", "ArgMin", "TopK")
GENERIC_BODIES = ("OptionalHasElement", "Unique")  # how generic bodies ask for their inputs and compare their rule
REFUSED_ATTRIBUTES = (("Attention", "softmax_precision"),)  # seen on RTX 1.7.1
SEPARATORS = ",:'\""  # of trtexec's --loadInputs


@dataclass(frozen=True)
class _Context:
    graph: str
    traits: Traits
    types: dict[str, str]  # value name -> element type
    shapes: dict[str, tuple[int, ...] | None]
    constants: dict[str, TensorProto]

    def finding(self, node: str, got: str, wanted: str, do: str) -> Finding:
        return Finding(graph=self.graph, node=node, got=got, wanted=wanted, do=do)


def lint(graphs: Sequence[PreparedGraph], traits: Traits, *, folder: Path, plugins: bool) -> list[Finding]:
    """Everything in the graphs that does not suit the version; an empty list if all does.

    `folder` is where the .onnx files will lie, with `weights/` beside them. `plugins`: the custom operators come from a
    plugin library. Raises InputError for a damaged graph.
    """
    findings: list[Finding] = []
    for graph in graphs:
        label = f"{graph.name} ({graph.profile})" if len({other.profile for other in graphs}) > 1 else graph.name
        with refusing_graph(f"the graph {label}"):
            model = ir.serde.serialize_model(graph.model)
            findings += lint_model(model, traits, name=label, folder=folder, plugins=plugins)
            findings += _weight_inputs(graph, label, folder)
    return findings


def lint_model(model: ModelProto, traits: Traits, *, name: str, folder: Path, plugins: bool) -> list[Finding]:
    """The findings of one model."""
    if model.functions:
        ops.register_schemas()
    context = _context(_Context(name, traits, {}, {}, {}), model.graph)
    findings = [*_opset(context, model), *_custom(context, model, plugins), *_interface(context, model)]
    findings += _external(context, model.graph, folder)
    inlined = _inlined(model)
    for inner, node in _in_scope(_Context(name, traits, {}, {}, {}), inlined.graph):
        findings += _operator(inner, node)
        findings += _dimensions(inner, node)
    return findings


def require_clean(findings: Sequence[Finding], traits: Traits) -> None:
    """Raise CheckError that names the first finding and counts the others."""
    if not findings:
        return
    first, others = findings[0], len(findings) - 1
    more = f" ({others} more findings: --dry-run lists them)" if others else ""
    raise CheckError(
        f"TensorRT {traits.version} will not take {first.graph}: {first.node}: {first.got}{more}",
        first.wanted,
        first.do,
    )


# -- what a model says of itself -------------------------------------------------------------------------------------


def _context(outer: _Context, graph: onnx.GraphProto) -> _Context:
    """What the nodes of a graph see: its own values, and those of the graph around it."""
    values: list[ValueInfoProto] = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: _type_name(value.type.tensor_type.elem_type) for value in values}
    shapes = {value.name: _static(value) for value in values}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for value in node.attribute if node.op_type == "Constant" else ():
            if value.name == "value":
                constants[node.output[0]] = value.t
    return replace(
        outer, types=outer.types | types, shapes=outer.shapes | shapes, constants=outer.constants | constants
    )


def _in_scope(outer: _Context, graph: onnx.GraphProto) -> Iterator[tuple[_Context, NodeProto]]:
    """The nodes of the graph and of the graphs inside its nodes, each with what it sees."""
    context = _context(outer, graph)
    for node in graph.node:
        yield context, node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _in_scope(context, attribute.g)


def _static(value: ValueInfoProto) -> tuple[int, ...] | None:
    """The shape, None where it is not known or not static."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _type_name(element: int) -> str:
    """ "float32", "bfloat16", "int64", "string", ...; empty where the type is not known."""
    if element in (TensorProto.UNDEFINED, TensorProto.STRING):
        return "" if element == TensorProto.UNDEFINED else "string"
    return str(ir.DataType(element).numpy().name)


def _inlined(model: ModelProto) -> ModelProto:
    """The model with its function bodies in place, and types and shapes worked out as far as ONNX can."""
    if not model.functions:
        return model
    inlined: ModelProto = inliner.inline_local_functions(model)
    return shape_inference.infer_shapes(inlined, data_prop=True)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """The nodes of the graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


# -- the checks ------------------------------------------------------------------------------------------------------


def _opset(context: _Context, model: ModelProto) -> Iterator[Finding]:
    traits = context.traits
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > traits.highest_opset:
            yield context.finding(
                "the model",
                f"opset {entry.version}",
                f"at most opset {traits.highest_opset} for TensorRT {traits.version}",
                "export the bundle with --opset 18",
            )


def _operator(context: _Context, node: NodeProto) -> Iterator[Finding]:
    if node.domain not in ("", "ai.onnx"):
        return  # custom operators have their own check
    allowed, version = context.traits.types(node.op_type), context.traits.version
    if allowed is None:
        wanted = f"an operator that the parser of TensorRT {version} has"
        do = "export the bundle with --opset 18, or report it as a defect"
        if node.op_type in GENERIC_BODIES:
            wanted = "bodies for the inputs and the rule of each node, not one for any"
            do = "prepare the graphs with `btp-export build`"
        yield context.finding(_name(node), f"the operator {node.op_type}", wanted, do)
        return
    for attribute in node.attribute:
        if (node.op_type, attribute.name) in REFUSED_ATTRIBUTES:
            wanted = f"{node.op_type} without it: TensorRT does not import it"
            yield context.finding(_name(node), f"the attribute {attribute.name}", wanted, DEFECT)
    data = [name for place, name in enumerate(node.input) if name and (place == 0 or _is_float(context, name))]
    for name in data:
        kind = context.types.get(name, "")
        if kind and kind not in allowed:
            yield context.finding(
                _name(node),
                f"{node.op_type} of {kind} ({name})",
                f"{', '.join(sorted(allowed))} in TensorRT {version}",
                "export the bundle with --precision float16 or float32" if _is_float(context, name) else DEFECT,
            )


def _is_float(context: _Context, name: str) -> bool:
    return context.types.get(name, "").startswith(("float", "bfloat", "double"))


def _dimensions(context: _Context, node: NodeProto) -> Iterator[Finding]:
    if node.op_type in AT_LEAST_2D:
        shape = context.shapes.get(node.input[0])
        if shape is not None and len(shape) < 2:
            yield context.finding(_name(node), f"{node.op_type} of {list(shape)}", "at least 2 dimensions", DEFECT)
    count = _topk_count(context, node) if node.op_type == "TopK" else 0
    if count >= TOPK_LIMIT:
        do = "use the plugins, or a plan that keeps fewer tokens"
        yield context.finding(_name(node), f"TopK with K = {count}", f"K below {TOPK_LIMIT}", do)


def _topk_count(context: _Context, node: NodeProto) -> int:
    """K where it is a constant, else 0; that of a body is the node's `keep`, see _custom."""
    known = context.constants.get(node.input[1])
    return 0 if known is None else int(numpy_helper.to_array(known).reshape(-1)[0])


def _custom(context: _Context, model: ModelProto, plugins: bool) -> Iterator[Finding]:
    """Custom nodes, and the bodies beside them: exactly one form may be there."""
    bodies = {(body.domain, body.name) for body in model.functions}
    for body in model.functions:
        if context.traits.types(body.name) is not None:
            yield context.finding(body.name, "a body named like a built-in operator", "a name of our own", DEFECT)
    for node in _all_nodes(model.graph):
        if node.domain in ("", "ai.onnx"):
            continue
        has_body = (node.domain, node.op_type) in bodies
        if node.domain != BTP_DOMAIN:
            wanted = f"operators of ONNX and of {BTP_DOMAIN}"
            yield context.finding(_name(node), f"{node.domain}.{node.op_type}", wanted, "export the bundle again")
        elif not plugins and not has_body:
            yield context.finding(
                _name(node), f"{node.op_type} without a body", "a plugin or a portable body", "--plugins auto"
            )
        elif plugins:
            yield from _plugin_node(context, node, has_body)
        else:
            keep = next((attribute.i for attribute in node.attribute if attribute.name == "keep"), 0)
            if keep >= TOPK_LIMIT:
                wanted = f"fewer than {TOPK_LIMIT}: the portable body sorts them with TopK"
                yield context.finding(_name(node), f"{keep} tokens to keep", wanted, "use the plugins, or another plan")


def _plugin_node(context: _Context, node: NodeProto, has_body: bool) -> Iterator[Finding]:
    """A node that a plugin must take: TensorRT finds it by name, plugin_version and plugin_namespace."""
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, (default, _) in ops.PLUGIN.items():
        value = given.get(name)
        if value is None or value.type != AttributeProto.STRING or value.s.decode() != default:
            yield context.finding(
                _name(node),
                f"{node.op_type} without {name} = {default!r}",
                f"{name} as a string attribute",
                "export the bundle again",
            )
    if has_body and context.traits.precedence == "function":
        yield context.finding(
            _name(node),
            f"{node.op_type} has a body in the file, which wins over the plugin in TensorRT {context.traits.version}",
            "files without function bodies",
            "prepare the graphs with `btp-export build`",
        )
    plugin = next((form.OPERATOR for form in ops.forms("trt_python") if node.op_type == form.OPERATOR.NAME), None)
    if plugin is not None:
        for given_name, taken in zip(node.input, plugin.INPUT_TYPES, strict=False):
            kind = context.types.get(given_name, "")
            if kind and kind not in taken:
                got = f"{node.op_type} of {kind} ({given_name})"
                yield context.finding(_name(node), got, " or ".join(taken), DEFECT)


def _interface(context: _Context, model: ModelProto) -> Iterator[Finding]:
    for value in [*model.graph.input, *model.graph.output]:
        shape = context.shapes[value.name]
        if shape is None or min(shape, default=1) < 1:
            yield context.finding(
                value.name, "a dynamic or empty shape", "static shapes: one engine a profile", "export the bundle again"
            )
        if any(letter in value.name for letter in SEPARATORS):
            wanted = "no comma, colon or quote: trtexec separates by them"
            yield context.finding(value.name, "a name trtexec cannot be told", wanted, DEFECT)


def _external(context: _Context, graph: onnx.GraphProto, folder: Path) -> Iterator[Finding]:
    """External data lies in files below the folder, within their bounds, and is as long as the tensor."""
    sizes: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location, offset = fields.get("location", ""), int(fields.get("offset", "0"))
        wanted, do = "a file below the graph's folder", "export the bundle again"
        path = PurePosixPath(location)
        if not location or path.is_absolute() or ".." in path.parts or "\\" in location:
            yield context.finding(tensor.name, f"external data in {location!r}", wanted, do)
            continue
        if location not in sizes:
            file = folder / location.removesuffix(SIGNED)  # signed codes are written beside, as long
            sizes[location] = file.stat().st_size if file.is_file() else -1
        length = int(fields.get("length", "-1"))
        needed = nbytes_of(ir.DataType(tensor.data_type), tensor.dims)
        if sizes[location] < 0:
            yield context.finding(tensor.name, f"{location} is missing", wanted, "restore the bundle's weights")
        elif length != needed or offset + needed > sizes[location]:
            yield context.finding(
                tensor.name,
                f"{location} has {sizes[location]} bytes, the tensor lies at {offset} with {length}",
                f"{needed} bytes inside the file",
                "restore the bundle's weights",
            )


def _weight_inputs(graph: PreparedGraph, label: str, folder: Path) -> Iterator[Finding]:
    """What the weight inputs are made of lies inside its files."""
    sizes: dict[str, int] = {}
    for weight in graph.weight_inputs:
        for source in weight.sources:
            file = folder.parent / source.file
            if source.file not in sizes:
                sizes[source.file] = file.stat().st_size if file.is_file() else -1
            if source.offset + source.nbytes > sizes[source.file]:
                yield Finding(
                    graph=label,
                    node=weight.name,
                    got=f"{source.file} "
                    + ("is missing" if sizes[source.file] < 0 else f"has {sizes[source.file]} bytes"),
                    wanted=f"{source.nbytes} bytes at {source.offset}",
                    do="restore the bundle's weights",
                )


def _name(node: NodeProto) -> str:
    return node.name or f"{node.op_type} of {node.output[0]}"
