"""What all replacements know of a graph and put into it: ONNX Runtime's node, reshapes, constants that are shared."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from graphs.ops.domain import DOMAIN, VERSION

NODE: Final = "GroupQueryAttention"
MICROSOFT: Final = helper.make_opsetid("com.microsoft", 1)
OURS: Final = helper.make_opsetid(DOMAIN, VERSION)

Shape = tuple[int, ...]

TAKEN: Final = (TensorProto.FLOAT, TensorProto.FLOAT16)  # what the new nodes compute with on a CPU


class Shapes(Mapping[str, Shape]):
    """Shapes of tensors by name, each read when it is first asked for: most never are."""

    def __init__(self, types: Mapping[str, Any], stored: Mapping[str, TensorProto]) -> None:
        self._types, self._stored = types, stored
        self._known: dict[str, Shape] = {}

    def __getitem__(self, name: str) -> Shape:
        if name not in self._known:
            stored = self._stored.get(name)
            sizes = (size.dim_value for size in self._types[name].shape.dim) if stored is None else stored.dims
            self._known[name] = tuple(sizes)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._types, *self._stored)))

    def __len__(self) -> int:
        return len(self._types.keys() | self._stored.keys())


class Rewriting:
    """A model's tensors, stored ones among them, and the nodes that give them; constants that the new nodes share."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
        tensors = {value.name: value.type.tensor_type for value in values}
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.shapes = Shapes(tensors, self.stored)
        self.types = {name: tensor.elem_type for name, tensor in tensors.items()}
        self.types |= {name: tensor.data_type for name, tensor in self.stored.items()}
        self.producers = {output: node for node in model.graph.node for output in node.output}
        self._constants: dict[str, TensorProto] = {}

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read each tensor, once for each time they name it; no entry where none does."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self._model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    def reshape(self, name: str, shape: Shape, output: str) -> NodeProto:
        """The node that lays a tensor out anew."""
        sizes = self.constant(f"{NODE}.shape.{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        return helper.make_node("Reshape", [name, sizes], [output])

    def constant(self, name: str, array: np.ndarray) -> str:
        """The name of a constant, which is made once."""
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def attention(self, inputs: Sequence[str], outputs: Sequence[str], **settings: Any) -> NodeProto:
        """ONNX Runtime's node."""
        return helper.make_node(NODE, inputs, outputs, domain=MICROSOFT.domain, **settings)

    def put(self, replaced: Mapping[str, Sequence[NodeProto]], superseded: frozenset[str] = frozenset()) -> None:
        """Put nodes in place of those whose first output is their key; what is superseded, or read by nobody, goes."""
        graph = self._model.graph
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.output[0] not in superseded:
                nodes.extend(replaced.get(node.output[0], [node]))
        read = needed(nodes, {value.name for value in graph.output})
        graph.initializer.extend(self._constants.values())
        del graph.node[:]
        graph.node.extend(read)
        known = {opset.domain for opset in self._model.opset_import}
        self._model.opset_import.extend(opset for opset in (MICROSOFT, OURS) if opset.domain not in known)


def needed(nodes: Sequence[NodeProto], wanted: set[str]) -> list[NodeProto]:
    """Those that something reads, in their order."""
    read, kept = set(wanted), list[NodeProto]()
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]
