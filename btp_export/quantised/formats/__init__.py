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

from graphs.files.checkpoint import PACKED, TensorRef
from graphs.files.packed_weights import PackedMatrix
from graphs.records.errors import InputError

# Methods that many checkpoints name, and what to do about those that no file here reads.
OTHERS = {
    "bitsandbytes": "its codes (NF4, LLM.int8) are of other kinds; take the 16-bit checkpoint and --weights int4",
    "gguf": "its blocks are of other kinds; take the 16-bit checkpoint and --weights int4",
    "fp8": "8 bits are not read; take the 16-bit checkpoint and --weights int4",
}
READ = "take one in AWQ (gemm), GPTQ, compressed-tensors (pack-quantized) or ModelOpt W4A16_AWQ, or the 16-bit one"


Settings: TypeAlias = Mapping[str, Any]  # what a checkpoint says of its codes, in the format's own words


class Format(Protocol):
    """How one program stores matrices of four bits."""

    name: str
    """As it is called in messages and in the record of the packed checkpoint."""
    parts: tuple[str, ...]
    """Last parts of the names of a quantised layer's tensors; the first is its mark."""

    def settings(self, folder: Path, config: Mapping[str, Any]) -> Settings | None:
        """What the checkpoint says, None if it is of another format.

        Raises InputError for a variant that is not read.
        """

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """N, K and the group of one layer, from headers alone. Raises InputError for tensors that do not fit."""

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """One layer. Raises InputError for codes that cannot be stored."""


def known_formats() -> dict[str, Format]:
    """All formats by file name."""
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in sorted(files)}


def find_format(folder: Path, config: Mapping[str, Any]) -> tuple[Format, Settings] | None:
    """The format of a checkpoint folder and what it says; None for one without a foreign quantisation.

    Raises InputError for a method that is not read, and for a folder of two.
    """
    named = config.get("quantization_config")
    method = None
    if named is not None:
        method = str(require_object(named, "quantization_config").get("quant_method", "")).lower()
    recognised = {
        form.name: (form, settings)
        for form in known_formats().values()
        if (settings := form.settings(folder, config)) is not None
    }
    methods = [*recognised, *([PACKED] if method == PACKED else [])]
    if len(methods) > 1:
        refuse(
            f"{folder.name} is quantised twice: {' and '.join(methods)}",
            "one method",
            "remove the settings that are not of its tensors",
        )
    if recognised:
        return next(iter(recognised.values()))
    if method is not None and method != PACKED:
        refuse(
            f"{folder.name} is quantised by {method or 'a method without a name'}",
            "a format that is read, or 16 bits",
            OTHERS.get(method, READ),
        )
    return None


def refuse_gguf(folder: Path) -> None:
    """Raise InputError for a folder of GGUF files alone, whatever else it lacks."""
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        refuse(f"{folder.name} holds GGUF files", "safetensors", OTHERS["gguf"])


def quantization_config(config: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
    """config.json's `quantization_config` if it is of that method."""
    fields = config.get("quantization_config")
    own = isinstance(fields, Mapping) and str(fields.get("quant_method", "")).lower() == method
    return fields if own else None


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
