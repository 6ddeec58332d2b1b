"""Checkpoints of the known models with made-up weights: real shapes, real configuration, no download, no meaning.

For measuring time and memory, which do not depend on the values. The values are sound all the same: norms are one,
matrices keep the scale of what goes through them, so that every layer's activations stay finite in half precision and
attention is neither flat nor on one token. A matrix element is a random sign and mantissa with one fixed exponent, that
is a magnitude spread evenly over [2^e, 2^(e+1)): only integer operations, so the bytes are the same everywhere, and as
fast as the disk.

A checkpoint lies in the cache folder by model, seed and number of layers, and is used again. Shards that an interrupted
run has finished are kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from btp_export.dummy import packed
from btp_export.dummy.processor import save_processor
from btp_export.families import family_for, known_models
from graphs import dtypes
from graphs.files.atomic import check_space, replacing, write_text
from graphs.files.cache_folder import cache_folder, only_one
from graphs.files.folders import put_in_place
from graphs.files.packed_weights import QWEIGHT, SCALES
from graphs.files.safetensors_file import header_bytes, tensor_order
from graphs.records.errors import InputError
from graphs.records.manifest import DUMMY_WEIGHTS
from graphs.records.progress import Report
from graphs.records.record import Record, read_record

MARKER = "btp-dummy.json"  # in the checkpoint's folder: these weights are made up
SHARD_BYTES = 5 * 10**9  # as the hub's shards
PIECE = 2**23  # elements made and written at a time

# Sign and mantissa bits of each type, where its exponent begins, and the exponent's bias.
LAYOUT = {"float16": (0x83FF, 10, 15), "bfloat16": (0x807F, 7, 127)}

ONES = re.compile(r"(norm\d?|ln_q)\.weight$")
ZEROS = re.compile(r"norm\d?\.bias$")
SHARP = re.compile(r"(q_proj|k_proj|qkv|lm_head)\.weight$")  # twice the scale: attention and answers have preferences
RESIDUAL = re.compile(r"(o_proj|down_proj|out_proj|fc2|attn\.proj)\.weight$")  # half: the residual stream grows slowly
SPREAD = math.sqrt(7 / 3)  # root mean square of magnitudes spread evenly over [1, 2)


class DummyRecord(Record):
    """btp-dummy.json: which model's shapes a checkpoint has, and that nothing else of it is real."""

    format: Literal["btp-dummy/1"] = "btp-dummy/1"
    note: str = DUMMY_WEIGHTS
    model: str
    seed: int = Field(ge=0)
    layers: int = Field(ge=1)
    all_layers: int = Field(ge=1)
    group: int | None = None  # weights of four bits in groups of so many, None: of the model's type

    @property
    def origin(self) -> str:
        """What stands for the source of the weights in a manifest."""
        layers = "" if self.layers == self.all_layers else f", {self.layers} of {self.all_layers} decoder layers"
        bits = "" if self.group is None else f", random codes of four bits in groups of {self.group}"
        return f"dummy weights in the shapes of {self.model}, seed {self.seed}{layers}{bits}"


def read_marker(folder: Path) -> DummyRecord | None:
    """The record of a dummy checkpoint, None for any other. Raises InputError if it is damaged."""
    path = folder / MARKER
    if not path.is_file():
        return None
    return read_record(DummyRecord, path, noun="dummy checkpoint record")


def dummy_checkpoint(
    model: str,
    *,
    seed: int = 0,
    layers: int | None = None,
    group: int | None = None,
    report: Report | None = None,
    root: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """The folder of a known model's dummy checkpoint, made now if it is not in the cache; `layers` cuts the decoder.

    With `group` its projections are random codes of four bits in groups of so many (btp_export/dummy/packed.py). No
    file of weights is larger than `shard_bytes`, unless a single tensor is.

    Raises InputError for a model whose configuration is not known, a number of layers it does not have, or too little
    disk, before anything is written.
    """
    config, record = configured(model, seed, layers)
    record = record.model_copy(update={"group": group})
    place = (root or cache_folder("dummy")) / _folder_name(record)
    if (place / MARKER).is_file():
        return place
    tensors = tensor_shapes(config)
    if group is not None:
        config["quantization_config"] = packed.quantization(tensors, group)
        tensors = packed.packed_shapes(tensors, group)
    shards = in_shards(tensors, dtypes.numpy_of(str(config["torch_dtype"])), shard_bytes)
    with only_one(place):
        if not (place / MARKER).is_file():  # somebody else may just have made it
            _make(place, config, record, shards, report)
    return place


def configured(model: str, seed: int = 0, layers: int | None = None) -> tuple[dict[str, Any], DummyRecord]:
    """A known model's configuration with so many decoder layers, and the record of its dummy checkpoint."""
    known = {name: entry for name, entry in known_models().items() if family_for(dict(entry.config)).dummy}
    if model not in known:
        raise InputError(
            f"--dummy-weights for {model!r}", wanted=f"one of {', '.join(known)}", do=f"--model {next(iter(known))}"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} of the dummy weights", wanted="0 to 4294967295", do="--seed 0")
    config = copy.deepcopy(dict(known[model].config))
    everything = config["text_config"]["num_hidden_layers"]
    chosen = everything if layers is None else layers
    if not 1 <= chosen <= everything:
        raise InputError(f"--dummy-layers {chosen}", wanted=f"1 to {everything}, as {model} has", do="leave it out")
    config["text_config"]["num_hidden_layers"] = chosen
    return config, DummyRecord(model=model, seed=seed, layers=chosen, all_layers=everything)


def _folder_name(record: DummyRecord) -> str:
    layers = "" if record.layers == record.all_layers else f"-{record.layers}-layers"
    bits = "" if record.group is None else f"-int4-g{record.group}"
    return f"{record.model}-seed{record.seed}{layers}{bits}"


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by stored name, from transformers' own model without weights."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(whole)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _make(
    place: Path,
    config: dict[str, Any],
    record: DummyRecord,
    shards: Mapping[str, Mapping[str, tuple[int, ...]]],
    report: Report | None,
) -> None:
    """Write beside the place, shard by shard, and rename when all is there."""
    kind = str(config["torch_dtype"])
    folder = place.with_name(f".{place.name}.partial")
    total = sum(
        math.prod(shape) * stored_type(name, kind).itemsize for part in shards.values() for name, shape in part.items()
    )
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    check_space(place, total - there, what=f"the dummy checkpoint of {record.model}", do="set XDG_CACHE_HOME elsewhere")
    folder.unlink(missing_ok=True) if folder.is_symlink() else None  # its name can be guessed
    folder.mkdir(exist_ok=True)
    done = 0
    for name, part in shards.items():
        for written in _write_shard(folder / name, part, kind, record.seed):
            done += written
            if report is not None:
                report(done // 2**20, total // 2**20, "writing dummy weights, MiB")
    names = {tensor: file for file, part in shards.items() for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    save_processor(config, folder)
    write_text(folder / MARKER, record.model_dump_json(indent=1) + "\n")
    put_in_place(folder, place)  # what is there without its marker is not whole


def in_shards(
    tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], most: int = SHARD_BYTES
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors in the model's order, packed into files of at most `most` bytes."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * stored_type(name, str(dtype.name)).itemsize
        if filled and filled + size > most:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def stored_type(name: str, kind: str) -> np.dtype[Any]:
    """The type of a tensor in a checkpoint of that type: codes are bytes."""
    return np.dtype(np.uint8) if name.endswith(f".{QWEIGHT}") else dtypes.numpy_of(kind)


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str, seed: int) -> Iterator[int]:
    """Write one shard if it is not there; gives the bytes of each piece as it is written."""
    stand_ins = {name: np.broadcast_to(np.zeros((), stored_type(name, kind)), shape) for name, shape in shapes.items()}
    size = sum(array.nbytes for array in stand_ins.values())
    header = header_bytes(stand_ins)
    if path.is_file() and path.stat().st_size == len(header) + size:
        yield size
        return
    with replacing(path) as stream:
        stream.write(header)
        for name in tensor_order(stand_ins):
            for piece in tensor_bits(name, shapes[name], kind, seed):
                stream.write(piece.data)
                yield piece.nbytes


def tensor_bits(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Iterator[np.ndarray]:
    """The bits of one tensor's elements, as uint16 pieces in order; the same for the same name, shape and seed.

    Codes of four bits are pieces of uint8, two codes each.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    random = np.random.SFC64(start)
    count = math.prod(shape)
    if name.endswith(f".{QWEIGHT}"):
        for first in range(0, count, PIECE):
            size = min(PIECE, count - first)
            yield random.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size]
        return
    mask, shift, bias = LAYOUT[kind]
    if name.endswith(f".{SCALES}"):
        mask &= 0x7FFF  # no signs
    unit = np.uint16(bias << shift)
    exponent = np.uint16((bias + _exponent(name, shape)) << shift)
    for first in range(0, count, PIECE):
        size = min(PIECE, count - first)
        if ONES.search(name) or ZEROS.search(name):
            yield np.full(size, unit if ONES.search(name) else 0, np.uint16)
            continue
        bits = random.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size]
        bits &= np.uint16(mask)
        bits |= exponent
        yield bits


def _exponent(name: str, shape: tuple[int, ...]) -> int:
    """e of the magnitudes [2^e, 2^(e+1)): the nearest to gain / sqrt(inputs), the scale that keeps a signal's own."""
    if "embed_tokens" in name:
        return -1
    if name.endswith(f".{SCALES}"):
        # Codes around 8 have a root mean square of 4.6, so scales a quarter as large keep that of the product (as if in
        # groups of 128; in smaller ones the weights are up to twice as large).
        return _exponent(f"{name.removesuffix(SCALES)}weight", (shape[0], shape[1] * 128)) - 2
    if len(shape) < 2 or "position_embedding" in name:
        return -6
    gain = 2.0 if SHARP.search(name) else 0.5 if RESIDUAL.search(name) else 1.0
    return round(math.log2(gain / math.sqrt(math.prod(shape[1:])) / SPREAD))
