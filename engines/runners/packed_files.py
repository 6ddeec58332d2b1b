"""ONNX Runtime's own layout of four-bit matrices, in files that all sessions map: one copy in memory, however many.

MatMulNBits brings its codes into another order when a session is opened, in memory of that session's own. Prefill,
decode, and the same model without pruning beside them would each hold all weights again. ONNX Runtime can write packed
weights into a file, behind the initialiser that they were made of, and maps them from there where the initialiser's
entry names them. So each matrix is packed once, by a session of one node, into a file of the cache folder, and the
graphs' entries are pointed there. Results are the same bit for bit; packed weights of another processor or version are
not taken, those are packed again.

Large plain products, which a CPU computes in float32, are packed and shared in the same way: the output projection,
which decode has as well as the head of the prefill, and all projections of a large model with its own weights.

A file holds the weights and the packed ones, so the cache takes twice the disk that the weights take: with weights that
are stored in float16 and computed in float32, four times.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from engines.runners.mapped_weights import external_entry, mapped_tensors, nbytes, share_weights
from engines.runners.session_options import FOLDER_OPTION, LARGE
from graphs.files.atomic import move
from graphs.files.folders import scratch
from graphs.files.onnx_file import read_graph

NODE: Final = "MatMulNBits"
PRODUCT: Final = "Gemm"
WEIGHT: Final = 1  # which of their inputs is packed
FREE_CAST: Final = "InsertedPrecisionFreeCast_"  # how the names of its casts begin
MODEL_FILE, DATA_FILE = "packed.onnx", "packed.bin"
SMALLEST: Final = 2**20  # bytes of codes below which packing again costs less than a file
UNUSED_DAYS: Final = 30  # after which a matrix is removed
SPARE: Final = 2 * 2**30  # bytes of the disk that are left free

Stored = Mapping[str, TensorProto]


class PackedFiles:
    """The packed matrices under `folder`, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def share(self, model: onnx.ModelProto, path: Path, options: ort.SessionOptions) -> list[Any]:
        """Point the model's codes at packed files, making what is missing, as far as the disk has room.

        path: the graph's file, beside which its weights lie. Whatever else is stored outside the model becomes a mapped
        tensor of `options`. The session needs what is given back for as long as it lives.
        """
        stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
        _widen_products(model, stored)
        places: dict[str, Path] = {}
        for node in model.graph.node:
            if not _is_shared(node, model, stored):
                continue
            place = self._place(_alone(node, model, stored), path)
            if place is None:
                break  # the disk is full
            places[node.input[WEIGHT]] = place
        if not places:
            return share_weights(model, path.parent, options)
        options.add_session_config_entry(FOLDER_OPTION, str(self._folder))
        _point(model, places)
        # Casts of some are folded, for which ONNX Runtime would look in the folder of packed files.
        others = mapped_tensors(model, path.parent, wanted=lambda name: name not in places)
        options.add_external_initializers(list(others), list(others.values()))
        return list(others.values())

    def _place(self, small: onnx.ModelProto, path: Path) -> Path | None:
        """The folder of one packed matrix, made now if it is not there; None where the disk has no room."""
        place = self._folder / _key(small, path)
        if not place.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            needed = 3 * sum(nbytes(tensor) for tensor in small.graph.initializer)
            if shutil.disk_usage(self._folder).free < needed + SPARE:
                return None
            self._sweep()
            _make(small, path, place)
        os.utime(place)
        return place

    def _sweep(self) -> None:
        """Remove what has not been used for long; a session that has it mapped keeps it until it ends."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for place in self._folder.iterdir():
            if place.stat().st_mtime < oldest:
                shutil.rmtree(place, ignore_errors=True)


def _casts(model: onnx.ModelProto) -> dict[str, NodeProto]:
    return {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}


def _before(name: str, casts: Mapping[str, NodeProto]) -> list[NodeProto]:
    """The casts that make a value of a stored tensor, the first one first."""
    found: list[NodeProto] = []
    while name in casts:
        found.insert(0, casts[name])
        name = casts[name].input[0]
    return found


def _is_shared(node: NodeProto, model: onnx.ModelProto, stored: Stored) -> bool:
    """Whether a node's weight is worth a file: four-bit codes, or a large matrix in float32."""
    if node.op_type == NODE:
        codes = stored.get(node.input[WEIGHT])
        return codes is not None and nbytes(codes) >= SMALLEST
    return _large_product(node, _casts(model), stored) == TensorProto.FLOAT


def _large_product(node: NodeProto, casts: Mapping[str, NodeProto], stored: Stored) -> int | None:
    """The element type in which a plain product gets its stored matrix, if it has a large one."""
    if node.op_type != PRODUCT or {attribute.name: attribute.i for attribute in node.attribute} != {"transB": 1}:
        return None
    before = _before(node.input[WEIGHT], casts)
    tensor = stored.get(before[0].input[0] if before else node.input[WEIGHT])
    if tensor is None or prod(tensor.dims) < LARGE:
        return None
    return _type(tensor, before)


def _type(tensor: TensorProto, before: Sequence[NodeProto]) -> int:
    """The element type of a stored tensor behind its casts."""
    return int(before[-1].attribute[0].i if before else tensor.data_type)


def _widen_products(model: onnx.ModelProto, stored: Stored) -> None:
    """Write out what ONNX Runtime does with large products in float16: casts around one in float32."""
    nodes, casts = [], _casts(model)
    for node in model.graph.node:
        if _large_product(node, casts, stored) != TensorProto.FLOAT16:
            nodes.append(node)
            continue
        y = node.output[0]
        wide = [f"{name}.{y}.wide" for name in node.input]
        nodes += [_free_cast(a, b, TensorProto.FLOAT) for a, b in zip(node.input, wide, strict=True)]
        product = NodeProto()
        product.CopyFrom(node)
        product.input[:], product.output[:] = wide, [f"{y}.wide"]
        nodes += [product, _free_cast(f"{y}.wide", y, TensorProto.FLOAT16)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _free_cast(before: str, after: str, element: int) -> NodeProto:
    """A cast like those of ONNX Runtime itself: pairs of them go, so nothing is rounded between two nodes."""
    return helper.make_node("Cast", [before], [after], f"{FREE_CAST}{after}", to=element)


def _alone(node: NodeProto, model: onnx.ModelProto, stored: Stored) -> onnx.ModelProto:
    """A model of the node alone, on one row, with its stored inputs and the casts behind them; no bias of a product."""
    casts = _casts(model)
    inputs = list(node.input[WEIGHT:] if node.op_type == NODE else node.input[WEIGHT : WEIGHT + 1])
    chains = [_before(name, casts) for name in inputs]
    sources = [chain[0].input[0] if chain else name for name, chain in zip(inputs, chains, strict=True)]
    if node.op_type == NODE:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        rows, width = attributes["N"], attributes["K"]
        element = _type(stored[sources[1]], chains[1])  # of the scales, and so of the rows
    else:
        (rows, width), element = stored[sources[0]].dims, TensorProto.FLOAT
    only = NodeProto()
    only.CopyFrom(node)
    # Names that tell graphs apart are no part of the matrix.
    only.name, only.output[0] = "", "result"
    only.input[:] = ["row", *sources]
    before: list[NodeProto] = []
    for place, chain in enumerate(chains, WEIGHT):
        for cast in chain:
            own = NodeProto()
            own.CopyFrom(cast)
            own.name, own.input[0], own.output[0] = "", only.input[place], f"wide_{len(before)}"
            only.input[place] = own.output[0]
            before.append(own)
    graph = helper.make_graph(
        [*before, only],
        "packed",
        [helper.make_tensor_value_info("row", element, [1, width])],
        [helper.make_tensor_value_info("result", element, [1, rows])],
        initializer=[stored[name] for name in dict.fromkeys(sources) if name in stored],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _key(small: onnx.ModelProto, path: Path) -> str:
    """The name of a matrix: where its bytes lie, what is done with them, and by which program on which processor."""
    files = {external_entry(tensor)["location"] for tensor in small.graph.initializer}
    status = [(path.parent / file).stat() for file in sorted(files)]
    weights = [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in status]
    text = json.dumps([weights, ort.__version__, platform.machine(), _processor()])
    # A derived bundle calls its files differently, but they are the same: names are not part of the key.
    places = [(t.name, t.data_type, list(t.dims), external_entry(t).get("offset")) for t in small.graph.initializer]
    nodes = b"".join(node.SerializeToString(deterministic=True) for node in small.graph.node)
    whole = text.encode() + json.dumps(places).encode() + nodes
    return hashlib.sha256(whole).hexdigest()[:32]


def _processor() -> list[str]:
    """What tells processors apart that pack differently, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    return next((line.split() for line in lines if line.startswith(("flags", "Features"))), [platform.processor()])


def _make(small: onnx.ModelProto, path: Path, place: Path) -> None:
    """Write the packed matrix beside the place and rename it there; whoever else made it first is as good."""
    with scratch(place.parent, ".making-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(folder / MODEL_FILE)
        for key, value in (
            (FOLDER_OPTION, str(path.parent)),
            ("session.save_external_prepacked_constant_initializers", "1"),
            ("session.optimized_model_external_initializers_file_name", DATA_FILE),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
        ):
            options.add_session_config_entry(key, value)
        ort.InferenceSession(small.SerializeToString(), options, providers=["CPUExecutionProvider"])
        if not place.is_dir():
            move(folder, place)


def _point(model: onnx.ModelProto, places: Mapping[str, Path]) -> None:
    """Let weights of a graph be those in packed files: the value that a product reads -> the folder of its file.

    A weight that was cast is stored there as it is cast: its casts and the stored one go, unless others read them.
    """
    graph, stored = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    gone = {name for place in places for cast in _before(place, _casts(model)) for name in (*cast.input, *cast.output)}
    kept, used = list[NodeProto](), set[str]()
    for node in reversed(graph.node):  # whoever reads a value comes before it
        if node.op_type == "Cast" and (node.output[0] in places or node.output[0] in gone - used):
            continue
        kept.insert(0, node)
        used.update(node.input)
    del graph.node[:]
    graph.node.extend(kept)
    for name, place in places.items():
        packed = _packed_tensor(place)
        tensor = stored.get(name)
        if tensor is None:
            tensor = graph.initializer.add(name=name, data_type=packed.data_type, dims=packed.dims)
            tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for entry in packed.external_data:
            own = f"{place.name}/{DATA_FILE}" if entry.key == "location" else entry.value
            tensor.external_data.add(key=entry.key, value=own)
    left = [tensor for tensor in graph.initializer if tensor.name not in gone or tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _packed_tensor(place: Path) -> TensorProto:
    """The one that ONNX Runtime packed, of those in a packed file; it is the largest."""
    packed: TensorProto = max(read_graph(place / MODEL_FILE).graph.initializer, key=nbytes)
    return packed
