"""A model with full weights becomes one with four-bit weights: a packed folder in the cache, a decoder layer at a time.

The plan comes first, from the full weights; then scales are searched on the calibration's pictures with that plan in
force, because kept tokens are what the weights will see. Dummy weights are rounded alone: there is nothing to search
for; those that `--dummy-weights` makes are random codes from the beginning (btp_export/dummy/packed.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from btp_export.model.open_model import Model, refuse_quantised
from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.study import calibration_samples, model_inputs
from btp_export.quantised.packed_folder import (
    DECODER,
    PackedWriter,
    is_whole,
    layer_tensors,
    packed_place,
    writing,
)
from graphs import dtypes
from graphs.files.atomic import sha256
from graphs.files.bundle import tool_versions
from graphs.files.checkpoint import open_checkpoint
from graphs.files.memory import LIBRARIES, check_memory
from graphs.files.packed_weights import read_tensor
from graphs.files.resume import Work, digest
from graphs.packing import check_group
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Note, Report
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec
from graphs.records.stored_weights import GROUP_OF, Weights

if TYPE_CHECKING:
    import torch

    from btp_export.model.prompting import Prompter
    from calibrate.data.samples import Sample, SampleSet
    from calibrate.quantise.search import QuantisedLayer
    from calibrate.reference.records import ReferenceInput

Method = Literal["awq", "rtn"]
VERSION = 3  # of what is made; raise it when the same model gives other bytes
MOST_SAMPLES = 32  # of the calibration's, which it interleaves by kind: the search needs magnitudes, not a ranking
BYTES_A_WEIGHT = 0.6  # of four bits with their scales and zeros, at most (groups of 32)


def check_weights(model: Model, weights: Weights) -> None:
    """Raise InputError unless the model's decoder can be quantised so; nothing has been done by then."""
    if weights not in get_args(Weights):
        raise InputError(f"--weights {weights}", wanted=", ".join(get_args(Weights)), do="--weights int4")
    if weights == "model":
        return
    quantization = model.checkpoint.quantization
    if quantization is not None and not _made_up_so(model, weights):
        refuse_quantised(model.spec.name, quantization, weights)
    if quantization is not None:
        return
    sizes = _inner_sizes(model.spec)
    for k in sizes:
        try:
            check_group(k, GROUP_OF[weights])
        except InputError as error:
            fitting = [name for name, group in GROUP_OF.items() if all(size % group == 0 for size in sizes)]
            raise InputError(
                f"--weights {weights}: {error.got}",
                wanted="a group that divides every matrix's rows",
                do=f"--weights {fitting[0]}" if fitting else "leave --weights out",
            ) from error


def _made_up_so(model: Model, weights: Weights) -> bool:
    """Whether the model's weights are random codes of this kind, which are made without full weights."""
    quantization = model.checkpoint.quantization
    return model.source.is_dummy and quantization is not None and set(quantization.groups) == {GROUP_OF.get(weights)}


def _inner_sizes(spec: ModelSpec) -> tuple[int, ...]:
    """K of all matrices of a layer."""
    decoder = spec.decoder
    return decoder.hidden_size, decoder.num_heads * decoder.head_dim, decoder.intermediate_size


def quantise_model(
    model: Model,
    plan: PruningPlan,
    settings: CalibrationSettings,
    weights: Weights,
    *,
    profile: ShapeProfile,
    method: Method | None = None,
    report: Report | None = None,
    note: Note | None = None,
) -> Model:
    """The model with its decoder's matrices in four bits; the same model for `weights` "model".

    Searched with `plan` in force on the pictures that `settings` name; method None is "awq", for dummy weights "rtn".
    The packed checkpoint is made now if it is not in the cache. Raises InputError as `check_weights`, and for pictures
    that cannot be used.
    """
    check_weights(model, weights)
    if weights == "model" or _made_up_so(model, weights):
        return model
    chosen: Method = method or ("rtn" if model.source.is_dummy else "awq")
    say = note or (lambda text: None)
    pictures = None if chosen == "rtn" else _pictures(model, settings, profile, say)
    job = _Job(model, plan, settings, GROUP_OF[weights], chosen, profile, pictures, say)
    place = packed_place(model.source.name, job.key())
    if not is_whole(place):
        job.check_memory()
        elements = model.spec.decoder.num_layers * model.spec.decoder.layer_elements
        rest = sum(ref.nbytes for name, ref in model.checkpoint.tensors.items() if not name.startswith(DECODER))
        with writing(place, model.checkpoint, needed=int(BYTES_A_WEIGHT * elements) + rest) as writer:
            if writer is not None:
                job.run(writer, report)
    checkpoint = open_checkpoint(place, model.family.renames)
    return replace(model, source=replace(model.source, folder=place), checkpoint=checkpoint)


@dataclass(frozen=True)
class _Job:
    """One model on its way to four bits."""

    model: Model
    plan: PruningPlan
    settings: CalibrationSettings
    group: int
    method: Method
    profile: ShapeProfile
    pictures: SampleSet | None  # None: nothing is searched
    note: Note

    def key(self) -> str:
        """Everything that decides the codes."""
        from calibrate.measure.statistics_cache import checkpoint_identity

        parts = [VERSION, self.method, self.group, checkpoint_identity(self.model.checkpoint)]
        if self.pictures is None:
            return digest("made", *parts)
        seen = {
            "plan": self.plan.digest(),
            "pictures": self.pictures.digest(),
            "answers": [sample.answer for sample in self.pictures.samples],
            "processor": {path.name: sha256(path) for path in self.model.processor_files},
            "profile": self.profile.model_dump(mode="json"),
            "system": self.model.spec.system,
            "maths": self.settings.maths,
            "tools": tool_versions(),
        }
        return digest("made", *parts, seen)

    def run(self, writer: PackedWriter, report: Report | None) -> None:
        """All layers, then the rest."""
        layers = self.model.spec.decoder.num_layers
        kept = _KeptLayers(self.model, writer)
        if self.method == "rtn":
            self._round(kept, layers, report)
        else:
            self._search(kept, layers, writer, report)
        writer.finish(layers, self.method, self.model.source.origin)

    def _round(self, kept: _KeptLayers, layers: int, report: Report | None) -> None:
        from calibrate.quantise.search import round_layer

        for layer in range(layers):
            if report is not None:
                report(layer, layers, "rounding the weights")
            if not kept.has(layer):
                kept.keep(layer, round_layer(kept.tensors(layer), self.group, kept.dtype))

    def _search(self, kept: _KeptLayers, layers: int, writer: PackedWriter, report: Report | None) -> None:
        from btp_export.model.defaults import fitted_samples
        from btp_export.model.prompting import Prompter
        from calibrate.quantise.layer_edit import QuantisingEdit
        from calibrate.reference.decoder import torch_device
        from calibrate.reference.streamed_model import StreamedReference

        assert self.pictures is not None
        spec, decoder = self.model.spec, self.model.spec.decoder
        samples, _ = fitted_samples(self.pictures.samples, spec, self.profile)
        prompter = Prompter(self.model.source.folder, spec)
        prompts = model_inputs(self.model, prompter, self.profile, samples, report)
        inputs = with_answers(prompts, samples, prompter, self.profile.new_tokens)

        def tell(layer: int) -> None:
            if report is not None:
                report(layer, layers, "searching four-bit weights")

        edit = QuantisingEdit(
            kept, group=self.group, heads=decoder.num_heads, kv_heads=decoder.num_kv_heads, dtype=kept.dtype,
            norm_dtype=kept.norm_dtype, key=self.key(), tell=tell,
        )  # fmt: skip
        with _work_in(writer, self.note) as work:
            reference = StreamedReference(
                self.model.checkpoint,
                dtype=dtypes.BY_NAME[self.settings.maths].torch,
                device=torch_device("cpu"),
                work=work,
            )
            reference.run(inputs, self.plan, edit=edit)

    def check_memory(self) -> None:
        """Raise InputError if a layer, what is tried in place of its largest matrix, and the rows do not fit.

        X^T X of its four inputs, the largest scaled once more, and what one of its spans is inverted with, too.
        """
        from calibrate.quantise.compensate import SPAN

        decoder, profile = self.model.spec.decoder, self.profile
        count = 0 if self.pictures is None else len(self.pictures.samples)
        rows = count * (profile.prefix_tokens + profile.image_tokens + profile.text_tokens)
        hidden, heads, intermediate = _inner_sizes(self.model.spec)
        largest = hidden * intermediate
        grams = sum(width * min(width, SPAN) for width in (hidden, heads, hidden, intermediate, intermediate))
        passed_on = 0 if count == 0 else grams + 4 * min(intermediate, SPAN) ** 2
        elements = 2 * decoder.layer_elements + 6 * largest + 3 * rows * decoder.hidden_size + passed_on
        needed = LIBRARIES + 4 * elements
        check_memory(needed, f"quantising {self.model.spec.name} on {count} samples", do="fewer --samples")


def with_answers(
    prompts: Sequence[ReferenceInput], samples: Sequence[Sample], prompter: Prompter, most: int
) -> list[ReferenceInput]:
    """The prompts with the answers that are known behind them, of at most so many tokens.

    Rows of answers come to the weights too, one by one, when they are generated.
    """
    tokens = [prompter.token_ids(sample.answer)[:most] if sample.answer else [] for sample in samples]
    return [replace(prompt, new_tokens=tuple(ids)) for prompt, ids in zip(prompts, tokens, strict=True)]


def _pictures(model: Model, settings: CalibrationSettings, profile: ShapeProfile, note: Note) -> SampleSet:
    """The first of the calibration's pictures, with prompts that the model takes."""
    from btp_export.model.prompting import Prompter

    few = replace(settings, samples=min(settings.samples, MOST_SAMPLES))
    return calibration_samples(few, Prompter(model.source.folder, model.spec), note, profile.image_size)


@contextmanager
def _work_in(writer: PackedWriter, note: Note) -> Iterator[Work]:
    """Checkpoints of the pass lie beside the layers that they belong to, and go when it is done."""
    folder = writer.folder / "work"
    yield Work(folder, note)
    shutil.rmtree(folder, ignore_errors=True)


class _KeptLayers:
    """Finished layers in the packed folder (calibrate.quantise.layer_edit.Layers)."""

    def __init__(self, model: Model, writer: PackedWriter) -> None:
        self._model, self._writer = model, writer
        stored = model.checkpoint[f"{DECODER}0.self_attn.q_proj.weight"].element
        self.dtype: torch.dtype = stored.torch
        self.norm_dtype: torch.dtype = model.checkpoint[f"{DECODER}0.input_layernorm.weight"].element.torch

    def has(self, layer: int) -> bool:
        """Whether it is finished."""
        return self._writer.has(layer)

    def tensors(self, layer: int) -> Any:
        """The full weights of a layer."""
        from calibrate.quantise.search import LayerTensors

        start, decoder = f"{DECODER}{layer}.", self._model.spec.decoder
        refs = layer_tensors(self._model.checkpoint, layer)
        weights = {name.removeprefix(start): dtypes.torch_of_numpy(ref.read()).float() for name, ref in refs.items()}
        return LayerTensors(weights, decoder.num_heads, decoder.num_kv_heads)

    def keep(self, layer: int, quantised: QuantisedLayer) -> None:
        """Codes in place of the matrices, what changed with them, and the rest as it was."""
        from calibrate.quantise.layer_edit import packed

        start = f"{DECODER}{layer}."
        gone = {f"{start}{module}.weight" for module in quantised.matrices}
        refs = layer_tensors(self._model.checkpoint, layer)
        tensors: dict[str, np.ndarray] = {name: ref.read() for name, ref in refs.items() if name not in gone}
        tensors |= {f"{start}{name}": dtypes.numpy_of_torch(tensor) for name, tensor in quantised.others.items()}
        for module, rounded in quantised.matrices.items():
            tensors |= packed(rounded).named(f"{start}{module}")
        self._writer.write(layer, tensors)

    def weights(self, layer: int) -> Mapping[str, np.ndarray]:
        """What a finished layer computes with."""
        refs = self._writer.read(layer)
        whole = replace(self._model.checkpoint, tensors=refs)
        modules = {name.rpartition(".")[0] for name in refs}
        names = {name for name in refs if name.endswith((".weight", ".bias"))} | {
            f"{module}.weight" for module in modules
        }
        return {name: read_tensor(whole, name) for name in names}
