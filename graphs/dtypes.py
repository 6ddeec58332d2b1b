"""Element types of tensors: one table of what each is called by us and by every library and format.

Our name is numpy's ("float32"; "bfloat16" is ml_dtypes'), which is also what is written into manifests. Libraries that
are heavy are imported when their type is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import onnx_ir
    import torch

Precision = Literal["float32", "float16", "bfloat16"]

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ElementType:
    """One element type. `onnx` is the code of TensorProto.DataType, which onnx_ir and ONNX Runtime use too; formats
    that do not have the type have "" for it.
    """

    numpy: np.dtype[Any]
    onnx: int
    safetensors: str
    tensorrt: str  # member of trt.DataType

    @property
    def name(self) -> str:
        """Ours."""
        return str(self.numpy.name)

    @property
    def is_precision(self) -> bool:
        """Whether weights can be stored and graphs computed in it."""
        return self.name in PRECISIONS

    @property
    def precision(self) -> Precision:
        """Its name where it is one of the precisions. Raises KeyError where it is not."""
        return {str(precision): precision for precision in PRECISIONS}[self.name]

    @property
    def nbytes(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize

    @property
    def onnxruntime(self) -> str:
        """As sessions describe inputs and outputs."""
        return f"tensor({ {'float32': 'float', 'float64': 'double'}.get(self.name, self.name) })"

    @property
    def ir(self) -> onnx_ir.DataType:
        """onnx_ir's."""
        import onnx_ir

        return onnx_ir.DataType(self.onnx)

    @property
    def torch(self) -> torch.dtype:
        """PyTorch's."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


TYPES: Final = (
    ElementType(np.dtype(np.float64), 11, "F64", ""),
    ElementType(np.dtype(np.float32), 1, "F32", "FLOAT"),
    ElementType(np.dtype(np.float16), 10, "F16", "HALF"),
    ElementType(BFLOAT16, 16, "BF16", "BF16"),
    ElementType(np.dtype(np.int64), 7, "I64", "INT64"),
    ElementType(np.dtype(np.int32), 6, "I32", "INT32"),
    ElementType(np.dtype(np.int8), 3, "I8", "INT8"),
    ElementType(np.dtype(np.uint8), 2, "U8", "UINT8"),
    ElementType(np.dtype(np.bool_), 9, "BOOL", "BOOL"),
)
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)  # what weights are stored and graphs computed in

BY_NAME: Final = {kind.name: kind for kind in TYPES}
BY_NUMPY: Final = {kind.numpy: kind for kind in TYPES}
BY_ONNX: Final = {kind.onnx: kind for kind in TYPES}  # an onnx_ir.DataType is such a number
BY_SAFETENSORS: Final = {kind.safetensors: kind for kind in TYPES}
BY_TENSORRT: Final = {kind.tensorrt: kind for kind in TYPES if kind.tensorrt}
BY_ONNXRUNTIME: Final = {kind.onnxruntime: kind for kind in TYPES}


def numpy_of(name: str) -> np.dtype[Any]:
    """numpy's type of our name. Raises KeyError for a name that is none of ours."""
    return BY_NAME[name].numpy


def name_of_tensorrt(member: str) -> str:
    """Our name of a member of trt.DataType; of one that we have no name for, its own."""
    return BY_TENSORRT[member].name if member in BY_TENSORRT else member


def torch_of_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A private copy as a tensor. torch takes no bfloat16 from numpy, so its bits are carried as integers."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def numpy_of_torch(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor as an array on the CPU, bit for bit; it may share memory with the tensor."""
    import torch

    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(BFLOAT16))
    return np.asarray(tensor.numpy())
