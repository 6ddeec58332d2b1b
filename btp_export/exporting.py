"""A model and a plan become a bundle: decoder graphs built from headers alone, the vision graph captured."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from btp_export.model.check_processor import check_processor, files_of_processor
from btp_export.model.defaults import default_shapes, parse_profile
from btp_export.model.open_model import Model
from graphs import names
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.derived_bundles import write_graphs
from graphs.building.graph_builder import IR_VERSIONS, BuiltGraph
from graphs.building.rope import rope_tables
from graphs.building.vision_capture import bind_to, capture_vision, share_weights
from graphs.building.whole_graph import assemble_whole
from graphs.dtypes import Precision
from graphs.files.atomic import (
    Link,
    check_destination,
    check_outside,
    check_space,
    check_writable,
    copied_bytes,
    hashing,
    place,
    record,
    sha256,
    staged,
    will_link,
)
from graphs.files.bundle import ROPE_WEIGHTS, VISION_WEIGHTS, Bundle, place_weights, write_manifest, write_plans
from graphs.files.packed_weights import check_packed
from graphs.files.safetensors_file import write_tensors
from graphs.records.errors import InputError
from graphs.records.manifest import BuildRecord, FileRecord, GraphRecord, ModelRecord
from graphs.records.match_plan import check_fits, plan_for_profile
from graphs.records.plan import PruningPlan
from graphs.records.progress import Note, Report
from graphs.records.record import Record
from graphs.records.shapes import ShapeProfile

GRAPH_BYTES = 4 * 2**20  # more than the .onnx files of one profile take


class Options(Record):
    """How to export. None stands for the model's default; a profile is "batch=2,text=64,new=128,image=336x336".

    `image_sizes` are heights and widths in pixels: a profile for each, of every other shape that is asked for.
    """

    batch: int = Field(default=1, ge=1)
    text_tokens: int | None = Field(default=None, ge=1)
    new_tokens: int | None = Field(default=None, ge=1)
    profiles: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    opset: int = 23
    precision: Precision | None = None
    assemble: Literal["segments", "whole"] = "segments"
    link: Link = "auto"


def export_bundle(
    model: Model,
    plan: PruningPlan,
    out: Path,
    options: Options,
    *,
    force: bool = False,
    profiles: Sequence[ShapeProfile] | None = None,
    report: Report | None = None,
    note: Note | None = None,
) -> Bundle:
    """Export to a bundle at `out`, which appears there whole or not at all.

    `profiles` are what `check_target` gave if it was asked already. A plan for other image tokens than a profile's is
    rescaled to it; `note` is told of that, of generation settings that are not followed and of linked weights.
    Raises InputError if anything does not fit together, before the first long step.
    """
    if profiles is None:
        profiles = check_target(model, out, options, force=force)
    plans = check_plan(model, plan, profiles, note=note)
    if note is not None:
        note_generation(model, note)
        note_links(model, out, options, note)
    with staged(out, force=force) as root:
        export_into(model, plans, profiles, root, options, report=report)
        bundle = Bundle.open(root)  # what is damaged is never put in place
    return replace(bundle, root=out)


def make_profiles(model: Model, options: Options) -> list[ShapeProfile]:
    """The shape profiles that the options name; one if they name none.

    Raises InputError for one given twice, or an image size that the model cannot take.
    """
    text, new = default_shapes(model)
    defaults: dict[str, Any] = {
        "batch": options.batch,
        "text_tokens": options.text_tokens or text,
        "new_tokens": options.new_tokens or new,
        "image_size": None,
    }
    chosen = []
    for named in [parse_profile(text) for text in options.profiles] or [{}]:
        sizes = [named["image_size"]] if "image_size" in named else options.image_sizes or [None]
        chosen += [defaults | named | {"image_size": size} for size in sizes]
    profiles = [model.family.profile(model.spec, **fields) for fields in chosen]
    for number, profile in enumerate(profiles):
        for other in profiles[:number]:
            if _same_graphs(model, profile, other):
                raise InputError(
                    f"the same profile twice: {other.name}, {profile.name}",
                    wanted="shapes that make different graphs",
                    do="leave one out",
                )
    return profiles


def _same_graphs(model: Model, first: ShapeProfile, second: ShapeProfile) -> bool:
    """Picture sizes may differ and yet become the same tokens."""
    rest = {"name": "", "image_size": (0, 0)}
    layouts = [model.family.layout(model.spec, profile.image_size) for profile in (first, second)]
    return first.model_copy(update=rest) == second.model_copy(update=rest) and layouts[0] == layouts[1]


def check_target(
    model: Model, out: Path, options: Options, *, force: bool, reads: Sequence[Path] = ()
) -> list[ShapeProfile]:
    """Everything that can be known to be wrong before there is a plan; gives the profiles. Raises InputError.

    `reads`: what else the work reads besides the model, which must not lie in a bundle that is replaced.
    """
    check_destination(out.resolve(), force=force)
    check_writable(out.resolve().parent)
    check_outside(out, [model.source.folder, *model.checkpoint.files, *reads])
    if options.opset not in IR_VERSIONS:
        raise InputError(
            f"opset {options.opset}", wanted=f"one of {', '.join(map(str, sorted(IR_VERSIONS)))}", do="--opset 23"
        )
    check_packed(model.checkpoint)
    profiles = make_profiles(model, options)
    check_processor(model, profiles)
    check_space(out, copied_bytes(model.checkpoint.files, out, options.link) + _made_bytes(model, len(profiles)))
    return profiles


def check_plan(
    model: Model,
    plan: PruningPlan,
    profiles: Sequence[ShapeProfile],
    *,
    note: Note | None = None,
) -> list[PruningPlan]:
    """The plan for every profile's image tokens; `note` is told where it had to be rescaled.

    Only models that take any image size have plans rescaled. Raises InputError unless it fits the model at all of them.
    """
    plans = [plan_for_profile(plan, profile) if model.spec.vision.dynamic else plan for profile in profiles]
    for matched, profile in zip(plans, profiles, strict=True):
        check_fits(model.spec, matched, profile)
        if matched != plan and note is not None:
            note(
                f"profile {profile.name}: the plan for {plan.image_tokens} image tokens was rescaled to "
                f"{matched.image_tokens}"
            )
    return plans


def note_generation(model: Model, note: Note) -> None:
    """Say where answers will differ from what `generate` gives with the checkpoint's own settings."""
    settings = model.spec.generation.not_followed
    if settings:
        note(
            f"generation settings of the checkpoint that are not followed: {', '.join(settings)} "
            "(the most probable token is taken, unless `run` gets --temperature; docs/models.md)"
        )
    if not model.spec.eos_token_ids:
        note("the checkpoint names no end token (eos_token_id): answers end where the room for new tokens does")


def note_links(model: Model, out: Path, options: Options, note: Note) -> None:
    """Say where other programs will refuse the bundle's weights because they are hard links."""
    if any(will_link(path, out, options.link) for path in model.checkpoint.files):
        note(
            "weights are hard links to the checkpoint's files: onnx.load and onnx.checker refuse such files "
            "(--link copy makes a bundle that they open; docs/bundle.md)"
        )


def export_into(
    model: Model,
    plans: Sequence[PruningPlan],
    profiles: Sequence[ShapeProfile],
    root: Path,
    options: Options,
    *,
    report: Report | None = None,
) -> None:
    """Fill the empty folder `root` with the bundle of profiles and their plans; the manifest is written last."""
    steps = _Steps(report, total=len(profiles) + 4)
    precision = options.precision or default_precision(model)
    weights = root / "graphs" / "weights"
    weights.mkdir(parents=True)
    with steps.next("placing the weights"):
        placed = place_weights(root, model.checkpoint, options.link)
        processor = _place_processor(model, root)
    with hashing([root / file for file, known in placed.items() if known is None]) as hashes:
        with steps.next("capturing the vision graph"):
            visions = _capture_visions(
                model, profiles, weights, options.opset, precision, class_attention=plans[0].needs_class_attention
            )
        with steps.next("position tables"):
            cos, sin = rope_tables(model.checkpoint.config, max(profile.max_positions for profile in profiles))
            write_tensors(weights / ROPE_WEIGHTS, {"cos": cos, "sin": sin})
        graphs: list[GraphRecord] = []
        for profile, plan, vision in zip(profiles, plans, visions, strict=True):
            with steps.next(f"building the decoder graphs of {profile.name}"):
                graphs += _write_profile(
                    model, plan, profile, vision, root, options, precision, several=len(profiles) > 1
                )
        with steps.next("hashing the weights"):
            records = _weight_records(root, placed, hashes())
    names = [profile.name for profile in profiles]
    first_plan, profile_plans = write_plans(root, dict(zip(names, plans, strict=True)))
    write_manifest(
        root,
        model=_model_record(model),
        spec=model.spec,
        quantization=model.checkpoint.quantization,
        plan=first_plan,
        profile_plans=profile_plans,
        build=BuildRecord(opset=options.opset, precision=precision, assemble=options.assemble),
        profiles=profiles,
        graphs=graphs,
        weights=records,
        processor=processor,
    )


def _weight_records(root: Path, placed: Mapping[str, str | None], hashes: Mapping[Path, str]) -> list[FileRecord]:
    """The checkpoint's files and our two; `hashes` has those that were not known when the files were placed."""
    records = [record(root, f"graphs/weights/{name}") for name in (VISION_WEIGHTS, ROPE_WEIGHTS)]
    own = [
        FileRecord(file=file, size=(root / file).stat().st_size, sha256=known or hashes[root / file])
        for file, known in placed.items()
    ]
    return [*own, *records]


def default_precision(model: Model) -> Precision:
    """float32 for the demo, which runs everywhere; the checkpoint's own type otherwise."""
    return "float32" if model.source.is_demo else model.spec.weight_dtype


def _capture_visions(
    model: Model,
    profiles: Sequence[ShapeProfile],
    weights: Path,
    opset: int,
    precision: Precision,
    *,
    class_attention: bool,
) -> list[BuiltGraph]:
    """One vision graph a profile; equal shapes share the capture, all share one file of weights."""
    captured: dict[tuple[int, tuple[int, int]], tuple[BuiltGraph, dict[str, np.ndarray]]] = {}
    stored: dict[str, np.ndarray] = {}
    for profile in profiles:
        shape = (profile.batch, profile.image_size)
        if shape in captured:
            continue
        graph, arrays = capture_vision(
            model.family.vision_module(model.checkpoint, profile.image_size, class_attention=class_attention),
            batch=profile.batch,
            image_size=profile.image_size,
            pixel_shape=profile.pixel_input(model.spec.vision.channels),
            opset=opset,
            precision=precision,
            class_attention=class_attention,
            in_place=True,
        )
        # Towers of several sizes hold the same weights: keep them in memory once.
        captured[shape] = graph, {name: stored.setdefault(name, array) for name, array in arrays.items()}
    write_tensors(weights / VISION_WEIGHTS, share_weights(list(captured.values())))
    return [captured[(profile.batch, profile.image_size)][0] for profile in profiles]


def vision_with_attention(bundle: Bundle, profile: ShapeProfile) -> BuiltGraph:
    """The vision graph of a bundle's profile that gives the class token's attention too, on the bundle's own weights.

    For plans that are derived of a bundle whose own plan did not ask for it.
    """
    from btp_export.families import family_of

    build = bundle.manifest.build
    graph, _ = capture_vision(
        family_of(bundle.spec).vision_module(bundle.checkpoint(), profile.image_size, class_attention=True),
        batch=profile.batch,
        image_size=profile.image_size,
        pixel_shape=profile.pixel_input(bundle.spec.vision.channels),
        opset=build.opset,
        precision=build.precision,
        class_attention=True,
        in_place=True,
    )
    return bind_to(graph, bundle.root / "graphs" / "weights" / VISION_WEIGHTS)


def _write_profile(
    model: Model,
    plan: PruningPlan,
    profile: ShapeProfile,
    vision: BuiltGraph,
    root: Path,
    options: Options,
    precision: Precision,
    *,
    several: bool,
) -> list[GraphRecord]:
    """The graphs of one profile. A whole bundle keeps the vision graph alone too: other plans are derived with it."""
    graphs = build_decoder_graphs(model.spec, model.checkpoint, plan, profile, opset=options.opset, precision=precision)
    if options.assemble == "whole":
        whole = assemble_whole(
            vision, model.spec, model.checkpoint, plan, profile, opset=options.opset, precision=precision
        )
        graphs = [whole, *(graph for graph in graphs if graph.name == names.DECODE)]
    suffix = f".{profile.name}" if several else ""
    return write_graphs(root, [vision, *graphs], profile.name, suffix=suffix)


def _place_processor(model: Model, root: Path) -> list[FileRecord]:
    folder = root / "processor"
    folder.mkdir()
    for path in model.processor_files:
        place(path, folder / path.name, "copy")
    for name, text in files_of_processor(model).items():
        (folder / name).write_text(text, encoding="utf-8")
    return [record(root, f"processor/{path.name}") for path in sorted(folder.iterdir())]


def _model_record(model: Model) -> ModelRecord:
    return ModelRecord(
        name=model.source.name,
        source=model.source.origin,
        config_sha256=sha256(model.source.folder / "config.json"),
        renames=model.family.renames,
        dummy_weights=model.source.is_dummy,
    )


def _made_bytes(model: Model, profiles: int) -> int:
    """At most what export itself writes: the vision weights in float32, position tables and graphs."""
    own = ("language_model.", "lm_head.")
    vision = [ref for ref in model.checkpoint.tensors.values() if not ref.name.startswith(own)]
    values = sum(int(np.prod(ref.shape)) for ref in vision)
    tables = 8 * model.spec.decoder.max_positions * model.spec.decoder.head_dim
    return 4 * values + tables + GRAPH_BYTES * profiles


class _Steps:
    """The steps of an export, told to a Report."""

    def __init__(self, report: Report | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    @contextlib.contextmanager
    def next(self, text: str) -> Iterator[None]:
        """One step; its name is said when it begins."""
        self.say(text)
        yield
        self._done += 1
        self.say(text)

    def say(self, text: str) -> None:
        """What is being done now."""
        if self._report is not None:
            self._report(self._done, self._total, text)
