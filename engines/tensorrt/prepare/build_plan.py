"""What `btp-export build` is going to do, worked out before anything is written or built: `--dry-run` shows it.

Graphs are prepared for the target's TensorRT version, checked against it (lint) and counted (estimate). What the user
did not choose is chosen here, with the reason in `notes`; what cannot fit is refused with what would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from engines.targets import Target
from engines.tensorrt.prepare.estimate import ORIGIN, Totals, estimate, totals, usable_memory
from engines.tensorrt.prepare.lint import lint
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare, suited_opset
from engines.tensorrt.records import Accumulate, Assemble, EngineWeights, Estimate, PluginForm
from engines.tensorrt.summaries import Finding, PlannedEngines, PlannedGraph, PlannedTotal
from engines.tensorrt.versions import Traits, traits
from graphs import names
from graphs.files.atomic import size_text
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError

GRAPHS_FOLDER = "graphs"
SHARED = "--engine-weights shared"
# Flavour, version and compute capability with which builds of four-bit constants fail -> who reports it.
FOUR_BIT_FAULTS = {("tensorrt", (10, 16), "8.7"): "NVIDIA/TensorRT#4832"}
FUSION_FAULT = (
    10,
    13,
)  # joins gate and up into one product, wrongly at batch 1; packed shared weights leave it nothing


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None leaves it to the target. `memory_bytes`: of the device, if not the target's."""

    tensorrt: str | None = None
    assemble: Assemble | None = None
    engine_weights: EngineWeights | None = None
    plugins: PluginForm | Literal["auto"] = "auto"
    memory_bytes: int | None = None
    unpruned: bool = False  # also engines of the model without pruning, to be measured beside
    accumulate: Accumulate | Literal["auto"] = "auto"


@dataclass(frozen=True)
class BuildPlan:
    """All that is known before the build; `estimates` are those of `graphs`, in the same order."""

    bundle: Bundle
    target: Target
    traits: Traits
    choices: Choices
    plugins: PluginForm
    graphs: tuple[PreparedGraph, ...]
    estimates: tuple[Estimate, ...]
    totals: Totals
    findings: tuple[Finding, ...]
    usable_bytes: int
    notes: tuple[str, ...]
    unpruned: "BuildPlan | None" = None

    @property
    def several_profiles(self) -> bool:
        """Whether file names must carry the profile."""
        return len(self.bundle.manifest.profiles) > 1

    def file_stem(self, graph: PreparedGraph) -> str:
        """`head`, or `head.<profile>` where there are several profiles."""
        return f"{graph.name}.{graph.profile}" if self.several_profiles else graph.name

    def summary(self) -> PlannedEngines:
        """What will be built, with its estimates."""
        return PlannedEngines(
            target=self.target.name,
            tensorrt=self.traits.version,
            flavour=self.traits.flavour,
            compute_capability=self.target.compute_capability,
            opset=self.choices.opset,
            precision=self.bundle.manifest.build.precision,
            assemble=self.choices.assemble,
            accumulate=self.choices.accumulate,
            engine_weights=self.choices.weights,
            plugins=self.plugins,
            graphs=tuple(
                PlannedGraph(
                    name=graph.name,
                    profile=graph.profile,
                    nodes=len(graph.model.graph),
                    custom_nodes=len(graph.custom_nodes),
                    weight_inputs=len(graph.weight_inputs),
                    **dict(needed),
                )
                for graph, needed in zip(self.graphs, self.estimates, strict=True)
            ),
            total=PlannedTotal(
                run_bytes=self.totals.run_bytes,
                build_peak_bytes=self.totals.build_peak_bytes,
                disk_bytes=self.totals.disk_bytes,
                shared_weight_bytes=self.totals.weight_bytes,
                usable_bytes=self.usable_bytes,
            ),
            findings=self.findings,
            notes=self.notes,
            unpruned=None if self.unpruned is None else self.unpruned.summary(),
            estimates_from=ORIGIN,
        )


def plan_build(bundle: Bundle, target: Target, wishes: Wishes) -> BuildPlan:
    """Work everything out.

    Raises InputError for a version that does not fit the target, and for engines that cannot fit its memory, then with
    the choice that would. CheckResults of the lint are in the result; `lint.require_clean` raises them.
    """
    version = traits(target.flavour, target.version(wishes.tensorrt))
    form = _plugin_form(wishes, version)
    assemble = wishes.assemble or target.assemble
    choices = Choices(
        opset=suited_opset(bundle, version, assemble=assemble, plugins=form != "none"),
        assemble=assemble,
        weights=wishes.engine_weights or _weights_for(bundle, target, plugins=form != "none"),
        pack=target.pack_weights,
        plugins=form != "none",
        accumulate=_accumulate(bundle, wishes),
    )
    usable = usable_memory(target, wishes.memory_bytes)
    if usable <= 0:
        raise InputError(
            f"--memory {size_text(wishes.memory_bytes or 0)}",
            wanted="more than the system itself takes",
            do="--memory 16",
        )
    graphs, needed, chosen, notes = _fitting(bundle, target, wishes, choices, usable)
    beside = None
    if wishes.unpruned:
        same = replace(
            wishes, tensorrt=version.version, assemble=chosen.assemble, engine_weights=chosen.weights, plugins="none",
            accumulate=chosen.accumulate, unpruned=False,
        )  # fmt: skip
        beside = plan_build(bundle.without_pruning(), target, same)
    return BuildPlan(
        bundle=bundle,
        target=target,
        traits=version,
        choices=chosen,
        plugins=form,
        graphs=tuple(graphs),
        estimates=tuple(estimate(graph) for graph in graphs),
        totals=needed,
        findings=(
            *lint(graphs, version, folder=bundle.root / GRAPHS_FOLDER, plugins=chosen.plugins),
            *_four_bit_findings(bundle, target, version, chosen),
        ),
        usable_bytes=usable,
        notes=(*notes, *_notes(bundle, target, version, chosen, form)),
        unpruned=beside,
    )


def _weights_for(bundle: Bundle, target: Target, *, plugins: bool) -> EngineWeights:
    """The target's choice. Four-bit weights are shared where the plugin multiplies them; without it TensorRT does it
    itself with constants, if they have no zero points.
    """
    quantization = bundle.manifest.quantization
    if quantization is None:
        return target.engine_weights
    return "shared" if plugins or quantization.zeros else "baked"


def _four_bit_findings(bundle: Bundle, target: Target, version: Traits, choices: Choices) -> list[Finding]:
    """Where TensorRT is known to fail with four-bit constants."""
    place = (version.flavour, version.number[:2], target.compute_capability)
    if bundle.manifest.quantization is None or choices.weights != "baked" or place not in FOUR_BIT_FAULTS:
        return []
    got = f"four-bit constants on sm_{target.sm}: TensorRT {version.version} fails there ({FOUR_BIT_FAULTS[place]})"
    return [Finding(graph=names.DECODE, node="DequantizeLinear", got=got, wanted="the plugin", do=SHARED)]


def _plugin_form(wishes: Wishes, version: Traits) -> PluginForm:
    """The C++ library; for TensorRT for RTX, whose guides call plugins unsupported, the portable bodies."""
    if wishes.plugins != "auto":
        return wishes.plugins
    return "library" if version.plugins_documented else "none"


def _accumulate(bundle: Bundle, wishes: Wishes) -> Accumulate:
    """float32 for float16 bundles; bfloat16 products add up in float32 anyway."""
    if bundle.manifest.build.precision != "float16":
        return "native"
    return "float32" if wishes.accumulate == "auto" else wishes.accumulate


# -- memory ----------------------------------------------------------------------------------------------------------


def _fitting(
    bundle: Bundle, target: Target, wishes: Wishes, choices: Choices, usable: int
) -> tuple[list[PreparedGraph], Totals, Choices, list[str]]:
    """The prepared graphs that fit, by the choices given or, where the user left it open, with shared weights."""
    graphs, needed = _counted(bundle, choices)
    if _fits(target, needed, usable):
        return graphs, needed, choices, []
    if choices.weights == "baked" and wishes.engine_weights is None:
        shared = replace(choices, weights="shared")
        graphs, less = _counted(bundle, shared)
        if _fits(target, less, usable):
            note = f"engine weights shared: baked ones need {_said(needed)}, there are {size_text(usable)}"
            return graphs, less, shared, [note]
    raise InputError(
        f"the engines need {_said(needed)}",
        wanted=f"at most {size_text(usable)} on {target.title}"
        + ("" if wishes.memory_bytes is None else f" with {size_text(wishes.memory_bytes)}"),
        do=_remedy(bundle, choices, lambda totals: _fits(target, totals, usable)),
    )


def _counted(bundle: Bundle, choices: Choices) -> tuple[list[PreparedGraph], Totals]:
    graphs = prepare(bundle, choices)
    return graphs, totals(graphs, [estimate(graph) for graph in graphs])


def _fits(target: Target, needed: Totals, usable: int) -> bool:
    """Whether the device can run the engines and, where host and GPU share their memory, build them."""
    return needed.run_bytes <= usable and (not target.unified_memory or needed.build_peak_bytes <= usable)


def _said(needed: Totals) -> str:
    return f"{size_text(needed.build_peak_bytes)} to build and {size_text(needed.run_bytes)} to run"


def _remedy(bundle: Bundle, choices: Choices, fits: Callable[[Totals], bool]) -> str:
    """The first other choice that fits; a smaller model or bucket if none does."""
    others: list[tuple[str, Choices]] = []
    if choices.assemble == "whole":
        others.append(("--assemble segments", replace(choices, assemble="segments")))
    if choices.weights == "baked":
        others.append(("--engine-weights shared", replace(choices, weights="shared")))
    if len(others) > 1:
        both = replace(choices, assemble="segments", weights="shared")
        others.append(("--assemble segments --engine-weights shared", both))
    for text, other in others:
        if fits(_counted(bundle, other)[1]):
            return text
    profile = bundle.profile()
    return (
        f"export with a smaller bucket than text={profile.text_tokens},new={profile.new_tokens},batch={profile.batch}, "
        "fewer kept tokens, or a smaller model"
    )


def require_build_memory(plan: BuildPlan, available: int) -> None:
    """Raise InputError unless this machine, with `available` bytes of memory free, can build every engine."""
    peak = plan.totals.build_peak_bytes
    if peak > available:
        raise InputError(
            f"building the largest engine needs about {size_text(peak)} of memory",
            wanted=f"at most the {size_text(available)} that are free here",
            do=_remedy(plan.bundle, plan.choices, lambda totals: totals.build_peak_bytes <= available),
        )


# -- what else to say ------------------------------------------------------------------------------------------------


def _notes(bundle: Bundle, target: Target, version: Traits, choices: Choices, form: PluginForm) -> list[str]:
    build = bundle.manifest.build
    notes = []
    if not target.measured:
        notes.append(f"the defaults for {target.name} are reasoned, not yet measured on the device")
    if version.known_as != version.version:
        notes.append(f"TensorRT {version.version} is taken to be like {version.known_as}, the newest known")
    if build.opset != choices.opset:
        why = "does not know" if version.opset < build.opset else "cannot build with these choices"
        notes.append(f"opset {choices.opset} in place of {build.opset}, which TensorRT {version.version} {why}")
    if target.peak[build.precision] < target.peak[target.precision]:
        notes.append(f"the bundle is {build.precision}; {target.name} is at its best with {target.precision}")
    if choices.accumulate == "float32" and target.flavour == "tensorrt":
        notes.append(
            "float16 products add up in float32, by casts that TensorRT for RTX was seen to take into the product; "
            "whether this TensorRT does is found in the engine's layers"
        )
    single = any(profile.batch == 1 for profile in bundle.manifest.profiles)
    if version.number[:2] == FUSION_FAULT and build.precision == "float16" and choices.weights == "baked" and single:
        notes.append(
            "users report wrong gate and up products in float16 at batch 1: verify, or --engine-weights shared"
        )
    if bundle.manifest.quantization is not None and choices.weights == "shared" and form == "none":
        notes.append(
            "shared four-bit weights without plugins are unpacked in every run: --plugins library, or --engine-weights "
            "baked for weights without zero points"
        )
    if form != "none" and not version.plugins_documented:
        notes.append(
            "NVIDIA's guides call plugins unsupported in TensorRT for RTX: they build, running them was not tried"
        )
    return notes
