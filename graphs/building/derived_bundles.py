"""The graphs of a bundle as files, and a bundle derived from another one: the same model and shapes, another plan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from graphs import dtypes, names
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.graph_builder import BuiltGraph, dims, dtype_of, serialize
from graphs.files.atomic import link_or_copy, record, staged
from graphs.files.bundle import Bundle, write_manifest, write_plans
from graphs.records.errors import InputError
from graphs.records.manifest import GraphRecord, TensorRecord
from graphs.records.match_plan import check_fits, plan_for_profile
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile

Vision = Callable[[Bundle, ShapeProfile], BuiltGraph]  # the vision graph with class_attention, of the bundle's weights


def derive(
    bundle: Bundle,
    plan: PruningPlan,
    out: Path,
    *,
    force: bool = False,
    vision: Vision | None = None,
    sync: bool = True,
) -> Bundle:
    """The same model, shapes and vision graph with another plan, as a bundle of segments at `out`.

    The plan is brought to each profile's image tokens; the bundle's own is what it is for each. Only the decoder graphs
    are built anew, from the bundle's own weights; no torch is needed. Weights are hard-linked where possible whatever
    their size, as a derived bundle is for measuring. Where the plan scores by the vision tower's class token and the
    bundle's vision graph does not give its attention, `vision` makes one that does. `sync` as in graphs.files.atomic.
    Raises InputError if the plan does not fit the model, or asks for that and there is no `vision`.
    """
    with staged(out, force=force, sync=sync) as root:
        derive_into(bundle, plan, root, vision=vision)
        derived = Bundle.open(root)
    return replace(derived, root=out)


def derive_into(bundle: Bundle, plan: PruningPlan, root: Path, *, vision: Vision | None = None) -> None:
    """Fill the empty folder `root` with the bundle that `derive` makes."""
    manifest = bundle.manifest
    graphs: list[GraphRecord] = []
    plans = {
        profile.name: bundle.plan_for(profile.name) if plan == bundle.plan else plan_for_profile(plan, profile)
        for profile in manifest.profiles
    }
    for profile in manifest.profiles:
        suffix = f".{profile.name}" if len(manifest.profiles) > 1 else ""
        graphs.append(_vision_graph(bundle, plans[profile.name], profile, root, suffix, vision))
        graphs += _derived_graphs(bundle, plans[profile.name], profile, root, suffix)
    for entry in (*manifest.weights, *manifest.processor):
        (root / entry.file).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(bundle.root / entry.file, root / entry.file)
    first_plan, profile_plans = write_plans(root, plans)
    write_manifest(
        root,
        model=manifest.model,
        spec=manifest.spec,
        quantization=manifest.quantization,
        plan=first_plan,
        profile_plans=profile_plans,
        build=manifest.build.model_copy(update={"assemble": "segments"}),
        profiles=manifest.profiles,
        graphs=graphs,
        weights=manifest.weights,
        processor=manifest.processor,
        tools=manifest.tools,
    )


def _derived_graphs(
    bundle: Bundle, plan: PruningPlan, profile: ShapeProfile, root: Path, suffix: str
) -> list[GraphRecord]:
    build = bundle.manifest.build
    built = build_decoder_graphs(
        bundle.spec, bundle.checkpoint(), plan, profile, opset=build.opset, precision=build.precision
    )
    return write_graphs(root, built, profile.name, suffix=suffix)


def _vision_graph(
    bundle: Bundle, plan: PruningPlan, profile: ShapeProfile, root: Path, suffix: str, vision: Vision | None
) -> GraphRecord:
    """The bundle's own vision graph, or one that gives the class token's attention too, if only that is missing."""
    own = bundle.graph(names.VISION, profile.name)
    gives = {output.name for output in own.outputs}
    if not plan.needs_class_attention or names.CLASS_ATTENTION in gives:
        (root / own.file).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(bundle.root / own.file, root / own.file)
        return own
    check_fits(bundle.spec, plan, profile)
    if vision is None:
        raise InputError(
            f"{bundle.root} was exported without the vision tower's class attention, which the plan scores by",
            wanted="a bundle of a plan that scores by vision-cls",
            do="export the model with this plan",
        )
    [written] = write_graphs(root, [vision(bundle, profile)], profile.name, suffix=suffix)
    return written


def write_graphs(root: Path, built: Sequence[BuiltGraph], profile: str, *, suffix: str = "") -> list[GraphRecord]:
    """Write graphs as `graphs/<name><suffix>.onnx` under `root`; the same graphs give the same bytes."""
    records = []
    for graph in built:
        file = f"graphs/{graph.name}{suffix}.onnx"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(serialize(graph))
        records.append(_graph_record(root, file, graph, profile))
    return records


def _graph_record(root: Path, file: str, graph: BuiltGraph, profile: str) -> GraphRecord:
    return GraphRecord(
        **record(root, file).model_dump(),
        name=graph.name,
        profile=profile,
        inputs=_tensors(graph.model.graph.inputs),
        outputs=_tensors(graph.model.graph.outputs),
        layers=graph.layers,
    )


def _tensors(values: Sequence[object]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name=str(value.name), dtype=dtypes.BY_ONNX[dtype_of(value)].name, shape=dims(value))  # type: ignore[attr-defined, arg-type]
        for value in values
    )
