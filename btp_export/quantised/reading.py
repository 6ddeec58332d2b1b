"""A checkpoint in somebody's four-bit format becomes a packed one in the cache folder, a decoder layer at a time.

Everything that headers and settings can say is checked before anything is written: the family's own check of the
decoder's tensors sees the packed checkpoint that will be made.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from btp_export.quantised.folding import fold_input_scales
from btp_export.quantised.formats import Format, Settings, refuse, require_part, without_settings
from btp_export.quantised.packed_folder import (
    DECODER,
    is_whole,
    layer_count,
    layer_tensors,
    packed_place,
    writing,
)
from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.files.packed_weights import QWEIGHT, SCALES, PackedMatrix
from graphs.files.resume import digest
from graphs.packing import qweight_shape
from graphs.records.errors import InputError
from graphs.records.progress import Report
from graphs.records.quantization import Quantization

VERSION = 2  # of what is written; raise it when the same source gives other bytes


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint in another format. `modules` are its quantised layers: their tensors by their last part."""

    checkpoint: Checkpoint
    form: Format
    settings: Settings
    modules: Mapping[str, Mapping[str, TensorRef]]

    def planned(self) -> Checkpoint:
        """The packed checkpoint that it will become, as far as headers say; nothing of it can be read.

        Raises InputError for a layer that cannot be packed.
        """
        gone = {ref.name for parts in self.modules.values() for ref in parts.values()}
        tensors = {name: ref for name, ref in self.checkpoint.tensors.items() if name not in gone}
        for module, parts in self.modules.items():
            n, k, group = self.form.shape(parts, self.settings)
            scales = require_part(parts, next(part for part in parts if part.endswith(("scales", "scale"))))
            some = replace(scales, offset=0, nbytes=0)
            name = scales.stored_name.removesuffix(scales.name.removeprefix(f"{module}."))
            codes, steps = f"{module}.{QWEIGHT}", f"{module}.{SCALES}"
            tensors[codes] = replace(
                some, name=codes, stored_name=name + QWEIGHT, dtype="U8", shape=qweight_shape(n, k, group)
            )
            tensors[steps] = replace(some, name=steps, stored_name=name + SCALES, shape=(n, k // group))
        record = Quantization(method="read", source=self.form.name, groups={})
        config = without_settings(self.checkpoint.config)
        return replace(self.checkpoint, config=config, tensors=tensors, quantization=record)

    @property
    def nbytes(self) -> int:
        """About how large the packed checkpoint will be."""
        return sum(ref.nbytes for ref in self.checkpoint.tensors.values()) + 2**20


def open_foreign(checkpoint: Checkpoint, form: Format, settings: Settings, biased: Collection[str] = ()) -> Foreign:
    """The quantised layers of a checkpoint in the format that `find_format` found.

    biased: last parts of the names of modules that have a bias in this model, whatever it holds.

    Raises InputError for a part of the model that is not read.
    """
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part in form.parts and f"{module}.{form.parts[0]}" in checkpoint.tensors:
            modules.setdefault(module, {})[part] = ref
    if not modules:
        refuse(
            f"{checkpoint.folder.name} says it is {form.name}, but holds no {form.parts[0]}",
            "the tensors of that format",
            "get the checkpoint again, or take quantization_config out of config.json",
        )
    for module, parts in modules.items():
        if not module.startswith(DECODER):
            refuse(
                f"{next(iter(parts.values())).stored_name} is quantised",
                "codes in the decoder's layers alone: embeddings, head and tower in 16 bits",
                "take a checkpoint that leaves them (modules_to_not_convert, ignore, exclude_modules)",
            )
        if f"{module}.weight" in checkpoint.tensors and "weight" not in form.parts:
            refuse(f"{module} is there in four bits and in 16", "each matrix once", "get the checkpoint again")
    zeros = _biases_of_zeros(checkpoint, [module for module in modules if module.rpartition(".")[2] not in biased])
    tensors = {name: ref for name, ref in checkpoint.tensors.items() if name not in zeros}
    return Foreign(replace(checkpoint, tensors=tensors), form, settings, modules)


def _biases_of_zeros(checkpoint: Checkpoint, modules: Collection[str]) -> set[str]:
    """Biases that are zero in all layers: AutoGPTQ once gave every matrix one, whether the model has it or not."""
    biases: dict[str, list[TensorRef]] = {}
    for module in modules:
        if f"{module}.bias" in checkpoint.tensors:
            biases.setdefault(module.rpartition(".")[2], []).append(checkpoint[f"{module}.bias"])
    return {ref.name for refs in biases.values() if not any(np.any(ref.read()) for ref in refs) for ref in refs}


def read_packed(foreign: Foreign, name: str, head_dim: int, report: Report | None = None) -> Path:
    """The packed folder of a checkpoint, made now if it is not in the cache; `head_dim` is D of its decoder.

    Raises InputError for codes that cannot be stored; nothing is left then.
    """
    from calibrate.measure.statistics_cache import checkpoint_identity  # brings torch

    source = foreign.checkpoint
    key = digest("read", VERSION, foreign.form.name, foreign.settings, checkpoint_identity(source))
    place = packed_place(name, key)
    if is_whole(place):
        return place
    layers = layer_count(source)
    with writing(place, source, needed=foreign.nbytes) as writer:
        for layer in range(layers) if writer is not None else ():
            assert writer is not None
            if report is not None:
                report(layer, layers, f"reading {foreign.form.name} weights")
            if not writer.has(layer):
                writer.write(layer, _layer(foreign, layer, head_dim))
        if writer is not None:
            writer.finish(layers, "read", foreign.form.name)
    return place


def _layer(foreign: Foreign, layer: int, head_dim: int) -> dict[str, np.ndarray]:
    """A layer's tensors as they are packed."""
    refs = layer_tensors(foreign.checkpoint, layer)
    own = {module: parts for module, parts in foreign.modules.items() if module.startswith(f"{DECODER}{layer}.")}
    gone = {ref.name for parts in own.values() for ref in parts.values()}
    plain = {name: np.asarray(ref.read()) for name, ref in refs.items() if name not in gone}
    matrices = {module: _matrix(foreign, parts) for module, parts in own.items()}
    fold_input_scales(f"{DECODER}{layer}", matrices, plain, head_dim)
    for module, matrix in matrices.items():
        plain |= matrix.named(module)
    return plain


def _matrix(foreign: Foreign, parts: Mapping[str, TensorRef]) -> PackedMatrix:
    """One layer's matrix; an error names the tensor it is about."""
    try:
        return foreign.form.matrix(parts, foreign.settings)
    except InputError as error:
        named = next(iter(parts.values())).stored_name.rpartition(".")[0]
        got = error.got if named in error.got else f"{named}: {error.got}"
        raise InputError(got, wanted=error.wanted, do=error.do) from error
