"""Custom operators of the ONNX domain `btp`: one folder an operator, holding every form it has.

An operator is a folder with a `schema.py`; adding one is adding a folder, nothing else names it. The package offers

- `NAME`, `SCHEMA`, `function(opset)`, `cases()`, and `reference` (torch, loaded on first use);
- `form(inputs, attributes)`, if nodes with other inputs or attributes want another body (see `exact_body`);
- `TOLERANCE`, by type of the output, if forms do not agree bit for bit: of the norm of a row;
- `scratch_bytes(shapes)`, if its body needs memory beside its inputs and outputs: for inputs of these shapes.

- `ort_node.py`, if ONNX Runtime has nodes of its own that do the same (see `for_onnxruntime`).

Beside them, each where there is such a form: `kernel.cu` and `kernel.h` with `kernel_python.py`, `trt_plugin.cpp`,
`trt_python.py` (its `OPERATOR`), `ort_op.cc`, `cpu.cc`. docs/native.md says how builds and libraries find them.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION

if TYPE_CHECKING:
    import onnx

__all__ = [
    "DOMAIN",
    "PLUGIN",
    "VERSION",
    "exact_body",
    "folders",
    "for_onnxruntime",
    "forms",
    "functions",
    "names",
    "native_files",
    "of_node",
    "operator",
    "register_schemas",
    "wants_onnxruntime_nodes",
]


def folders() -> list[Path]:
    """The operators' folders by name: everything on this package's search path that holds a schema.py."""
    schemas = {schema.parent.name: schema.parent for root in __path__ for schema in Path(root).glob("*/schema.py")}
    return [schemas[name] for name in sorted(schemas)]


def native_files(*names: str) -> list[Path]:
    """The files of these names or patterns: of operators, and of what is only put in when a session is prepared."""
    return sorted(path for root in __path__ for name in names for path in Path(root).glob(f"*/{name}"))


def names() -> list[str]:
    """Folder names of the operators, sorted."""
    return [folder.name for folder in folders()]


def operator(name: str) -> ModuleType:
    """The operator of that folder name."""
    return import_module(f"{__name__}.{name}")


def of_node(op_type: str) -> ModuleType | None:
    """The operator of a node: of its name, or of a name that begins with it (exact bodies are told apart like that)."""
    known = {str(operator(name).NAME): name for name in names()}
    fitting = [name for name in known if op_type.startswith(name)]
    return operator(known[max(fitting, key=len)]) if fitting else None


def forms(form: str) -> list[ModuleType]:
    """The modules `<operator>/<form>.py`, of the operators that have one."""
    return [import_module(f"{__name__}.{f.name}.{form}") for f in folders() if (f / f"{form}.py").is_file()]


def functions(opset: int) -> list["onnx.FunctionProto"]:
    """The portable bodies of all operators for models of this opset (18 or later), generic in their attributes.

    A runtime that does not know the domain runs a model that carries them, without any plugin.
    """
    bodies: list[onnx.FunctionProto] = [operator(name).function(opset) for name in names()]
    return bodies


def exact_body(
    module: ModuleType, opset: int, inputs: Sequence[bool], attributes: Mapping[str, Any]
) -> tuple[str, "onnx.FunctionProto"]:
    """A body for nodes of the operator with exactly these inputs and attributes, and what tells it from its others.

    inputs: whether each input of the node is there. The generic body with "" where the operator has only that.
    """
    if not hasattr(module, "form"):
        return "", module.function(opset)
    form = module.form(inputs, attributes)
    return form.suffix, form.body(opset)


def wants_onnxruntime_nodes(serialized: bytes) -> bool:
    """Whether a model's bytes name an operator for which ONNX Runtime has nodes of its own.

    Reads no protobuf and imports no operator, which would need onnx.
    """
    own = [folder.name for folder in folders() if (folder / "ort_node.py").is_file()]
    return any(node_name(name).encode() in serialized for name in own)


def node_name(folder: str) -> str:
    """What the operator in a folder is called in graphs: BtpSelectTokens in select_tokens."""
    return "Btp" + folder.title().replace("_", "")


def for_onnxruntime(model: "onnx.ModelProto", *, accuracy_level: int) -> None:
    """Put ONNX Runtime's own nodes in place of the custom ones that have such a form; their bodies are taken out.

    The model stays as it was otherwise, external data too. accuracy_level: 1 to verify with, 4 to run with
    (graphs/ops/linear/ort_node.py). Raises InputError for nodes whose shapes are not static.
    """
    by_name = {form.OPERATOR: form for form in forms("ort_node")}
    values = [*model.graph.input, *model.graph.value_info]
    tensors = {value.name: value.type.tensor_type for value in values}
    shapes = {name: [size.dim_value for size in tensor.shape.dim] for name, tensor in tensors.items()}
    types = {name: tensor.elem_type for name, tensor in tensors.items()}
    shapes.update({tensor.name: list(tensor.dims) for tensor in model.graph.initializer})
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    domains: dict[str, int] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        form = by_name.get(node.op_type) if node.domain == DOMAIN else None
        nodes.extend([node] if form is None else form.nodes(node, shapes, types, accuracy_level))
        domains.update([form.MICROSOFT] if form is not None else [])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [body for body in model.functions if body.domain != DOMAIN or body.name not in by_name]
    del model.functions[:]
    model.functions.extend(kept)
    known = {opset.domain for opset in model.opset_import}
    for domain, version in domains.items():
        if domain not in known:
            model.opset_import.add(domain=domain, version=version)


def register_schemas() -> None:
    """Tell onnx the operators' schemas, so that its checker and shape inference know nodes without a body."""
    from onnx import defs

    for name in names():
        module = operator(name)
        if not defs.has(module.NAME, DOMAIN):
            defs.register_schema(module.SCHEMA)


def __getattr__(name: str) -> ModuleType:
    """`ops.select_tokens` without an import of its own."""
    if name in names():
        return operator(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
