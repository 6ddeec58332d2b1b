"""Formats of four-bit checkpoints: one file a format. Adding one is adding a file that defines FORMAT.

A format says whether a checkpoint is its own, refuses by name what it does not read, and makes of the tensors of one
linear layer a packed matrix whose numbers are exactly those of the format's own formula. Files that begin with "_" are
shared.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

from graphs.files.checkpoint import PACKED, Checkpoint, TensorRef
from graphs.files.packed_weights import PackedMatrix
from graphs.records.errors import InputError
from graphs.records.reading import read_object

# Methods that many checkpoints name, and what to do about those that no file here reads.
OTHERS = {
    "bitsandbytes": "its codes (NF4, LLM.int8) are of other kinds; take the 16-bit checkpoint and --weights int4",
    "gguf": "its blocks are of other kinds; take the 16-bit checkpoint and --weights int4",
    "fp8": "8 bits are not read; take the 16-bit checkpoint and --weights int4",
}
READ = "take one in AWQ (gemm), GPTQ, compressed-tensors (pack-quantized) or ModelOpt W4A16_AWQ, or the 16-bit one"
# Where config.json and its text_config may say what their codes are; the second is compressed-tensors' older word.
KEYS = ("quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"
# Files that say it for codes of which config.json says nothing, as older AutoGPTQ and AutoAWQ left it.
BESIDE = ("quantize_config.json", "quant_config.json")
# Tensors that full weights and packed ones (graphs/files/packed_weights.py) never have.
FOREIGN = ("weight_packed", "weight_zero_point", "qzeros", "g_idx", "pre_quant_scale")


Settings: TypeAlias = Mapping[str, Any]  # what a checkpoint says of its codes, in the format's own words


class Format(Protocol):
    """How one program stores matrices of four bits."""

    name: str
    """Its `quant_method`; as it is called in messages and in the record of the packed checkpoint."""
    parts: tuple[str, ...]
    """Last parts of the names of a quantised layer's tensors; the first is its mark."""

    def check(self, settings: Settings) -> None:
        """Raise InputError for a variant that is not read."""

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """N, K and the group of one layer, from headers alone. Raises InputError for tensors that do not fit."""

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """One layer. Raises InputError for codes that cannot be stored."""


def known_formats() -> dict[str, Format]:
    """All formats by file name."""
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in sorted(files)}


def find_format(folder: Path, config: Mapping[str, Any]) -> tuple[Format, Settings] | None:
    """The format of a checkpoint folder and what it says of its codes; None for one without a foreign quantisation.

    Raises InputError for a method that is not read, and for a folder of two.
    """
    stated = _stated(folder, config)
    methods = list(dict.fromkeys(method for method, _ in stated))
    if len(methods) > 1:
        refuse(
            f"{folder.name} is quantised twice: {' and '.join(methods)}",
            "one method",
            "remove the settings that are not of its tensors",
        )
    found = [_checked(folder, method, fields) for method, fields in stated if method != PACKED]
    return found[0] if found else None


def find_beside(checkpoint: Checkpoint) -> tuple[Format, Settings] | None:
    """The same for codes of which config.json says nothing: what a file beside it says; None for full weights.

    Such a file is left alone beside full weights, as transformers does. Raises InputError as find_format, and for codes
    of which no file says anything.
    """
    mark = next((ref for name, ref in checkpoint.tensors.items() if name.rpartition(".")[2] in FOREIGN), None)
    if mark is None:
        return None
    for path in (checkpoint.folder / name for name in BESIDE):
        fields = read_object(path) if path.is_file() else {}
        method = fields.get("quant_method") or ("awq" if "w_bit" in fields else "gptq" if "bits" in fields else None)
        if method is not None:
            return _checked(checkpoint.folder, str(method).lower(), fields)
    refuse(
        f"{mark.shard}: {mark.stored_name} is of quantised weights, of which config.json says nothing",
        f"its quantization_config, or {' or '.join(BESIDE)} beside it",
        "restore the model's own files",
    )


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of codes."""
    rest = {key: value for key, value in config.items() if key not in KEYS}
    text = rest.get("text_config")
    if isinstance(text, Mapping):
        rest["text_config"] = {key: value for key, value in text.items() if key not in KEYS}
    return rest


def _stated(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, Settings]]:
    """Methods and settings in config.json, in its text_config, and in ModelOpt's own file."""
    stated: list[tuple[str, Settings]] = []
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            if holder.get(key) is not None:
                fields = require_object(holder[key], key)
                stated.append((str(fields.get("quant_method", "")).lower(), fields))
    path = folder / MODELOPT_FILE
    return [*stated, ("modelopt", _modelopt_file(path))] if path.is_file() else stated


def _checked(folder: Path, method: str, settings: Settings) -> tuple[Format, Settings]:
    form = next((form for form in known_formats().values() if form.name == method), None)
    if form is None:
        refuse(
            f"{folder.name} is quantised by {method or 'a method without a name'}",
            "a format that is read, or 16 bits",
            OTHERS.get(method, READ),
        )
    form.check(settings)
    return form, settings


def _modelopt_file(path: Path) -> Settings:
    try:
        fields = read_object(path)["quantization"]
    except (InputError, KeyError) as error:
        refuse(f"{path} has no readable quantization", "ModelOpt's settings", f"restore it ({type(error).__name__})")
    if not isinstance(fields, Mapping):
        refuse(f"{path}: quantization is a {type(fields).__name__}", "ModelOpt's settings", READ)
    return fields


def refuse_gguf(folder: Path) -> None:
    """Raise InputError for a folder of GGUF files alone, whatever else it lacks."""
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        refuse(f"{folder.name} holds GGUF files", "safetensors", OTHERS["gguf"])


def require_value(fields: Mapping[str, Any], key: str, wanted: tuple[Any, ...], form: str) -> None:
    """Raise InputError unless a setting has one of these values; one that is left out has the first."""
    value = fields.get(key, wanted[0])
    if value not in wanted:
        words = " or ".join(json.dumps(value) for value in wanted)
        refuse(f"quantised by {form}: {key} is {json.dumps(value)}", words, READ)


def require_object(value: Any, what: str) -> Mapping[str, Any]:
    """A part of the settings that is a JSON object. Raises InputError for anything else."""
    if not isinstance(value, Mapping):
        refuse(f"{what} of the model is {json.dumps(value)[:40]}", "an object", "restore the model's own config.json")
    return value


def require_part(parts: Mapping[str, TensorRef], part: str) -> TensorRef:
    """One of a layer's tensors. Raises InputError if it is not there."""
    if part not in parts:
        some = next(iter(parts.values()))
        module = some.stored_name.rpartition(".")[0]
        refuse(f"{some.shard} has no {module}.{part}", "all tensors of a quantised layer", "get the checkpoint again")
    return parts[part]


def require_shape(ref: TensorRef, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise InputError unless a tensor is so; dtype "float" stands for any float type."""
    fits = ref.element.is_precision if dtype == "float" else ref.dtype == dtype
    if ref.shape != shape or not fits:
        refuse(
            f"{ref.shard}: {ref.stored_name} is {ref.dtype} {list(ref.shape)}",
            f"{dtype} {list(shape)}, as the other tensors of the layer say",
            "get the checkpoint again",
        )


def require_matrix(ref: TensorRef) -> tuple[int, int]:
    """Rows and columns. Raises InputError for a tensor that is no matrix."""
    if len(ref.shape) != 2 or 0 in ref.shape:
        refuse(
            f"{ref.shard}: {ref.stored_name} is {ref.dtype} {list(ref.shape)}", "a matrix", "get the checkpoint again"
        )
    return ref.shape[0], ref.shape[1]


def require_group(ref: TensorRef, k: int, groups: int) -> int:
    """K/groups. Raises InputError if the scales' groups do not divide K."""
    if groups < 1 or k % groups:
        refuse(f"{ref.shard}: {ref.stored_name} has {groups} groups for {k} inputs", "groups that divide them", READ)
    return k // groups


def refuse(got: str, wanted: str, do: str) -> NoReturn:
    """Raise the error."""
    raise InputError(got, wanted=wanted, do=do)
