"""The TensorRT plugin of an operator, in Python: for builders that have no compiler.

Same creators, attributes, checks and formats as the C++ plugins (trt_plugin.cpp of each operator), and enqueue launches
the same kernels. Nothing here imports TensorRT: its module comes in as an argument, so that TensorRT and TensorRT for
RTX are served alike.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from graphs import dtypes
from graphs.records.errors import InputError

Shape = Sequence[int | None]  # None: a dimension that is open

OPERATOR_TYPES = ("float32", "float16", "bfloat16", "int32")


@dataclass(frozen=True)
class Tensor:
    """One input of an enqueue: device address, shape, and the name of its type (float32, float16, bfloat16, int32)."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class Launcher(Protocol):
    """The C interface of the kernels (engines.native.kernels.Kernels)."""

    def __getattr__(self, operator: str) -> Callable[..., None]:
        """One method an operator, named as its folder: (inputs, output, workspace, *, stream, **attributes)."""


class Operator(Protocol):
    """What a plugin has to know of its operator; one object for each set of attribute values."""

    NAME: ClassVar[str]
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # INT, all of them wanted
    OPTIONS: ClassVar[dict[str, int | str]]  # INT or STRING that may be missing: name -> the value it has then
    INPUT_TYPES: ClassVar[tuple[tuple[str, ...], ...]]

    values: tuple[int | str, ...]  # of ATTRIBUTES, then of OPTIONS

    def __init__(self, *values: int | str) -> None:
        """Check the values alone; raises InputError."""

    @abstractmethod
    def output_shape(self, inputs: Sequence[Shape]) -> list["Dimension"]:
        """Output dimensions for these inputs; raises InputError."""

    @abstractmethod
    def output_type(self, inputs: Sequence[str]) -> str:
        """Name of the output's type."""

    @abstractmethod
    def workspace(self, inputs: Sequence[Tensor]) -> int:
        """Bytes of workspace for inputs of these (largest) shapes."""

    @abstractmethod
    def launch(self, kernels: Launcher, inputs: Sequence[Tensor], output: int, workspace: int, stream: int) -> None:
        """Put the kernels on the stream."""


@dataclass(frozen=True)
class Dimension:
    """A dimension of an output: `plus` + the sum of the input dimensions (input, axis) in `terms`."""

    plus: int = 0
    terms: tuple[tuple[int, int], ...] = ()


def attribute_values(trt: Any, operator: type[Operator], fields: Any) -> tuple[int | str, ...]:
    """The operator's attributes from the parser's or the engine's fields; InputError names the wrong one."""
    given = {field.name: field for field in fields}
    values: list[int | str] = []
    for name in operator.ATTRIBUTES:
        if name not in given:
            raise InputError(f"{operator.NAME}: attribute {name} is missing", "one INT", "export the graph again")
        values.append(_integer(trt, operator, given[name]))
    for name, default in operator.OPTIONS.items():
        read = _text if isinstance(default, str) else _integer
        values.append(read(trt, operator, given[name]) if name in given else default)
    return tuple(values)


def _integer(trt: Any, operator: type[Operator], field: Any) -> int:
    if field.type not in (trt.PluginFieldType.INT32, trt.PluginFieldType.INT64):
        raise InputError(f"{operator.NAME}: attribute {field.name} is {field.type.name}", "one INT", "export it again")
    if field.data is None or field.data.size != 1:
        count = 0 if field.data is None else field.data.size
        raise InputError(f"{operator.NAME}: attribute {field.name} is {count} values", "one INT", "export it again")
    return int(field.data.reshape(-1)[0])


def _text(trt: Any, operator: type[Operator], field: Any) -> str:
    """A CHAR field as TensorRT hands it over: bytes, or an array of them, with or without a zero at the end."""
    if field.type != trt.PluginFieldType.CHAR or field.data is None:
        raise InputError(
            f"{operator.NAME}: attribute {field.name} is {field.type.name}", "one STRING", "export it again"
        )
    return bytes(field.data).rstrip(b"\0").decode("utf-8", "replace")


def creators(trt: Any, operators: Sequence[type[Operator]], kernels: Callable[[], Launcher]) -> list[Any]:
    """A plugin creator for each operator, for `trt.get_plugin_registry().register_creator(creator, "")`.

    `kernels()` gives the kernels' C interface (engines.native.kernels.Kernels); only enqueue calls it, so engines are
    built where no kernels can be loaded.
    """
    return [_creator(trt, operator, kernels) for operator in operators]


def _creator(trt: Any, operator: type[Operator], kernels: Callable[[], Launcher]) -> Any:
    plugin_class = _plugin_class(trt, operator, kernels)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = operator.NAME
            self.plugin_version = "1"
            self.plugin_namespace = ""
            values = (*(0 for _ in operator.ATTRIBUTES), *operator.OPTIONS.values())
            self.field_names = trt.PluginFieldCollection(
                [_field(trt, name, value, empty=True) for name, value in zip(_names(operator), values, strict=True)]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return plugin_class(operator(*attribute_values(trt, operator, fields)))

    return Creator()


@dataclass(frozen=True)
class _Surroundings:
    """What a plugin's methods need beside its attributes: TensorRT's module, the operator, its kernels, type names."""

    trt: Any
    operator: type[Operator]
    kernels: Callable[[], Launcher]

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """TensorRT's element types by our names."""
        return {name: getattr(self.trt.DataType, dtypes.BY_NAME[name].tensorrt) for name in OPERATOR_TYPES}

    @functools.cached_property
    def names(self) -> dict[Any, str]:
        """The reverse."""
        return {value: name for name, value in self.types.items()}


def _plugin_class(trt: Any, operator: type[Operator], kernels: Callable[[], Launcher]) -> type[Any]:
    """`_Methods` as a class of TensorRT's interfaces, which exist only once its module is there."""
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(_Methods, *interfaces):  # type: ignore[misc]
        around = _Surroundings(trt, operator, kernels)

        def __init__(self, op: Operator) -> None:
            for interface in interfaces:
                interface.__init__(self)
            self.op = op
            self.inputs = 0  # of the node; the C++ form of the plugin wants to find it in engines
            self.plugin_name = operator.NAME
            self.plugin_version = "1"
            self.plugin_namespace = ""
            self.num_outputs = 1

    return Plugin


class _Methods:
    """What TensorRT asks of a plugin: its fields, its outputs and formats, its memory and its work."""

    around: ClassVar[_Surroundings]
    op: Operator
    inputs: int

    def __init__(self, op: Operator) -> None:
        """As the class of TensorRT's interfaces does it."""

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        copy = type(self)(self.op)
        copy.inputs = self.inputs
        return copy

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        trt = self.around.trt
        pairs = [*zip(_names(self.around.operator), self.op.values, strict=True), ("inputs", self.inputs)]
        # A collection copies the fields, not what they point to: the fields themselves hold that.
        self.serialized = [_field(trt, name, value) for name, value in pairs]
        return trt.PluginFieldCollection(self.serialized)

    def get_output_data_types(self, input_types: Any) -> Any:
        names = self.around.names
        return [self.around.types[self.op.output_type([names.get(kind, "") for kind in input_types])]]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
        trt = self.around.trt
        known = [[_constant(dims[axis]) for axis in range(len(dims))] for dims in inputs]
        wanted = self.op.output_shape(known)
        output = trt.DimsExprs(len(wanted))
        for axis, dimension in enumerate(wanted):
            output[axis] = _expression(trt, builder, inputs, dimension)
        return [output]

    def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
        described, names = tensors[position].desc, self.around.names
        if described.format != self.around.trt.TensorFormat.LINEAR:
            return False
        kind = names.get(described.type, "")
        if position < inputs:
            return kind in self.around.operator.INPUT_TYPES[position]
        return kind == self.op.output_type([names.get(tensors[i].desc.type, "") for i in range(inputs)])

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        self.inputs = len(inputs)
        self.op.output_shape([tuple(tensor.max) for tensor in inputs])

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        self.op.output_shape([tuple(tensor.dims) for tensor in inputs])

    def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
        names = self.around.names
        return self.op.workspace([Tensor(0, tuple(tensor.max), names[tensor.desc.type]) for tensor in inputs])

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        return None

    def enqueue(
        self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
    ) -> None:
        names = self.around.names
        tensors = [
            Tensor(address, tuple(described.dims), names[described.type])
            for address, described in zip(inputs, input_desc, strict=True)
        ]
        self.op.launch(self.around.kernels(), tensors, outputs[0], workspace, stream)


def _expression(trt: Any, builder: Any, inputs: Any, dimension: Dimension) -> Any:
    terms = [inputs[source][axis] for source, axis in dimension.terms]
    if not terms:
        return builder.constant(dimension.plus)
    expression = terms[0]
    for term in terms[1:]:
        expression = builder.operation(trt.DimensionOperation.SUM, expression, term)
    if dimension.plus:
        sign = trt.DimensionOperation.SUM if dimension.plus > 0 else trt.DimensionOperation.SUB
        expression = builder.operation(sign, expression, builder.constant(abs(dimension.plus)))
    return expression


def _constant(dimension: Any) -> int | None:
    return int(dimension.get_constant_value()) if dimension.is_constant() else None


def _names(operator: type[Operator]) -> tuple[str, ...]:
    return (*operator.ATTRIBUTES, *operator.OPTIONS)


def _field(trt: Any, name: str, value: int | str, *, empty: bool = False) -> Any:
    """A field of the type of `value`, with that value or none."""
    import numpy as np

    if isinstance(value, str):
        return trt.PluginField(name, b"" if empty else value.encode(), trt.PluginFieldType.CHAR)
    return trt.PluginField(name, np.array([] if empty else [value], np.int32), trt.PluginFieldType.INT32)
