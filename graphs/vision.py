"""The vision graph: a family's tower and projector, captured by torch.onnx and bound to a safetensors file."""

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphs.builder import IR_VERSIONS, NUMPY, PRECISIONS, BuiltGraph, GraphBuilder, external
from graphs.errors import InputError
from graphs.safetensors_file import tensor_offsets
from graphs.spec import Precision

if TYPE_CHECKING:
    from torch import nn

VISION_FILE = "btp-vision.safetensors"
INLINE_BYTES = 1024  # smaller constants, and those that are not floats (shapes, positions), stay in the graph
FLOATS = tuple(PRECISIONS.values())


def capture_vision(
    module: "nn.Module", *, batch: int, image_size: tuple[int, int], opset: int, precision: Precision = "float32"
) -> tuple[BuiltGraph, dict[str, np.ndarray]]:
    """`vision`: pixel_values [B,3,h,w] float32 -> image_features [B,V,C] in `precision`.

    `module` is float32 and is not changed. The returned arrays are what weights/btp-vision.safetensors must hold
    (graphs.safetensors_file.write_tensors); the graph points into that file. The graph carries no source names,
    stack traces or paths. Raises InputError for an unsupported opset, or a module that torch.onnx cannot capture
    with static shapes.
    """
    GraphBuilder("vision", opset=opset)  # refuses an opset that the other graphs would refuse
    model = _export(module, batch, image_size, opset, precision)
    _strip(model)
    model.ir_version = IR_VERSIONS[opset]
    model.producer_name, model.producer_version = "btp-export", None
    model.graph.name = "vision"
    weights = _bind(model)
    _check_static(model)
    return BuiltGraph("vision", model, None), weights


def _export(module: "nn.Module", batch: int, image_size: tuple[int, int], opset: int, precision: Precision) -> ir.Model:
    import torch

    pixels = torch.zeros(batch, 3, *image_size)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _in_precision(module, precision),
            (pixels,),
            dynamo=True,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=["image_features"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    return model


def _in_precision(module: "nn.Module", precision: Precision) -> "nn.Module":
    """The module computing in `precision` on float32 pixels; a copy if that is not float32."""
    import torch
    from torch import nn

    if precision == "float32":
        return module
    dtype = getattr(torch, precision)

    class Narrow(nn.Module):
        """Casts the pixels once, at the entrance."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(module).to(dtype)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.inner(pixel_values.to(dtype))
            return features

    return Narrow().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx talks about missing optional packages and its own deprecations; nothing a user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(model: ir.Model) -> None:
    """Remove what names the machine or the Python sources: metadata, doc strings."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        _clear(value)
    for node in model.graph:
        for value in node.outputs:
            _clear(value)


def _clear(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    if value.const_value is not None:
        value.const_value.metadata_props.clear()


def _bind(model: ir.Model) -> dict[str, np.ndarray]:
    """Replace the large float initialisers by pointers into the file; give what the file must hold."""
    weights: dict[str, np.ndarray] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype in FLOATS and tensor.nbytes >= INLINE_BYTES:
            weights[name] = np.asarray(tensor.numpy(), order="C")
        else:
            value.const_value = ir.Tensor(np.asarray(tensor.numpy(), order="C"), dtype=tensor.dtype, name=name)
    offsets = tensor_offsets(weights)
    types = {dtype: code for code, dtype in NUMPY.items()}
    for name, array in weights.items():
        pointer = external(name, VISION_FILE, offsets[name], array.nbytes, types[array.dtype], array.shape)
        model.graph.initializers[name].const_value = pointer
    return weights


def _check_static(model: ir.Model) -> None:
    """Every value has a static shape and a type. Raises InputError naming the first that has not."""
    values: list[Any] = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or not value.shape.is_static() or value.dtype is None:
            raise InputError(
                f"the vision graph's {value.name} has shape {value.shape}",
                wanted="a static shape everywhere",
                do="use a vision tower without data-dependent shapes",
            )
