"""GraphBuilder: onnx_ir graphs with a static shape and a dtype on every value, and weights that stay where they are.

Each method appends one node and returns its value with the shape worked out here, so a graph needs no shape
inference afterwards. A weight becomes an external tensor that points into a checkpoint shard by byte offset; nothing
of it is read.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphs import dtypes
from graphs.dtypes import Precision
from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.files.packed_weights import PackedLinear, packed_linear
from graphs.records.errors import InputError

FUSED_OPSET = 23  # has RMSNormalization, RotaryEmbedding and Attention
PORTABLE_OPSET = 18  # primitives only
IR_VERSIONS = {PORTABLE_OPSET: 8, FUSED_OPSET: 11}
BTP_DOMAIN = "btp"
PLUGIN: dict[str, Any] = {"plugin_version": "1", "plugin_namespace": ""}  # how TensorRT finds a custom node's plugin
WEIGHTS_FOLDER = "weights"  # beside the .onnx files


Dims = tuple[int, ...]


@dataclass(frozen=True)
class BuiltGraph:
    """A finished graph under its name in graphs/interfaces.md; `layers` is [start, stop) for a decoder segment."""

    name: str
    model: ir.Model
    layers: tuple[int, int] | None


def serialize(graph: BuiltGraph) -> bytes:
    """The .onnx file's bytes; the same graph gives the same bytes."""
    data: bytes = ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True)
    return data


def external(name: str, file: str, offset: int, nbytes: int, dtype: ir.DataType, shape: Dims) -> ir.ExternalTensor:
    """A tensor at `offset` bytes from the start of weights/`file`."""
    return ir.ExternalTensor(f"{WEIGHTS_FOLDER}/{file}", offset, nbytes, dtype, shape=ir.Shape(shape), name=name)


def dims(value: ir.Value) -> Dims:
    """The static shape of a value made by a builder."""
    assert value.shape is not None
    return value.shape.numpy()


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type of a value made by a builder."""
    assert value.dtype is not None
    return value.dtype


def _typed(name: str, value: Any) -> Any:
    """Numbers in a list as what they are: onnx_ir asks first whether a list is a graph, a tensor or a type."""
    listed = isinstance(value, list) and value and all(isinstance(number, int) for number in value)
    return ir.AttrInt64s(name, value) if listed else value


class GraphBuilder:
    """Builds one graph. Names are `scope.name`, unique within the graph; `precision` is the type of its floats."""

    def __init__(
        self, name: str, *, opset: int, precision: Precision = "float32", checkpoint: Checkpoint | None = None
    ) -> None:
        if opset not in IR_VERSIONS:
            raise InputError(
                f"opset {opset}",
                wanted=f"{FUSED_OPSET} (fused operators) or {PORTABLE_OPSET} (primitives only)",
                do=f"--opset {FUSED_OPSET}",
            )
        self.name, self.opset = name, opset
        self.fused = opset >= FUSED_OPSET
        self.precision: Precision = precision
        self.dtype = dtypes.BY_NAME[precision].ir
        self._checkpoint = checkpoint
        self._scope: list[str] = []
        self._named: dict[str, ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}
        imports = {"": opset}
        self._graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=name)

    # -- frame ---------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Values made inside are named `name.…`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    @contextmanager
    def root_scope(self) -> Iterator[None]:
        """Values made inside belong to the whole graph: no scope in their names."""
        saved, self._scope = self._scope, []
        try:
            yield
        finally:
            self._scope = saved

    def find(self, name: str) -> ir.Value | None:
        """The value of that full name, if it is there already."""
        return self._named.get(name)

    def input(self, name: str, shape: Sequence[int], dtype: ir.DataType | None = None) -> ir.Value:
        """A graph input; `dtype` defaults to the graph's precision."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype or self.dtype))
        self._register(name, value)
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Make `value` a graph output called `name`; an input passed through, or a second name, gets an Identity."""
        if value.is_graph_input() or value.is_graph_output() or value.is_initializer():
            value = self._append("Identity", [value], name, dims(value), dtype_of(value), "", {})
        else:
            self._named.pop(value.name or "")
            self._register(name, value)
            value.name = name
        self._graph.outputs.append(value)

    def nodes(self, domain: str) -> list[ir.Node]:
        """The nodes of an operator domain so far, in order."""
        return [node for node in self._graph if node.domain == domain]

    def function(self, proto: onnx.FunctionProto) -> None:
        """Embed a portable operator body; its domain becomes an import of the model."""
        assert proto.name not in self._functions, f"two bodies for {proto.name}"
        self._functions[proto.name] = ir.serde.deserialize_function(proto)
        self._graph.opset_imports[proto.domain] = 1

    def build(self, layers: tuple[int, int] | None = None) -> BuiltGraph:
        """The finished model."""
        model = ir.Model(
            self._graph,
            ir_version=IR_VERSIONS[self.opset],
            producer_name="btp-export",
            functions=list(self._functions.values()),
        )
        return BuiltGraph(self.name, model, layers)

    def splice(self, model: ir.Model, inputs: Sequence[ir.Value], scope: str) -> list[ir.Value]:
        """Put another model's nodes and initialisers here, fed by `inputs`; gives the values of its outputs.

        Its names get `scope.` in front. The model itself stays as it is; external weights stay pointers.
        """
        graph = ir.serde.deserialize_model(ir.serde.serialize_model(model)).graph
        for inner, outer in zip(graph.inputs, inputs, strict=True):
            inner.replace_all_uses_with(outer)
        outputs, nodes = list(graph.outputs), list(graph)
        initializers = list(graph.initializers.values())
        graph.outputs.clear()
        graph.initializers.clear()
        graph.remove(nodes)
        for value in [*initializers, *(value for node in nodes for value in node.outputs)]:
            value.name = f"{scope}.{value.name}"
            self._register(value.name, value)
        for value in initializers:
            self._graph.register_initializer(value)
        for node in nodes:
            node.name = f"{scope}.{node.name}"
        self._graph.extend(nodes)
        return outputs

    def _register(self, name: str, value: ir.Value) -> None:
        assert name not in self._named, f"{self.name}: two values are called {name}"
        self._named[name] = value

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[int],
        dtype: ir.DataType,
        domain: str,
        attributes: dict[str, Any],
    ) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._register(name, value)
        attrs = ir.convenience.convert_attributes({key: _typed(key, given) for key, given in attributes.items()})
        self._graph.append(ir.Node(domain, op_type, inputs, attrs, outputs=[value], name=name))
        return value

    def full_name(self, name: str) -> str:
        """`name` inside the open scopes."""
        return ".".join([*self._scope, name])

    # -- constants and weights -----------------------------------------------------------------------------------

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._register(name, value)
        self._graph.register_initializer(value)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small array kept in the graph; the same name again gives the same value. Not scoped."""
        known = self._named.get(name)
        if known is not None:
            return known
        return self._initializer(name, ir.Tensor(np.asarray(array, order="C"), name=name))

    def scalar(self, name: str, number: float, dtype: ir.DataType) -> ir.Value:
        """A 0-d constant of the given type."""
        return self.constant(f"constant.{name}.{dtype.name.lower()}", np.array(number, dtypes.BY_ONNX[dtype].numpy))

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 [n] constant: a shape, axes, starts, ..."""
        label = "_".join(str(n).replace("-", "minus") for n in numbers)
        return self.constant(f"constant.integers.{label}", np.array(numbers, np.int64))

    def weight(self, name: str, shape: Dims) -> ir.Value:
        """The checkpoint's tensor, cast to the graph's precision if it is stored in another one.

        Raises InputError if it is missing, has another shape than the configuration says, or is not a float.
        """
        assert self._checkpoint is not None
        cast_name = f"{name}.{self.precision}"
        known = self._named.get(cast_name) or self._named.get(name)
        if known is not None:
            return known
        ref = self._checkpoint[name]
        if ref.shape != shape or not dtypes.BY_SAFETENSORS[ref.dtype].is_precision:
            raise InputError(
                f"{ref.shard}: {ref.stored_name} is {ref.dtype} {list(ref.shape)}",
                wanted=f"{list(shape)} in F32, F16 or BF16, as config.json says",
                do="use the config.json and the safetensors files of the same model",
            )
        value = self._stored(ref)
        stored = dtype_of(value)
        if stored == self.dtype:
            return value
        return self._append("Cast", [value], cast_name, shape, self.dtype, "", {"to": self.dtype})

    def _stored(self, ref: TensorRef) -> ir.Value:
        """A tensor of the checkpoint as it is, under its own name; the same one again gives the same value."""
        known = self._named.get(ref.name)
        if known is not None:
            return known
        tensor = external(ref.name, ref.shard, ref.offset, ref.nbytes, ref.element.ir, ref.shape)
        return self._initializer(ref.name, tensor)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        shape: Sequence[int],
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Any node with one output; `dtype` defaults to the first input's."""
        first = inputs[0]
        assert first is not None
        return self._append(op_type, inputs, self.full_name(name), shape, dtype or dtype_of(first), domain, attributes)

    def binary(self, op_type: str, a: ir.Value, b: ir.Value, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """Add, Mul, Less, ...: numpy broadcasting."""
        return self.op(op_type, [a, b], name, shape=np.broadcast_shapes(dims(a), dims(b)), dtype=dtype)

    def unary(self, op_type: str, x: ir.Value, name: str, **attributes: Any) -> ir.Value:
        """Sigmoid, Sqrt, Softmax, ...: same shape and type."""
        return self.op(op_type, [x], name, shape=dims(x), **attributes)

    def add(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        """a + b."""
        return self.binary("Add", a, b, name)

    def mul(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        """a * b."""
        return self.binary("Mul", a, b, name)

    def scaled(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        """x * factor, in x's type.

        The factor is stored in float32 and cast, so that a graph of half precision that is widened has all of it.
        """
        exact = self.scalar(f"{factor:.9g}", factor, ir.DataType.FLOAT)
        return self.mul(x, self.cast(exact, dtype_of(x), f"{name}_factor"), name)

    def where(self, condition: ir.Value, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        """a where the condition holds, else b."""
        shape = np.broadcast_shapes(dims(condition), dims(a), dims(b))
        return self.op("Where", [condition, a, b], name, shape=shape, dtype=dtype_of(a))

    def cast(self, x: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """x in another type; x itself if it has it already."""
        if dtype_of(x) == dtype:
            return x
        return self.op("Cast", [x], name, shape=dims(x), dtype=dtype, to=dtype)

    def reshape(self, x: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        """x with the same elements in another shape; x itself if it has that shape."""
        assert math.prod(shape) == math.prod(dims(x)), f"{name}: {dims(x)} to {shape}"
        if dims(x) == tuple(shape):
            return x
        return self.op("Reshape", [x, self.integers(*shape)], name, shape=shape)

    def transpose(self, x: ir.Value, perm: Sequence[int], name: str) -> ir.Value:
        """x with its axes permuted."""
        return self.op("Transpose", [x], name, shape=[dims(x)[axis] for axis in perm], perm=list(perm))

    def matmul(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        """[..., m, k] @ [..., k, n] -> [..., m, n]."""
        assert dims(a)[-1] == dims(b)[-2], f"{name}: {dims(a)} @ {dims(b)}"
        batch = np.broadcast_shapes(dims(a)[:-2], dims(b)[:-2])
        return self.op("MatMul", [a, b], name, shape=(*batch, dims(a)[-2], dims(b)[-1]))

    def linear(self, x: ir.Value, module: str, features: int, name: str, *, bias: bool = False) -> ir.Value:
        """[n, in] -> [n, features] with the [out, in] matrix of a module of the checkpoint, as it is stored there."""
        assert self._checkpoint is not None
        packed = packed_linear(self._checkpoint, module)
        if packed is not None:
            return self._packed_linear(x, packed, features, name, bias=bias)
        rows, width = dims(x)
        inputs = [x, self.weight(f"{module}.weight", (features, width))]
        if bias:
            inputs.append(self.weight(f"{module}.bias", (features,)))
        return self.op("Gemm", inputs, name, shape=(rows, features), transB=1)

    def _packed_linear(self, x: ir.Value, packed: PackedLinear, features: int, name: str, *, bias: bool) -> ir.Value:
        """The same with a matrix of four bits: a BtpLinear node, whose scales have the graph's precision."""
        rows, width = dims(x)
        if (packed.n, packed.k) != (features, width):
            raise InputError(
                f"{packed.qweight.shard}: {packed.module} has packed weights of {packed.n} x {packed.k}",
                wanted=f"{features} x {width}, as config.json says",
                do="use the config.json and the safetensors files of the same model",
            )
        if packed.input_scale is not None:
            x = self.mul(x, self.weight(packed.input_scale.name, packed.input_scale.shape), f"{name}_input")
        inputs: list[ir.Value | None] = [x, self._stored(packed.qweight)]
        inputs.append(self.weight(packed.scales.name, packed.scales.shape))
        if packed.zeros is not None or bias:
            inputs.append(None if packed.zeros is None else self._stored(packed.zeros))
        if bias:
            inputs.append(self.weight(f"{packed.module}.bias", (features,)))
        return self.op(
            "BtpLinear", inputs, name, shape=(rows, features), domain=BTP_DOMAIN,
            bits=packed.bits, group=packed.group, **PLUGIN,
        )  # fmt: skip

    def concat(self, parts: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
        """The parts one after another along `axis`; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        axis %= len(dims(parts[0]))
        shape = list(dims(parts[0]))
        shape[axis] = sum(dims(part)[axis] for part in parts)
        return self.op("Concat", parts, name, shape=shape, axis=axis)

    def slice(self, x: ir.Value, axis: int, start: int, stop: int, name: str) -> ir.Value:
        """x[start:stop] along `axis`; x itself if that is all of it."""
        axis %= len(dims(x))
        shape = list(dims(x))
        assert 0 <= start < stop <= shape[axis], f"{name}: rows {start} to {stop} of {shape[axis]}"
        if stop - start == shape[axis]:
            return x
        shape[axis] = stop - start
        bounds = [self.integers(start), self.integers(stop), self.integers(axis), self.integers(1)]
        return self.op("Slice", [x, *bounds], name, shape=shape)

    def reduce(self, op_type: str, x: ir.Value, axis: int, name: str) -> ir.Value:
        """ReduceMean, ReduceSum, ... along one axis, which stays with length 1."""
        axis %= len(dims(x))
        shape = list(dims(x))
        shape[axis] = 1
        return self.op(op_type, [x, self.integers(axis)], name, shape=shape, keepdims=1)

    def gather_rows(self, x: ir.Value, indices: ir.Value, axis: int, name: str) -> ir.Value:
        """Gather with 1-d indices along `axis`."""
        axis %= len(dims(x))
        shape = [*dims(x)[:axis], *dims(indices), *dims(x)[axis + 1 :]]
        return self.op("Gather", [x, indices], name, shape=shape, axis=axis)
