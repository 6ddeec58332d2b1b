"""The native forms of the operators as functions from numpy arrays to numpy arrays, for tests."""

import functools
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper

from engines.kernels import Kernels
from graphs.ops.common.trt_python import Tensor
from tests.engines.native import builds

Array = npt.NDArray[Any]


class Backend(Protocol):
    """Runs one operator: inputs by name (those that are there), INT attributes."""

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array: ...

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array: ...


class Emulated:
    """The CUDA kernels' own source in the SIMT emulation (tests/engines/native/simt.h)."""

    def __init__(self) -> None:
        self.kernels = Kernels(builds.emulated_kernels())

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        tensors = [_tensor(np.ascontiguousarray(array)) for array in inputs.values()]
        workspace = np.full(self.kernels.workspace(tensors, **attributes) + 8, 0xA5, np.uint8)
        output = np.full((inputs["scores"].shape[0], attributes["keep"]), -7, np.int32)
        self.kernels.select_tokens(tensors, output.ctypes.data, workspace.ctypes.data, stream=0, **attributes)
        assert (workspace[-8:] == 0xA5).all(), "the kernel wrote behind its workspace"
        return output

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        tokens, indices = inputs["tokens"], inputs["indices"]
        rows = tokens.shape[1] - attributes["count"] + indices.shape[1]
        guarded = np.zeros((tokens.shape[0] * rows + 1, *tokens.shape[2:]), tokens.dtype)
        guarded.view(np.uint8)[...] = 0xA5
        self.kernels.gather_tokens([_tensor(tokens), _tensor(indices)], guarded.ctypes.data, stream=0, **attributes)
        assert (guarded[-1:].view(np.uint8) == 0xA5).all(), "the kernel wrote behind its output"
        return guarded[:-1].reshape(tokens.shape[0], rows, *tokens.shape[2:])


class CustomOp:
    """The ONNX Runtime library (CPU) in a session of one node and no function body."""

    def __init__(self) -> None:
        self.library = builds.ort_library()

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        return self.run("BtpSelectTokens", inputs, attributes, np.dtype(np.int32), 2)

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        return self.run("BtpGatherTokens", inputs, attributes, inputs["tokens"].dtype, inputs["tokens"].ndim)

    def run(self, op: str, inputs: dict[str, Array], attributes: dict[str, int], dtype: Any, rank: int) -> Array:
        model = one_node(op, inputs, attributes, dtype, rank)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.register_custom_ops_library(str(self.library))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type(array.dtype))
                for name, array in inputs.items()}  # fmt: skip
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("output", "cpu")
        session.run_with_iobinding(binding)
        (output,) = binding.get_outputs()
        if output.element_type() == onnx.TensorProto.BFLOAT16:  # numpy() knows no bfloat16: read the two bytes
            import ctypes

            count = int(np.prod(output.shape()))
            raw = ctypes.string_at(output.data_ptr(), 2 * count)
            return np.frombuffer(raw, dtype).reshape(output.shape())
        return np.asarray(output.numpy())


def element_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def one_node(
    op: str, inputs: dict[str, Array], attributes: dict[str, int], dtype: Any, rank: int, functions: Any = ()
) -> onnx.ModelProto:
    """A model of one operator. An optional input that is missing before one that is there is named ""."""
    order = ("scores", "similarity", "seeds") if op == "BtpSelectTokens" else ("tokens", "indices")
    names = [name if name in inputs else "" for name in order]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        op, names, ["output"], name=op, domain="btp", plugin_version="1", plugin_namespace="", **attributes
    )
    given = [helper.make_tensor_value_info(name, element_type(a.dtype), list(a.shape)) for name, a in inputs.items()]
    output = helper.make_tensor_value_info("output", element_type(dtype), [None] * rank)
    graph = helper.make_graph([node], "one", given, [output])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("btp", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def _tensor(array: Array) -> Tensor:
    assert array.flags.c_contiguous
    return Tensor(array.ctypes.data, array.shape, array.dtype.name)


@functools.cache
def backend(name: str) -> Backend:
    return {"cuda-kernel-emulated": Emulated, "ort-custom-op": CustomOp}[name]()


BACKENDS = ("cuda-kernel-emulated", "ort-custom-op")
