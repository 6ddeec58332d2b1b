"""Runs the ONNX Runtime operators (btp_ort), one node a session, on any execution provider."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from graphs import ops
from graphs.records.errors import UnavailableError

Array = npt.NDArray[Any]
CUDA = "CUDAExecutionProvider"
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(value for value in vars(ort_errors).values() if isinstance(value, type) and issubclass(value, Exception)),
)


def require_provider(provider: str) -> None:
    """Raise UnavailableError where the ONNX Runtime that is installed does not have the execution provider."""
    if provider not in ort.get_available_providers():
        raise UnavailableError(
            f"onnxruntime {ort.__version__} has no {provider}", "onnxruntime-gpu", "pip install onnxruntime-gpu"
        )


class CustomOps:
    """The library `path` in sessions of one node and no function body, so that nothing else can do the work.

    With `profiles` every session writes its profile into that folder, which says where each node ran.
    """

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider", *, profiles: Path | None = None) -> None:
        if provider == CUDA:
            ort.preload_dlls()  # CUDA's and cuDNN's libraries from pip's packages, where there are such
        self.library, self.provider, self.profiles = path, provider, profiles

    def select(self, inputs: dict[str, Array], attributes: dict[str, Any]) -> Array:
        """BtpSelectTokens: inputs by name, those that are there."""
        return self.run("BtpSelectTokens", inputs, attributes, np.dtype(np.int32), 2)

    def gather(self, inputs: dict[str, Array], attributes: dict[str, Any]) -> Array:
        """BtpGatherTokens: inputs by name."""
        return self.run("BtpGatherTokens", inputs, attributes, inputs["tokens"].dtype, inputs["tokens"].ndim)

    def run(self, op: str, inputs: dict[str, Array], attributes: dict[str, Any], dtype: Any, rank: int) -> Array:
        """The output of one node; its type and rank are given. Inputs are copied to the provider's device and back."""
        session = self.session(op, inputs, attributes, dtype, rank)
        output = self.run_session(session, inputs, dtype)
        if self.profiles is not None:
            session.end_profiling()
        return output

    def session(
        self, op: str, inputs: dict[str, Array], attributes: dict[str, Any], dtype: Any, rank: int
    ) -> ort.InferenceSession:
        """A session of one node for inputs of these shapes and types."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if self.profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profiles / f"{len(list(self.profiles.iterdir()))}")
        if self.provider == CUDA:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an error, not a detour
        options.register_custom_ops_library(str(self.library))
        model = one_node(op, inputs, attributes, dtype, rank)
        return ort.InferenceSession(model.SerializeToString(), options, providers=[self.provider])

    def run_session(self, session: ort.InferenceSession, inputs: dict[str, Array], dtype: Any) -> Array:
        """The output of one run; several threads may share the session."""
        binding = session.io_binding()
        for name, array in inputs.items():
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type(array.dtype))
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("output", "cpu")
        session.run_with_iobinding(binding)
        (output,) = binding.get_outputs()
        if output.element_type() == onnx.TensorProto.BFLOAT16:  # numpy() knows no bfloat16: read the two bytes
            count = int(np.prod(output.shape()))
            raw = ctypes.string_at(output.data_ptr(), 2 * count)
            halves: Array = np.frombuffer(raw, dtype).reshape(output.shape())
            return halves
        return np.asarray(output.numpy())


def element_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def input_names(op: str) -> list[str]:
    """Names of an operator's inputs in order, from its schema."""
    operator = ops.of_node(op)
    assert operator is not None, f"no operator is called {op}"
    return [parameter.name for parameter in operator.SCHEMA.inputs]


def one_node(
    op: str, inputs: dict[str, Array], attributes: dict[str, Any], dtype: Any, rank: int, functions: Any = ()
) -> onnx.ModelProto:
    """A model of one operator. An optional input that is missing before one that is there is named ""."""
    names = [name if name in inputs else "" for name in input_names(op)]
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
