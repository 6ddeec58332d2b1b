"""What each TensorRT version does with our files: traits, decided by the version number.

Sources: the change log and the samples of the public TensorRT repository by tag; the ONNX parser's own table of
operators (docs/operators.md of onnx-tensorrt 10.1, to which later releases have only added, see SINCE); the guides of
TensorRT for RTX. What TensorRT for RTX 1.7.1 does was run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from engines.tensorrt import trtexec_options
from engines.tensorrt.records import Flavour
from graphs.records.errors import InputError

# Which wins where a node has a function body of its name in the file and a plugin in the registry. `marked`: the
# function, unless the node carries plugin_namespace and that plugin is registered.
Precedence = Literal["function", "plugin", "marked"]
Version = tuple[int, ...]

FUSED_SINCE: Final[Version] = (10, 15)  # Attention came with 10.14, RotaryEmbedding and RMSNormalization with 10.15
OLDEST: Final[Version] = (10, 3)  # of those we know: the one of JetPack 6.1
NEWEST_KNOWN: Final[Version] = (11, 1)  # the newest whose samples are public; later ones are taken to be like it
TOPK_LIMIT: Final = 3840  # K must be below

# Options of the tensorrt_rtx tool that its guides name; the whole list is only in its --help.
RTX_OPTIONS: Final = """
computeCapabilities dumpLayerInfo dumpProfile duration dynamicPlugins exportLayerInfo exportProfile exportTimes help
includeDataTransfers iterations loadEngine loadInputs maxShapes minShapes monitorMemory noSpinWait onnx optShapes
profilingVerbosity rtxCudaGraphStrategy runtimeCacheFile saveEngine shapes skipInference specializeStrategyDS useGpu
verbose warmUp
"""

FLOATS: Final = frozenset({"float32", "float16", "bfloat16"})
NUMBERS: Final = FLOATS | {"int32", "int64"}
ALL: Final = NUMBERS | {"bool"}
BOOLS: Final = frozenset({"bool"})

# Operator -> types of its data, as the parser's table has them. Operators that are not here are not built in.
_BY_TYPES: Final[Mapping[frozenset[str], str]] = {
    ALL: """
        CastLike Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If
        Loop Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    NUMBERS: """
        Abs Add ArgMax ArgMin Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad
        Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare ScatterElements ScatterND Sign Sub Sum TopK
    """,
    FLOATS: """
        Acos Asin Atan AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Einsum Elu Erf
        Exp Floor Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish InstanceNormalization
        LayerNormalization LeakyRelu Log LogSoftmax MatMul MaxPool Pow Reciprocal Relu Resize Round Scan Selu Sigmoid
        Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh Attention RotaryEmbedding RMSNormalization
    """,
    BOOLS: "And Not Or Xor",
    FLOATS | {"int8", "int4"}: "DequantizeLinear QuantizeLinear",
    ALL | {"uint8"}: "Cast",
}
OPERATORS: Final[Mapping[str, frozenset[str]]] = {
    name: types for types, names in _BY_TYPES.items() for name in names.split()
}
SINCE: Final[Mapping[str, Version]] = {
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "RMSNormalization": (10, 15),
}


@dataclass(frozen=True)
class Traits:
    """What one version does. `options` are those of its command line tool `tool`; `useless` ones do nothing in it."""

    flavour: Flavour
    version: str
    tool: Literal["trtexec", "tensorrt_rtx"]
    precedence: Precedence
    opset: int  # the operator set of ours that it can: 23 fused, 18 primitives
    highest_opset: int  # documented by its parser
    strongly_typed_only: bool
    lean_timing: bool  # transfers off, spin wait and CUDA graph on without being asked
    plugins_documented: bool  # TensorRT for RTX builds plugins, but its guides call them unsupported
    options: frozenset[str]
    useless: frozenset[str]
    number: Version

    def types(self, operator: str) -> frozenset[str] | None:
        """Types the operator takes in this version, None where it is not built in."""
        if self.flavour == "tensorrt" and self.number < SINCE.get(operator, ()):
            return None
        return OPERATORS.get(operator)

    @property
    def known_as(self) -> str:
        """The version whose facts these are, said where it is not the version itself."""
        if self.flavour == "tensorrt" and self.number[:2] > NEWEST_KNOWN:
            return ".".join(map(str, NEWEST_KNOWN))
        return self.version


def traits(flavour: Flavour, version: str) -> Traits:
    """The traits of a version such as "10.3", "10.16.1" or, for RTX, "1.7.1".

    Raises InputError for a version that is too old, or is no version.
    """
    number = parse_version(version)
    return _rtx(version, number) if flavour == "rtx" else _tensorrt(version, number)


def parse_version(text: str) -> Version:
    """(10, 16, 1) of "10.16.1". Raises InputError for anything else."""
    try:
        number = tuple(int(part) for part in text.split("."))
    except ValueError:
        number = ()
    if len(number) < 2:
        raise InputError(f"TensorRT version {text!r}", wanted="a version such as 10.3 or 11.1", do="--tensorrt 10.16")
    return number


def _tensorrt(version: str, number: Version) -> Traits:
    if number < OLDEST:
        raise InputError(
            f"TensorRT {version} is not supported",
            wanted="TensorRT 10.3 or later (JetPack 6.1 on Orin; JetPack 6.0 has 8.6, without IPluginV3)",
            do="update JetPack or TensorRT",
        )
    fused = number >= FUSED_SINCE
    return Traits(
        flavour="tensorrt",
        version=version,
        tool="trtexec",
        precedence="function" if number < (10, 7) else "plugin" if number < (10, 15) else "marked",
        opset=23 if fused else 18,
        highest_opset=_highest_opset(number),
        strongly_typed_only=number >= (11,),
        lean_timing=number >= trtexec_options.NO_OPS_SINCE,
        plugins_documented=True,
        options=trtexec_options.options(number),
        useless=trtexec_options.useless_options(number),
        number=number,
    )


def _highest_opset(number: Version) -> int:
    """10.0 documents opset 20; 10.6 was built with ONNX 1.17 (21), 10.11 with 1.18 and documents 22; 10.15 has 23's."""
    if number < (10, 6):
        return 20
    if number < (10, 11):
        return 21
    return 23 if number >= FUSED_SINCE else 22


def _rtx(version: str, number: Version) -> Traits:
    if number < (1, 5):
        raise InputError(
            f"TensorRT for RTX {version} is not supported",
            wanted="1.7.1, the version that was tried",
            do='pip install "btp-export[rtx]"',
        )
    return Traits(
        flavour="rtx",
        version=version,
        tool="tensorrt_rtx",
        precedence="marked",
        opset=23,
        highest_opset=23,
        strongly_typed_only=True,
        lean_timing=True,
        plugins_documented=False,
        options=frozenset(f"--{name}" for name in RTX_OPTIONS.split()),
        useless=frozenset(),
        number=number,
    )
