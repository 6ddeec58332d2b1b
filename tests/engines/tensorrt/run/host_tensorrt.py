"""A stand-in for TensorRT's Python module: the classes and methods that the runner uses, computing with ONNX Runtime.

Checked against the real modules by test_tensorrt.py: every name here is in TensorRT for RTX's module too. An "engine
file" is JSON with the path of a graph; execute_async_v3 puts a run on the stream that reads and writes the addresses
at the time it runs. What TensorRT refuses is refused, with words like its own.
"""

import ctypes
import enum
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort

from graphs import dtypes
from tests.engines.runners.host_cuda import HostCuda

MAGIC = b"host-engine\n"
SCRATCH_PER_INPUT = 512


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, BF16, INT64, FP8 = 0, 1, 2, 3, 4, 5, 7, 8, 6


NAMES = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16, "int8": DataType.INT8,
    "int32": DataType.INT32, "int64": DataType.INT64, "bool": DataType.BOOL, "uint8": DataType.UINT8,
}  # fmt: skip


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class TensorLocation(enum.Enum):
    DEVICE, HOST = 0, 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = 0, 1, 2, 3, 4

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = 0, 1


ENUMS = (
    "DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "LayerInformationFormat"
)  # fmt: skip


def write_engine(path: Path, graph: Path, *, version: str, capability: str, capturable: bool | str = True) -> bytes:
    """An engine file for a graph; its bytes. tests/engines/tensorrt/trtexec_standin.py writes the same.

    An engine with `capturable` False refuses to run in a capture; one with "cudaMalloc" or "cudaDeviceSynchronize"
    calls that function in every run, as a plugin might, and goes on.
    """
    head = {"graph": str(graph), "version": version, "capability": capability, "capturable": capturable}
    path.write_bytes(MAGIC + json.dumps(head).encode())
    return path.read_bytes()


def module(cuda: HostCuda, version: str = "10.3.0.26") -> SimpleNamespace:
    """The module, on that machine."""

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine | None":
            data = bytes(serialized_engine)
            if not data.startswith(MAGIC):
                return self._refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            head = json.loads(data[len(MAGIC) :])
            if head["version"] != version:
                return self._refuse(
                    "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                    f"{version} got {head['version']}, please rebuild."
                )
            got = ".".join(map(str, cuda.capability))
            if head["capability"] != got:
                return self._refuse(
                    "The engine plan file is generated on an incompatible device, expecting compute "
                    f"{got} got compute {head['capability']}, please rebuild."
                )
            return Engine(cuda, self.logger, Path(head["graph"]), head["capturable"], head.get("layers", []))

        def _refuse(self, text: str) -> None:
            self.logger.log(ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {text}")

    registry = SimpleNamespace(all_creators=[], load_library=lambda path: path)
    return SimpleNamespace(
        __version__=version,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        LayerInformationFormat=LayerInformationFormat,
        ILogger=ILogger,
        Runtime=Runtime,
        get_plugin_registry=lambda: registry,
    )


class Engine:
    def __init__(
        self, cuda: HostCuda, logger: ILogger, graph: Path, capturable: bool | str, layers: list[dict[str, Any]]
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.cuda, self.logger, self.capturable, self.layers = cuda, logger, capturable, layers
        self.tensors = {node.name: (node, TensorIOMode.INPUT) for node in self.session.get_inputs()}
        self.inputs = list(self.tensors)
        self.tensors |= {node.name: (node, TensorIOMode.OUTPUT) for node in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_PER_INPUT * len(self.inputs)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][1]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][0].shape)

    def get_tensor_dtype(self, name: str) -> DataType:
        return NAMES[dtypes.BY_ONNXRUNTIME[self.tensors[name][0].type].name]

    def create_engine_inspector(self) -> "Inspector":
        return Inspector(self.layers)

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> "Context":
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Inspector:
    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self.layers = layers

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": self.layers, "Bindings": []})


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.runs = 0

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors or memory % 256:
            return self._refuse(f"setTensorAddress: bad name or address for {name}")
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = self.engine.tensors.keys() - self.addresses.keys()
        if missing:
            return self._refuse(f"enqueueV3: no address for {sorted(missing)[0]}")
        memory, size = self.scratch
        block = self.engine.cuda.blocks.get(memory)
        if block is None or min(size, block[1]) < self.engine.device_memory_size_v2:
            return self._refuse("enqueueV3: device memory is too small or not there")
        assert self.engine.cuda.capturing is None or self.runs, "the first run finishes the setup: not in a capture"
        self.runs += 1
        addresses = dict(self.addresses)

        def run() -> None:
            assert memory in self.engine.cuda.blocks, "the memory it was to compute in is freed"
            self._compute(addresses)

        if isinstance(self.engine.capturable, str):
            given = (ctypes.byref(ctypes.c_size_t()), 64) if self.engine.capturable == "cudaMalloc" else ()
            getattr(self.engine.cuda, self.engine.capturable)(*given)
        done = self.engine.cuda.enqueue(stream_handle, run, capturable=bool(self.engine.capturable))
        return done or self._refuse("enqueueV3: operation not permitted when stream is capturing")

    def _compute(self, addresses: dict[str, int]) -> None:
        binding = self.engine.session.io_binding()
        for name, (node, mode) in self.engine.tensors.items():
            element = dtypes.BY_ONNXRUNTIME[node.type].onnx
            bind = binding.bind_input if mode is TensorIOMode.INPUT else binding.bind_output
            bind(name, "cpu", 0, element, node.shape, addresses[name])
        self.engine.session.run_with_iobinding(binding)

    def _refuse(self, text: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, text)
        return False
