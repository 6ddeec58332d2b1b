"""The vision graph: a family's tower and projector, captured by torch.onnx and bound to a safetensors file."""

import contextlib
import copy
import hashlib
import logging
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphs import dtypes, names
from graphs.building.graph_builder import IR_VERSIONS, BuiltGraph, GraphBuilder, external
from graphs.dtypes import Precision
from graphs.files.checkpoint import open_tensors
from graphs.files.safetensors_file import tensor_offsets
from graphs.records.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

VISION_FILE = "btp-vision.safetensors"
INLINE_BYTES = 1024  # smaller constants, and those that are not floats (shapes, positions), stay in the graph


def capture_vision(
    module: "nn.Module",
    *,
    batch: int,
    image_size: tuple[int, int],
    opset: int,
    precision: Precision = "float32",
    pixel_shape: tuple[int, ...] | None = None,
    class_attention: bool = False,
    in_place: bool = False,
) -> tuple[BuiltGraph, dict[str, np.ndarray]]:
    """`vision`: pixel_values [B,3,h,w] (or `pixel_shape`) float32 -> image_features [B,V,C] in `precision`.

    With `class_attention` the module gives that too, and it is a second output, class_attention [B,V] float32.

    `module` is float32; it is not changed, or with `in_place` turned into `precision`, which saves the memory of a
    copy. The returned arrays are what weights/btp-vision.safetensors must hold
    (graphs.files.safetensors_file.write_tensors); the graph points into that file. The graph carries no source names,
    stack traces or paths. Raises InputError for an unsupported opset, or a module that torch.onnx cannot capture
    with static shapes.
    """
    GraphBuilder(names.VISION, opset=opset)  # refuses an opset that the other graphs would refuse
    narrowed = _in_precision(module, precision, in_place)
    outputs = ["image_features", names.CLASS_ATTENTION] if class_attention else ["image_features"]
    model = _export(narrowed, pixel_shape or (batch, 3, *image_size), opset, outputs)
    _strip(model)
    model.ir_version = IR_VERSIONS[opset]
    model.producer_name, model.producer_version = "btp-export", None
    model.graph.name = names.VISION
    _name_constants(model, module.state_dict().keys())
    weights = _take_weights(model)
    _point(model, weights, weights)
    _check_static(model)
    return BuiltGraph(names.VISION, model, None), weights


def share_weights(captured: Sequence[tuple[BuiltGraph, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """What one weights file for several graphs of the same tower must hold; the graphs are pointed into it."""
    together: dict[str, np.ndarray] = {}
    for _, weights in captured:
        together |= weights
    for graph, weights in captured:
        _point(graph.model, weights, together)
    return together


def bind_to(graph: BuiltGraph, weights: Path) -> BuiltGraph:
    """The captured graph reading its weights from the safetensors file of another capture of the same tower.

    Raises InputError if that file lacks one of them.
    """
    stored = open_tensors(weights)
    for name, value in graph.model.graph.initializers.items():
        pointer = value.const_value
        if not isinstance(pointer, ir.ExternalTensor):
            continue
        ref = stored.get(name)
        if ref is None or (ref.element.ir, ref.shape) != (pointer.dtype, tuple(pointer.shape.numpy())):
            raise InputError(f"{weights} has no tensor {name} as the vision tower needs it", do="export it again")
        value.const_value = external(name, VISION_FILE, ref.offset, ref.nbytes, pointer.dtype, ref.shape)
    return graph


def _export(module: "nn.Module", pixel_shape: tuple[int, ...], opset: int, outputs: list[str]) -> ir.Model:
    import torch

    pixels = torch.zeros(pixel_shape)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (pixels,),
            dynamo=True,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=outputs,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    return model


def _in_precision(module: "nn.Module", precision: Precision, in_place: bool) -> "nn.Module":
    """The module computing in `precision` on float32 pixels; a copy if that is not float32, unless `in_place`."""
    import torch
    from torch import nn

    if precision == "float32":
        return module
    dtype = dtypes.BY_NAME[precision].torch
    floats = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if in_place:
        for tensor in floats:
            tensor.data = tensor.data.to(dtype)
    else:  # tensor by tensor through the memo, as a whole copy in float32 would be made otherwise
        module = copy.deepcopy(module, {id(tensor): _narrow(tensor, dtype) for tensor in floats})

    class Narrow(nn.Module):
        """Casts the pixels once, at the entrance."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self.inner(pixel_values.to(dtype))

    return Narrow().eval()


def _narrow(tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """A parameter or buffer in another precision."""
    from torch import nn

    narrow = tensor.detach().to(dtype)
    return nn.Parameter(narrow, requires_grad=False) if isinstance(tensor, nn.Parameter) else narrow


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


def _name_constants(model: ir.Model, parameters: Collection[str]) -> None:
    """Name large constants that are no parameters (rotary tables, folded weights) by what they hold.

    torch.onnx counts them, so that graphs of two picture sizes would give one name to different constants.
    """
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if name.removeprefix("inner.") in parameters or not _is_large(tensor):
            continue
        digest = hashlib.sha256(np.asarray(tensor.numpy(), order="C").tobytes()).hexdigest()
        own = f"constant_{tensor.dtype.name.lower()}_{'x'.join(map(str, tensor.shape))}_{digest[:16]}"
        del initializers[name]
        if own in initializers:
            value.replace_all_uses_with(initializers[own])
        else:
            value.name = own
            initializers.add(value)


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return dtypes.BY_ONNX[tensor.dtype].is_precision and tensor.nbytes >= INLINE_BYTES


def _take_weights(model: ir.Model) -> dict[str, np.ndarray]:
    """The large float initialisers by name; the others are made constants of the graph itself."""
    weights: dict[str, np.ndarray] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if _is_large(tensor):
            weights[name] = np.asarray(tensor.numpy(), order="C")
        else:
            value.const_value = ir.Tensor(np.asarray(tensor.numpy(), order="C"), dtype=tensor.dtype, name=name)
    return weights


def _point(model: ir.Model, names: Iterable[str], weights: dict[str, np.ndarray]) -> None:
    """Make the named initialisers pointers into the file that holds `weights`."""
    offsets = tensor_offsets(weights)
    for name in names:
        array = weights[name]
        pointer = external(name, VISION_FILE, offsets[name], array.nbytes, dtypes.BY_NUMPY[array.dtype].ir, array.shape)
        model.graph.initializers[name].const_value = pointer


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
