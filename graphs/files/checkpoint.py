"""A checkpoint folder in the Hugging Face layout, read by its safetensors headers only.

No weight is loaded here: a tensor is a file, a byte offset, a dtype and a shape, which is what an ONNX external
tensor needs too. Layout of a safetensors file: 8 bytes little-endian header length, a JSON header with
`data_offsets` relative to the end of the header, then the data (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphs import dtypes
from graphs.records.errors import InputError
from graphs.records.quantization import Quantization
from graphs.records.reading import UnreadableError, parse_json, read_object
from graphs.records.record import MOST_LAYERS, parse_record, require_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
PACKED = "btp"  # quant_method of what this project packs
LAYERS = {"num_hidden_layers", "depth", "num_layers", "n_layers", "n_layer"}
HEADER_BYTES = 100_000_000  # the format's own limit
MOST_SIZE = 2**63  # of offsets and numbers of elements


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie. `offset` counts from the start of the file."""

    name: str  # canonical name, see Checkpoint
    stored_name: str  # name in the file
    file: Path
    dtype: str  # safetensors' code, see graphs/dtypes.py
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: str  # the file's name in the checkpoint folder (`file` may be a link's target with another name)

    @property
    def element(self) -> dtypes.ElementType:
        """What it is made of."""
        return dtypes.BY_SAFETENSORS[self.dtype]

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped read-only; nothing is loaded until it is touched."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.element.numpy)
        path = os.fspath(self.file)  # of a Path numpy looks up every folder, which takes longer than the mapping
        return np.memmap(path, self.element.numpy, "r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """config.json and the tensors of all shards, by canonical name.

    Canonical names are transformers 5 module names without the leading "model.":
    `language_model.layers.0.self_attn.q_proj.weight`, `language_model.embed_tokens.weight`,
    `language_model.norm.weight`, `lm_head.weight`, and the family's vision names
    (`vision_tower.*`, `multi_modal_projector.*`, ...).
    """

    folder: Path
    config: dict[str, Any]  # config.json without the record of a packed checkpoint
    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]  # safetensors files, real paths, symbolic links resolved
    shards: tuple[str, ...]  # their names in the folder, in the order of `files`
    not_read: str = ""  # an index beside them that is not followed, because transformers does not
    shapes_alone: bool = False  # modules made of it get tensors without data, to see whether all fit
    quantization: Quantization | None = None  # of a packed checkpoint, see graphs/files/packed_weights.py

    def __getitem__(self, name: str) -> TensorRef:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(
                f"{self.folder} has no tensor {name}",
                wanted="a complete checkpoint of the model that config.json describes",
                do="download the checkpoint again",
            ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises InputError if it is missing or not JSON."""
    path = folder / "config.json"
    try:
        config = read_object(path, noun="config.json of a model")
    except UnreadableError as error:
        raise InputError(
            f"cannot read {path}: {error.reason}",
            wanted="a checkpoint folder with config.json, *.safetensors and the processor files",
            do="give the folder that holds config.json",
        ) from error
    _check_layers(path, config)
    return config


def _check_layers(path: Path, settings: Any) -> None:
    """Raise InputError for more layers than any model has: transformers would begin to make them all."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in LAYERS and isinstance(value, int | float) and value > MOST_LAYERS:
            raise InputError(f"{path}: {name} {value}", wanted=f"at most {MOST_LAYERS} layers", do="restore it")
        _check_layers(path, value)


def open_checkpoint(
    folder: Path,
    renames: Sequence[tuple[str, str]] = (),
    *,
    weights: Path | None = None,
    listed: Collection[str] | None = None,
) -> Checkpoint:
    """Read config.json and every shard's header; the shards lie in `weights` if that is another folder, of a bundle.

    Of a bundle only the files `listed` in its manifest are looked at.
    `renames` are (stored prefix, canonical prefix) pairs; the first prefix that fits a stored name is replaced.
    Raises InputError for a missing, truncated or corrupt file, a missing shard, or one tensor stored twice.
    """
    config = read_config(folder)
    entry = weights_entry(folder) if weights is None else _bundle_entry(weights, listed)
    paths = _shards(entry)
    for path in paths:
        if listed is not None and path.name not in listed:
            raise InputError(f"{entry} names {path.name}", wanted="files that manifest.json lists", do="restore it")
    tensors: dict[str, TensorRef] = {}
    for path in paths:
        for ref in _read_header(path, renames):
            if ref.name in tensors:
                raise InputError(
                    f"{ref.name} is stored twice, in {tensors[ref.name].shard} and {ref.shard}",
                    wanted="each tensor once",
                    do="remove the shard that does not belong to the checkpoint",
                )
            tensors[ref.name] = ref
    files = tuple(path.resolve() for path in paths)
    single = entry.name == SINGLE and (entry.parent / INDEX).is_file()
    shards = tuple(path.name for path in paths)
    quantization = _take_quantization(folder, config)
    return Checkpoint(
        folder, config, tensors, files, shards, not_read=INDEX if single else "", quantization=quantization
    )


def _take_quantization(folder: Path, config: dict[str, Any]) -> Quantization | None:
    """Our record of packed weights, taken out of `config`: transformers knows none of it. Other methods' stay."""
    fields = config.get("quantization_config")
    if not isinstance(fields, dict) or fields.get("quant_method") != PACKED:
        return None
    del config["quantization_config"]
    source = f"quantization_config in {folder / 'config.json'}"
    return parse_record(Quantization, json.dumps(fields), source=source, noun="record of packed weights")


def weights_entry(folder: Path) -> Path:
    """The file that transformers' from_pretrained begins with: weights, or the index of shards; it need not be there.

    Its order of choice: what config.json names as `transformers_weights`, model.safetensors, the index. An index beside
    model.safetensors is not looked at: save_pretrained leaves one behind when it writes over a sharded folder.
    """
    named = read_config(folder).get("transformers_weights") if (folder / "config.json").is_file() else None
    if named is not None:
        if (
            not isinstance(named, str)
            or Path(named).name != named
            or not named.endswith((".safetensors", INDEX_ENDING))
        ):
            raise InputError(
                f"config.json sets transformers_weights to {named!r}",
                wanted=f"a file in the folder that ends with .safetensors or {INDEX_ENDING}",
                do="restore config.json",
            )
        return folder / require_name(named, "the file of weights", folder / "config.json")
    has_index = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
    return folder / (INDEX if has_index else SINGLE)


def _bundle_entry(folder: Path, listed: Collection[str] | None) -> Path:
    """The same for the weights of a bundle, which have an index unless model.safetensors is all there is."""
    has_index = (folder / INDEX).is_file() if listed is None else INDEX in listed
    return folder / (INDEX if has_index else SINGLE)


def missing_shards(folder: Path) -> list[str]:
    """Names of the weight files that are not there (a link to nothing counts as missing); empty if all are.

    Raises InputError for an index that cannot be read.
    """
    entry = weights_entry(folder)
    if entry.is_file():
        return [name for name in _files_of(entry) if not (folder / name).is_file()]
    if any(folder.glob("*.bin")) and entry.name == SINGLE:  # pickles have an error of their own
        return []
    stray = any(path.is_file() for path in folder.glob("*.safetensors"))
    return [INDEX if stray and entry.name == SINGLE else entry.name]


def open_tensors(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file by their stored names. Raises InputError if it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"no file {path}", wanted="a whole safetensors file", do="get it again")
    return {ref.name: ref for ref in _read_header(path, ())}


def _shards(entry: Path) -> list[Path]:
    folder = entry.parent
    if not entry.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise InputError(
            f"{folder} has no {entry.name}" + (f", only pickles ({pickles[0]})" if pickles else ""),
            wanted="model.safetensors, or shards with model.safetensors.index.json (pickles are never read)",
            do="download the safetensors version of the checkpoint",
        )
    names = _files_of(entry)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing in {folder}: {', '.join(missing[:3])}",
            wanted=f"every shard named in {entry.name}",
            do="download the missing files",
        )
    return [folder / name for name in names]


def _files_of(entry: Path) -> list[str]:
    """Names of the files with weights: those in the index, or the one file itself."""
    return _indexed_files(entry) if entry.name.endswith(INDEX_ENDING) else [entry.name]


def _indexed_files(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in read_object(index, noun="index of shards")["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "it has no readable weight_map") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index} names {outside[0]}", wanted="files beside the index", do="restore the index")
    return [require_name(name, "a file of weights", index) for name in names]


def _read_header(path: Path, renames: Sequence[tuple[str, str]]) -> list[TensorRef]:
    file = path.resolve()
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise _damaged(file, f"the header needs {8 + length} bytes, the file has {size}")
        if length > HEADER_BYTES:
            raise _damaged(file, f"a header of {length} bytes")
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise _damaged(file, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not a JSON object")
    metadata = {} if header.get("__metadata__") is None else header["__metadata__"]
    header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(file, "its __metadata__ is more than texts by name")  # so the format's own library says
    refs = [_tensor_ref(file, size, 8 + length, name, entry, renames) for name, entry in header.items()]
    _check_covered(file, 8 + length, size, refs)
    return [replace(ref, shard=path.name) for ref in refs]


def _check_covered(file: Path, start: int, size: int, refs: Sequence[TensorRef]) -> None:
    """The tensors must fill the file from the header to its end, one after another, as the format says."""
    position = start
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != position:
            raise _damaged(file, f"{ref.stored_name} begins at byte {ref.offset}, what is before it ends at {position}")
        position += ref.nbytes
    if position != size:
        raise _damaged(file, f"the tensors end at byte {position}, the file has {size}")


def _tensor_ref(
    file: Path, size: int, data_start: int, name: str, entry: dict[str, Any], renames: Sequence[tuple[str, str]]
) -> TensorRef:
    try:
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the entry of {name} is not valid") from error
    if not isinstance(dtype, str) or not all(type(size) is int for size in (begin, end, *shape)):
        raise _damaged(file, f"the entry of {name} is not valid")
    if min(begin, end, *shape) < 0 or max(begin, end, math.prod(size for size in shape if size)) > MOST_SIZE:
        raise _damaged(file, f"the entry of {name} has a negative size, or one that is too large")
    if dtype not in dtypes.BY_SAFETENSORS:
        raise InputError(
            f"{file.name}: {name} has dtype {dtype}", wanted=", ".join(dtypes.BY_SAFETENSORS), do="convert it"
        )
    if end - begin != math.prod(shape) * dtypes.BY_SAFETENSORS[dtype].nbytes:
        raise _damaged(file, f"{name} {list(shape)} {dtype} does not take {end - begin} bytes")
    if data_start + end > size:
        raise _damaged(file, f"{name} ends at byte {data_start + end}, the file has {size}")
    canonical = next((new + name[len(old) :] for old, new in renames if name.startswith(old)), name)
    return TensorRef(canonical, name, file, dtype, shape, data_start + begin, end - begin, file.name)


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file} is truncated or damaged: {reason}", wanted="a whole file", do="get it again")
