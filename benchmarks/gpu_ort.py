"""Runs the ONNX Runtime operators (btp_ort), one node a session, on any execution provider, against the reference."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import helper

from graphs import dtypes
from graphs.ops import gather_tokens, select_tokens
from graphs.records.errors import CheckError, UnavailableError

Array = npt.NDArray[Any]
CUDA = "CUDAExecutionProvider"


def require_provider(provider: str) -> None:
    """Raise UnavailableError where the ONNX Runtime that is installed does not have the execution provider."""
    if provider not in ort.get_available_providers():
        raise UnavailableError(
            f"onnxruntime {ort.__version__} has no {provider}", "onnxruntime-gpu", "pip install onnxruntime-gpu"
        )


class CustomOps:
    """The library `path` in sessions of one node and no function body, so that nothing else can do the work."""

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider") -> None:
        if provider == CUDA:
            ort.preload_dlls()  # CUDA's and cuDNN's libraries from pip's packages, where there are such
        self.library, self.provider = path, provider

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        """BtpSelectTokens: inputs by name, those that are there."""
        return self.run("BtpSelectTokens", inputs, attributes, np.dtype(np.int32), 2)

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        """BtpGatherTokens: inputs by name."""
        return self.run("BtpGatherTokens", inputs, attributes, inputs["tokens"].dtype, inputs["tokens"].ndim)

    def run(self, op: str, inputs: dict[str, Array], attributes: dict[str, int], dtype: Any, rank: int) -> Array:
        """The output of one node; its type and rank are given. Inputs are copied to the provider's device and back."""
        model = one_node(op, inputs, attributes, dtype, rank)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if self.provider == CUDA:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an error, not a detour
        options.register_custom_ops_library(str(self.library))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[self.provider])
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
            return np.frombuffer(raw, dtype).reshape(output.shape())
        return np.asarray(output.numpy())


def verify(ops: CustomOps) -> int:
    """Number of cases of both operators that equal the reference, bit for bit. Raises CheckError at the first other."""
    checked = 0
    for case in select_tokens.cases():
        tensors = {name: torch.from_numpy(array.copy()) for name, array in case.inputs.items()}
        wanted = select_tokens.reference(**tensors, **case.attributes).numpy()
        _require_equal(ops.select(case.inputs, case.attributes), wanted, f"BtpSelectTokens, case {case.name}")
        checked += 1
    for gather in gather_tokens.cases():
        tokens, bits = gather.tokens, {2: torch.int16, 4: torch.int32, 8: torch.int64}[gather.tokens.itemsize]
        rows = gather_tokens.reference(
            torch.from_numpy(tokens.view(f"i{tokens.itemsize}").copy()).view(_floats(bits)),
            torch.from_numpy(gather.indices.copy()),
            **gather.attributes,
        )
        got = ops.gather(gather.inputs, gather.attributes).view(f"i{tokens.itemsize}")
        _require_equal(got, rows.view(bits).numpy(), f"BtpGatherTokens, case {gather.name}")
        checked += 1
    return checked


def _floats(bits: torch.dtype) -> torch.dtype:
    """A float type of the same size: the operator moves bits, whatever they mean."""
    return dtypes.BY_NAME[f"float{8 * bits.itemsize}"].torch


def _require_equal(got: Array, wanted: Array, name: str) -> None:
    if not np.array_equal(got, wanted):
        raise CheckError(f"{name}: the operator of ONNX Runtime differs from the reference", "equal bits")


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
