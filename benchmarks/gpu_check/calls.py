"""Every case of every operator as a call of the kernels' C interface, with what the reference gives, in one file.

Structure and pointers of a call come from the operator's kernel_python.py, as engines.native.kernels takes them. So an
operator with cases, a reference and that file is here without a word.

The file is an index of lines and then bytes, at offsets from the end of the index:

    btp-gpu-cases 1 <bytes of the index>
    raw <id> <offset> <bytes> <times>                  an input as it is, so many times one behind the other
    gram <id> <offset> <B> <V> <channels> <shift> <bytes of an element> <offset of patches> <number of patches>
                                                       similarity = features int8 [B,V,channels] . themselves / 2^shift
    call <name> <function> <tags>                      then what follows, up to the next call:
    struct <offset> <bytes>                            the C structure
    expected <offset> <bytes> <row> <across> <down>    the output: rows of so many bytes, each repeated across, all down
    close <type> <row> <tolerance>                     where equal bits are not asked for: of each row's norm
    parameters | in <id> | null | out | workspace | size | stream     the arguments in order

native/cases.h reads it. Beside it lies calls.json, from which Python makes arrays and ONNX nodes again.
"""

import ctypes
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphs import dtypes, ops
from graphs.ops.common.trt_python import Tensor

Array = npt.NDArray[Any]
SMALL_BYTES = 1 << 16  # inputs of a case that tools which slow everything down can run
TIMED_BYTES = 1 << 17
INPUT = 1 << 40  # in the place of the address of the first input; the others follow


@dataclass(frozen=True)
class Gram:
    """A similarity that is exact, so that it is made where it is needed and equal everywhere.

    features [B,V,channels] int8; an element is their product / 2^shift, in `dtype`; then `values` go to flat `places`.
    """

    features: Array
    shift: int
    dtype: npt.DTypeLike = np.float32
    places: Array | None = None
    values: Array | None = None

    def array(self) -> Array:
        """The matrix [B,V,V]."""
        wide = self.features.astype(np.float32)  # sums of integers below 2^24: exact in any order
        matrix: Array = (wide @ wide.transpose(0, 2, 1) / np.float32(2**self.shift)).astype(self.dtype)
        if self.places is not None and self.values is not None:
            matrix.reshape(-1)[self.places] = self.values.astype(self.dtype)
        return matrix


@dataclass(frozen=True)
class Stacked:
    """A large input of which the file holds a part: `part`, `times` times one below the other."""

    part: Array
    times: int

    def array(self) -> Array:
        """All of it."""
        return np.concatenate([self.part] * self.times)


@dataclass(frozen=True)
class Given:
    """A case of an operator on its way into the file; an input is an array, or what makes one."""

    operator: str  # folder in graphs/ops
    name: str
    inputs: dict[str, Array | Gram | Stacked]
    attributes: dict[str, Any]
    tags: tuple[str, ...] = ()
    wanted: Array | None = None  # what the reference gives for the parts of what is stacked: y repeats them
    tiles: tuple[int, int] = (1, 1)  # how often `wanted` is repeated across and down

    def arrays(self) -> dict[str, Array]:
        """All inputs as arrays."""
        return {
            name: tensor if isinstance(tensor, np.ndarray) else tensor.array() for name, tensor in self.inputs.items()
        }


def all_cases() -> list[Given]:
    """The cases in the own list of every operator that has a kernel, tagged by their size."""
    cases = []
    for operator in (folder.name for folder in ops.folders() if (folder / "kernel_python.py").is_file()):
        for case in ops.operator(operator).cases():
            size = sum(array.nbytes for array in case.inputs.values())
            tags = ["case", *["small"] * (size <= SMALL_BYTES), *["timed"] * (size >= TIMED_BYTES)]
            cases.append(Given(operator, case.name, case.inputs, case.attributes, tuple(tags)))
    return cases


def expected(given: Given) -> Array:
    """What the operator's reference gives."""
    import torch

    if given.wanted is not None:
        across, down = given.tiles
        return np.tile(given.wanted, (down, across))
    module = ops.operator(given.operator)
    tensors = {name: to_torch(array) for name, array in given.arrays().items()}
    result: torch.Tensor = module.reference(**tensors, **given.attributes)
    return from_torch(result.contiguous())


def to_torch(array: Array) -> Any:
    """A tensor of the same bits; torch takes no bfloat16 from numpy."""
    import torch

    copy = np.array(array, order="C")
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def from_torch(tensor: Any) -> Array:
    """The other way round."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(dtypes.BFLOAT16))
    return np.asarray(tensor.numpy())


# -- the C interface ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CCall:
    """One call of the C interface: words as in the file."""

    function: str
    parameters: bytes
    arguments: list[str]


def c_call(given: Given, shapes: Sequence[tuple[tuple[int, ...], str]]) -> CCall:
    """The call that engines.native.kernels makes of this case; `shapes` are shape and type of each input."""
    interface = import_module(f"{ops.__name__}.{given.operator}.kernel_python")
    tensors = [Tensor(INPUT + number, shape, dtype) for number, (shape, dtype) in enumerate(shapes)]
    settings = interface.settings(tensors, given.attributes)
    inputs = ["null" if address is None else f"in {address - INPUT}" for address in interface.pointers(tensors)]
    room = ["workspace", "size"] if interface.WORKSPACE else []
    return CCall(f"btp_{given.operator}", bytes(settings), ["parameters", *inputs, "out", *room, "stream"])


# -- writing -----------------------------------------------------------------------------------------------------------


class CaseWriter:
    """Collects calls; equal inputs lie in the file once."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._lines: list[str] = []
        self._places: dict[bytes, int] = {}
        self._inputs: dict[Any, int] = {}
        self._records: list[dict[str, Any]] = []

    def add(self, given: Given, wanted: Array) -> None:
        """One case with its output."""
        module = ops.operator(given.operator)
        inputs = [self._input(tensor) for tensor in given.inputs.values()]
        part = wanted if given.wanted is None else given.wanted
        row = part.nbytes // len(part) if given.wanted is not None else part.nbytes
        wanted_at = self._put(part.tobytes())
        native = c_call(given, [(tuple(i["shape"]), i["dtype"]) for i in inputs])
        self._lines += [
            f"call {given.operator}/{given.name} {native.function} {','.join(given.tags) or 'none'}",
            f"struct {self._put(native.parameters)} {len(native.parameters)}",
            f"expected {wanted_at} {wanted.nbytes} {row} {given.tiles[0]} {given.tiles[1]}",
        ]
        tolerance = getattr(module, "TOLERANCE", {}).get(wanted.dtype.name)  # by type, of a row's norm; or equal bits
        if tolerance is not None:
            self._lines.append(f"close {wanted.dtype.name} {wanted.shape[-1]} {tolerance!r}")
        for word in native.arguments:
            self._lines.append(f"in {inputs[int(word[3:])]['id']}" if word.startswith("in ") else word)
        self._records.append(
            {
                "name": f"{given.operator}/{given.name}",
                "op": module.NAME,
                "attributes": given.attributes,
                "tags": list(given.tags),
                "inputs": dict(zip(given.inputs, inputs, strict=True)),
                "function": native.function,
                "parameters": native.parameters.hex(),
                "arguments": native.arguments,
                "tolerance": tolerance,
                "output": {"shape": list(part.shape), "dtype": wanted.dtype.name, "offset": wanted_at},
                "tiles": list(given.tiles),
            }
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """cases.bin and calls.json."""
        index = "\n".join(self._lines) + "\n"
        length = len(index.encode())
        size = length
        while size != length + len(f"btp-gpu-cases 1 {size}\n"):
            size = length + len(f"btp-gpu-cases 1 {size}\n")
        head = f"btp-gpu-cases 1 {size}\n{index}".encode()
        (folder / "cases.bin").write_bytes(head + self._bytes)
        (folder / "calls.json").write_text(json.dumps({"index": size, "calls": self._records}), encoding="utf-8")

    def _put(self, content: bytes) -> int:
        """The offset at which these bytes lie."""
        if content not in self._places:
            self._bytes += bytes(-len(self._bytes) % 16)
            self._places[content] = len(self._bytes)
            self._bytes += content
        return self._places[content]

    def _input(self, tensor: Array | Gram | Stacked) -> dict[str, Any]:
        if isinstance(tensor, Gram):
            return self._gram(tensor)
        part, times = (tensor.part, tensor.times) if isinstance(tensor, Stacked) else (tensor, 1)
        dense = np.ascontiguousarray(part)
        offset = self._put(dense.tobytes())
        number = self._number(("raw", f"{offset} {dense.nbytes} {times}"))
        shape = [times * len(part), *part.shape[1:]] if part.ndim else []
        return {"id": number, "shape": shape, "dtype": dense.dtype.name, "offset": offset, "times": times}

    def _gram(self, gram: Gram) -> dict[str, Any]:
        features = np.ascontiguousarray(gram.features, np.int8)
        places = np.zeros(0, np.int32) if gram.places is None else gram.places.astype(np.int32)
        values = np.zeros(0, np.float32) if gram.values is None else gram.values.astype(np.float32)
        batch, tokens, channels = features.shape
        dtype, offset, patch = np.dtype(gram.dtype), self._put(features.tobytes()), 0
        patch = self._put(places.tobytes() + values.tobytes())
        line = f"{offset} {batch} {tokens} {channels} {gram.shift} {dtype.itemsize} {patch} {len(places)}"
        description = {"shape": [batch, tokens, tokens], "dtype": dtype.name, "features": offset, "channels": channels}
        description |= {"shift": gram.shift, "patch": patch, "patches": len(places)}
        return {"id": self._number(("gram", line)), **description}

    def _number(self, key: tuple[str, str]) -> int:
        if key not in self._inputs:
            self._inputs[key] = len(self._inputs)
            self._lines.append(f"{key[0]} {self._inputs[key]} {key[1]}")
        return self._inputs[key]


def write_cases(folder: Path, cases: Iterable[Given], report: Any = lambda name: None) -> int:
    """Write all of them with what their references give; how many."""
    writer, count = CaseWriter(), 0
    for given in cases:
        report(f"{given.operator}/{given.name}")
        writer.add(given, expected(given))
        count += 1
    writer.write(folder)
    return count


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call read back: arrays by name, attributes, the expected output, and the C call."""

    name: str
    op: str
    tags: tuple[str, ...]
    attributes: dict[str, Any]
    inputs: dict[str, Array]
    wanted: Array
    c: CCall
    tolerance: float | None  # largest error of an element, relative to the norm of its row; None: equal bits


def read_calls(folder: Path, tag: str | None = None) -> Iterable[Call]:
    """The calls of a folder that bear the tag, one after another, because the large ones are large."""
    described = json.loads((folder / "calls.json").read_text(encoding="utf-8"))
    content = memoryview((folder / "cases.bin").read_bytes())[described["index"] :]
    for entry in described["calls"]:
        if tag is None or tag in entry["tags"]:
            yield Call(
                entry["name"], entry["op"], tuple(entry["tags"]), entry["attributes"],
                {name: _read_input(content, record) for name, record in entry["inputs"].items()},
                _read_output(content, entry),
                CCall(entry["function"], bytes.fromhex(entry["parameters"]), entry["arguments"]), entry["tolerance"],
            )  # fmt: skip


def _read(content: memoryview, offset: int, shape: Sequence[int], dtype: str) -> Array:
    kind = dtypes.numpy_of(dtype)
    count = int(np.prod(shape))
    return np.frombuffer(content, kind, count, offset).reshape(shape)


def _read_output(content: memoryview, entry: dict[str, Any]) -> Array:
    output, (across, down) = entry["output"], entry["tiles"]
    part = _read(content, output["offset"], output["shape"], output["dtype"])
    return part if (across, down) == (1, 1) else np.tile(part, (down, across))


def _read_input(content: memoryview, record: dict[str, Any]) -> Array:
    if "features" not in record:
        rows, *others = record["shape"]
        part = _read(content, record["offset"], (rows // record["times"], *others), record["dtype"])
        return part if record["times"] == 1 else Stacked(part, record["times"]).array()
    batch, tokens, _ = record["shape"]
    features = _read(content, record["features"], (batch, tokens, record["channels"]), "int8")
    places = _read(content, record["patch"], (record["patches"],), "int32")
    values = _read(content, record["patch"] + 4 * record["patches"], (record["patches"],), "float32")
    return Gram(features, record["shift"], np.dtype(record["dtype"]), places, values).array()


def launch(library: ctypes.CDLL, call: Call) -> tuple[int, Array]:
    """Make the C call with the arrays' own addresses, for kernels that run on the CPU: status and output."""
    output = np.full(call.wanted.nbytes, 0xA5, np.uint8)
    parameters = ctypes.create_string_buffer(call.c.parameters, len(call.c.parameters))
    size = getattr(library, f"{call.c.function}_workspace", None)
    bytes_ = 0
    if size is not None:
        size.restype = ctypes.c_size_t
        bytes_ = int(size(parameters))
    workspace = np.full(bytes_ + 16, 0xFF, np.uint8)
    inputs = [np.array(array, order="C") for array in call.inputs.values()]
    fixed = {"parameters": ctypes.addressof(parameters), "out": output.ctypes.data, "workspace": workspace.ctypes.data}
    fixed |= {"size": bytes_, "stream": 0, "null": 0}
    values = [
        fixed[word] if word in fixed else inputs[int(word.removeprefix("in "))].ctypes.data for word in call.c.arguments
    ]
    status = getattr(library, call.c.function)(*map(ctypes.c_size_t, values))
    return int(status), output.view(call.wanted.dtype).reshape(call.wanted.shape)
