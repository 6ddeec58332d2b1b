"""The parts of decoder layers that go row by row, found in a graph in float32 with small weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu.rewriting import Rewriting, Shape

NORM: Final = "RMSNormalization"
ROTATION: Final = "RotaryEmbedding"
BY_TOKEN: Final = [0, 2, 1, 3]  # [B,H,S,D] <-> [B,S,H,D]
MOST: Final = 2**18  # numbers: 1 MiB of weights of one operator, half of what recent cores have as second cache
STORED: Final = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass
class Part:
    """One of query, key and value: what it is multiplied with, and the tensors that are wanted of it.

    numbers: of a row. transposed: what transpositions read. inner: first outputs of the nodes between the product and
    those tensors.
    """

    weight: str
    bias: str
    numbers: int
    rotations: list[NodeProto] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Projection:
    """What one norm and three products give. norm: its output. cos, sin: [B,S,D/2]."""

    norm: str
    rows: str
    scale: str
    epsilon: float
    parts: Sequence[Part]
    cos: str
    sin: str

    @property
    def inner(self) -> set[str]:
        """First outputs of all nodes between the norm and what is wanted."""
        return set().union(*(part.inner for part in self.parts))

    @property
    def weights(self) -> list[str]:
        return [part.weight for part in self.parts]


@dataclass(frozen=True)
class Feed:
    """What follows one attention. weights: out, gate, up, down."""

    context: str
    rows: str
    scale: str
    epsilon: float
    weights: Sequence[str]
    result: str


class Layers(Rewriting):
    """The layers of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._outputs = {value.name for value in model.graph.output}

    def is_norm(self, node: NodeProto) -> bool:
        """A norm of float32 rows [M,C] with stored weights, whose sums are in float32."""
        settings = _attributes(node)
        rows = self.shapes.get(node.input[0], ()) if node.op_type == NORM and not node.domain else ()
        known = len(rows) == 2 and min(rows) > 0 and self.types[node.input[0]] == TensorProto.FLOAT
        axis = settings.get("axis", -1) == -1 and settings.get("stash_type", 1) == 1
        return known and axis and self._stored(node.input[1], (rows[1],)) is not None

    # Query, key and value

    def projection(self, norm: NodeProto) -> Projection | None:
        """The three products behind a norm, if all that is made of them has the known form."""
        products = self.readers.get(norm.output[0], [])
        parts = [self._part(product) for product in products]
        if len(parts) != 3 or norm.output[0] in self._outputs or any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        query, key, value = known
        rotations = [*query.rotations, *key.rotations]
        if not query.rotations or not key.rotations or value.rotations:
            return None
        cos, sin = rotations[0].input[1:3]
        scale, epsilon = self._as_stored(norm.input[1]), _epsilon(norm)
        projection = Projection(norm.output[0], norm.input[0], scale, epsilon, known, cos, sin)
        same = all(list(rotation.input[1:]) == [cos, sin] for rotation in rotations)
        return projection if same and self._fits(projection) else None

    def _part(self, product: NodeProto) -> Part | None:
        """A product, and what is made of it by reshapes, transpositions and rotations."""
        weight = self._weight(product, biased=True)
        if weight is None:
            return None
        outputs = self.shapes[weight][0]
        bias = self._stored(product.input[2], (outputs,)) if len(product.input) == 3 else ""
        if bias is None:
            return None
        part = Part(weight, bias, outputs, inner={product.output[0]})
        open_tensors = [product.output[0]]
        while open_tensors:
            name = open_tensors.pop()
            for reader in self.readers.get(name, []):
                if reader.input[0] == name and self._moves(reader):
                    part.inner.add(reader.output[0])
                    open_tensors.append(reader.output[0])
                    part.rotations += [reader] if reader.op_type == ROTATION else []
                    part.transposed += [name] if reader.op_type == "Transpose" else []
                elif name not in part.wanted:
                    part.wanted.append(name)
            if name in self._outputs and name not in part.wanted:
                part.wanted.append(name)
        return part

    def _moves(self, node: NodeProto) -> bool:
        """Whether a node only lays out anew, between the two orders, or rotates."""
        if node.op_type == "Transpose":
            return list(_attributes(node).get("perm", [])) == BY_TOKEN
        return node.op_type in ("Reshape", ROTATION)

    def _fits(self, projection: Projection) -> bool:
        """Whether sizes agree, weights are small, and each wanted tensor is rotated and in one of the two orders."""
        cos = self.shapes.get(projection.cos, ())
        rows = self.shapes[projection.rows]
        if len(cos) != 3 or cos != self.shapes.get(projection.sin) or prod(cos[:2]) != rows[0]:
            return False
        size = 2 * cos[2]
        if not self.is_small(projection.weights) or len({bool(part.bias) for part in projection.parts}) > 1:
            return False
        for part in projection.parts:
            if part.numbers % size or not all(self._is_whole(node, size) for node in part.rotations):
                return False
            heads, rotations = heads_of(cos, part.numbers), min(1, len(part.rotations))
            orders = (heads, tuple(heads[axis] for axis in BY_TOKEN))
            if any(self.shape(name) not in orders for name in part.transposed):
                return False
            for name in part.wanted:
                in_heads, turned = self.made_by(name)
                if turned != rotations or (in_heads and self.shape(name) != heads):
                    return False
        return True

    def _is_whole(self, rotation: NodeProto, size: int) -> bool:
        """A rotation of whole heads of this size, halves against halves."""
        settings, shape = _attributes(rotation), self.shape(rotation.input[0])
        heads = settings.pop("num_heads", 0)
        plain = all(not value for value in settings.values()) and len(rotation.input) == 3
        if len(shape) == 3:
            return plain and heads * size == shape[2]
        by_head, _ = self.made_by(rotation.input[0])
        return plain and len(shape) == 4 and shape[3] == size and (by_head or shape[2] == 1)

    def made_by(self, name: str) -> tuple[bool, int]:
        """Whether a tensor made from a product's rows is in the order of heads, and how often it was rotated."""
        by_head, rotations = False, 0
        node = self.producers[name]
        while node.op_type != "Gemm":
            by_head ^= node.op_type == "Transpose"
            rotations += node.op_type == ROTATION
            node = self.producers[node.input[0]]
        return by_head, rotations

    # What follows attention

    def feed(self, norm: NodeProto) -> Feed | None:
        """The part of a layer whose second norm this is, if all of it has the known form."""
        total = norm.input[0]
        added, gates = self.producers.get(total), self.readers.get(norm.output[0], [])
        if added is None or added.op_type != "Add" or len(gates) != 2 or {total, norm.output[0]} & self._outputs:
            return None
        rows, projected = self._split_sum(added)
        gated = self._gated(norm, [gate.output[0] for gate in gates])
        if rows is None or projected is None or gated is None:
            return None
        *products, last = gated
        found = [self._weight(product, biased=False) for product in (projected, *products)]
        weights = [weight for weight in found if weight is not None]
        readers = {reader.output[0] for reader in self.readers[total]}
        alone = readers == {norm.output[0], last.output[0]} and self._only(projected.output[0], "Add") is not None
        if len(weights) != len(found) or not alone or not self.is_small(weights):
            return None
        context, scale = self._before_reordering(projected.input[0]), self._as_stored(norm.input[1])
        return Feed(context, rows, scale, _epsilon(norm), weights, last.output[0])

    def _split_sum(self, added: NodeProto) -> tuple[str | None, NodeProto | None]:
        """The rows that go on, and the product that is added to them."""
        for place in (1, 0):
            product = self.producers.get(added.input[place])
            rows = added.input[1 - place]
            if (
                product is not None
                and product.op_type == "Gemm"
                and self.shapes.get(rows) == self.shapes[added.output[0]]
            ):
                return rows, product
        return None, None

    def _gated(self, norm: NodeProto, names: Sequence[str]) -> tuple[NodeProto, NodeProto, NodeProto, NodeProto] | None:
        """The products gate, up and down, and the addition, of silu(gate) x up."""
        for gate, up in (names, names[::-1]):
            sigmoid = next((r for r in self.readers.get(gate, []) if r.op_type == "Sigmoid"), None)
            silu = self._only(sigmoid.output[0], "Mul") if sigmoid is not None else None
            if sigmoid is None or silu is None or set(silu.input) != {gate, sigmoid.output[0]}:
                continue
            if len(self.readers[gate]) != 2:
                continue
            gated, other = self._only(silu.output[0], "Mul"), self._only(up, "Mul")
            down = self._only(gated.output[0], "Gemm") if gated is not None else None
            last = self._only(down.output[0], "Add") if down is not None else None
            if gated is None or down is None or last is None or other is None or other.output[0] != gated.output[0]:
                continue
            if norm.input[0] in last.input and gate not in self._outputs and down.input[0] == gated.output[0]:
                return self.producers[gate], self.producers[up], down, last
        return None

    def _only(self, name: str, op_type: str) -> NodeProto | None:
        """The one node that reads a tensor, if it is of this type and the tensor no output."""
        readers = self.readers.get(name, [])
        alone = len(readers) == 1 and readers[0].op_type == op_type and name not in self._outputs
        return readers[0] if alone else None

    def _before_reordering(self, name: str) -> str:
        """The tensor whose numbers in the same order a tensor is, before reshapes and transpositions to and fro."""
        by_head, first = False, name
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Reshape", "Transpose"):
            if node.op_type == "Reshape" and by_head:
                break  # heads may be others behind it
            if node.op_type == "Transpose":
                if list(_attributes(node).get("perm", [])) != BY_TOKEN:
                    break
                by_head = not by_head
            first = first if by_head else node.input[0]
            node = self.producers.get(node.input[0])
        return first

    def shape(self, name: str) -> Shape:
        """A tensor's shape, also of one that another replacement made."""
        if name in self.shapes:
            return self.shapes[name]
        node = self.producers[name]
        if node.op_type == "Reshape":
            return tuple(int(size) for size in numpy_helper.to_array(self.stored[node.input[1]]))
        shape = self.shape(node.input[0])
        return tuple(shape[axis] for axis in _attributes(node)["perm"]) if node.op_type == "Transpose" else shape

    # Weights

    def is_small(self, weights: Sequence[str]) -> bool:
        """Whether they stay in a core's cache together."""
        return sum(prod(self.shapes[weight]) for weight in weights) <= MOST

    def _weight(self, product: NodeProto, *, biased: bool) -> str | None:
        """The stored matrix [N,K] of a product with its rows."""
        settings = _attributes(product)
        plain = product.op_type == "Gemm" and settings.pop("transB", 0) == 1
        scaled = any(settings.get(name, 1.0) != 1.0 for name in ("alpha", "beta")) or settings.get("transA")
        if not plain or scaled or len(product.input) > (3 if biased else 2):
            return None
        rows = self.shapes.get(product.input[0], ())
        outputs = self.shapes.get(product.output[0], ())
        return self._stored(product.input[1], (outputs[1], rows[1])) if len(rows) == len(outputs) == 2 else None

    def _stored(self, name: str, shape: Shape) -> str | None:
        """The file's tensor of this shape that a tensor is, cast or not."""
        stored = self._as_stored(name)
        there = stored in self.stored and self.shapes[stored] == shape and self.types[stored] in STORED
        return stored if there else None

    def _as_stored(self, name: str) -> str:
        cast = self.producers.get(name)
        return str(cast.input[0]) if cast is not None and cast.op_type == "Cast" else name


def heads_of(cos: Shape, numbers: int) -> Shape:
    """[B,N/D,S,D] of cos [B,S,D/2]."""
    return cos[0], numbers // (2 * cos[2]), cos[1], 2 * cos[2]


def _epsilon(norm: NodeProto) -> float:
    return float(_attributes(norm).get("epsilon", 1e-5))


def _attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
