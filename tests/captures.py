"""The vision graph of a tower is captured once a run of tests; an export of the same tower takes a copy.

Most exports of the tests are of one tiny tower, and capturing it takes most of their time. Processes of a run share
captures by a folder. That a capture of the same tower gives the same bytes, also when the tower ran before, is shown
by tests/graphs/building/test_vision_capture.py, which takes none from here, and by
tests/btp_export/test_homes_and_encodings.py, where another process captures.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
from transformers import PreTrainedConfig
from transformers.utils import output_capturing

from graphs import names
from graphs.building.graph_builder import BuiltGraph, serialize
from graphs.files.folders import lock_file

Captured = tuple[BuiltGraph, dict[str, Any]]


FOLDER = "TESTS_SHARE_CAPTURES"  # names the folder in the environment, from the first fixture of a run on


class Remembered:
    """`capture_vision`, asked once for each tower and settings by all processes of a run."""

    def __init__(self, capture: Callable[..., Captured]) -> None:
        self._capture = capture
        self._known: dict[str, Captured] = {}

    def __call__(self, module: Any, **settings: Any) -> Captured:
        digest = hashlib.sha256(repr(sorted(settings.items())).encode())
        try:
            for part in parts_of(module):
                digest.update(hashlib.sha256(part).digest())
        except Exception:  # it holds what cannot be compared
            return self._capture(module, **settings)
        key = digest.hexdigest()
        if key not in self._known:
            self._known[key] = shared(key, lambda: self._capture(module, **settings))
        graph, weights = self._known[key]
        return BuiltGraph(graph.name, graph.model.clone(), graph.layers), dict(weights)


def shared(key: str, capture: Callable[[], Captured]) -> Captured:
    """What another process of the run left under `key`, or a capture that is left there."""
    folder = Path(os.environ[FOLDER])
    folder.mkdir(exist_ok=True)
    path = folder / key
    with lock_file(path.with_suffix(".lock"), wait=True):
        if path.exists():
            model, weights = pickle.loads(path.read_bytes())
            return BuiltGraph(
                names.VISION, ir.serde.deserialize_model(onnx.ModelProto.FromString(model)), None
            ), weights
        graph, weights = capture()
        path.write_bytes(pickle.dumps((serialize(graph), weights)))
        return graph, weights


class Pickler(pickle.Pickler):
    """Tensors by their values: torch's own form has addresses in it.

    Configurations have the kind of their model, which is stored in those that were read from a file that names it.
    """

    def reducer_override(self, held: Any) -> Any:
        if isinstance(held, PreTrainedConfig):
            return dict, (sorted((vars(held) | {"model_type": held.model_type}).items()),)
        if type(held).__module__.partition(".")[0] != "torch" or not hasattr(held, "numpy"):
            return NotImplemented
        return bytes, (f"{held.dtype} {tuple(held.shape)} ".encode() + held.detach().contiguous().numpy().tobytes(),)


def pickled(value: Any) -> bytes:
    """The same for two values that are alike."""
    stream = io.BytesIO()
    Pickler(stream).dump(value)
    return stream.getvalue()


def parts_of(module: Any) -> Iterator[bytes]:
    """All that decides what a module computes: classes, attributes, weights, variables that a local class closes over.

    Not whether it ran before: transformers then hooks layers to record what they give, which changes nothing.
    Raises whatever pickle does for an attribute of another kind.
    """
    kind = type(module)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    for cell in (kind.forward.__closure__ or ()) if "<locals>" in kind.__qualname__ else ():
        held = cell.cell_contents
        yield held.__name__.encode() if isinstance(held, ModuleType) else pickled(held)
    for name, value in sorted(vars(module).items()):
        if name == "_output_capturing_hooks_installed":
            continue
        yield name.encode()
        if name in ("_parameters", "_buffers"):
            for key, tensor in value.items():
                yield f"{key} {None if tensor is None else (tensor.dtype, tuple(tensor.shape))}".encode()
                yield b"" if tensor is None else tensor.detach().contiguous().numpy().tobytes()
        elif name == "_modules":
            for key, child in value.items():
                yield key.encode()
                yield from parts_of(child)
        elif name == "_forward_hooks":
            yield pickled([hook for hook in value.values() if hook.__module__ != output_capturing.__name__])
        else:
            yield pickled(value)
