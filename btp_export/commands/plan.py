"""`btp-export plan`: show, check or make a pruning plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, note
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from btp_export.results.plans import Presets
    from calibrate.place.presets import Preset as NamedPlan
    from graphs.records.plan import PruningPlan


@dataclass(frozen=True)
class SwitchOptions:
    """One rule of the method changed, everything else of the plan kept."""

    heading: ClassVar[str] = "Changes to a plan"
    importance: Annotated[
        options.Importance | None, typer.Option("--importance", help="Rank tokens by another rule.")
    ] = None
    spatial_metric: Annotated[
        options.Metric | None, typer.Option("--spatial-metric", help="Space the fixed spatial set by another distance.")
    ] = None
    rebalance: Annotated[
        bool, typer.Option("--rebalance/--no-rebalance", help="Keep or remove the attention rebalance.")
    ] = True
    spatial: Annotated[bool, typer.Option("--spatial/--no-spatial", help="Keep or remove the fixed spatial set.")] = (
        True
    )
    stages: Annotated[
        str | None, typer.Option("--stages", metavar="L,L,...", help="Move the stages; the mean tokens stay.")
    ] = None
    balance: Annotated[
        str | None,
        typer.Option("--balance", metavar="X,X,...", help="Attention's share in each stage that keeps tokens."),
    ] = None


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="A preset, a plan file or a bundle.", autocompletion=complete.plans),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Scale a preset to this model, or check a plan file against it.",
            autocompletion=complete.models,
        ),
    ] = None,
    compression: options.CompressionOption = None,
    image_size: options.SizeOption = None,
    switches: SwitchOptions = SwitchOptions(),
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the plan to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan file at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a plan: its stages, the tokens each layer sees and what it saves. Presets are scaled to --model."""
    from btp_export.planning.calibration_settings import parse_shares, parse_stages
    from btp_export.planning.plan_files import show, write_plan_file
    from btp_export.results.plans import PlanSummary

    if list_presets:
        emit(_presets(), as_json=as_json, render=_show_presets)
        return
    if name is None:
        raise InputError("no plan named", wanted="a preset, a plan file or a bundle", do="btp-export plan --list")
    plan = _plan(name, model, compression, None if image_size is None else options.parse_image_size(image_size))
    plan = _switched(
        plan,
        importance=switches.importance,
        metric=switches.spatial_metric,
        rebalance=switches.rebalance,
        spatial=switches.spatial,
        layers=None if switches.stages is None else parse_stages(switches.stages),
        balance=None if switches.balance is None else parse_shares(switches.balance),
    )
    if out is not None:
        write_plan_file(plan, out, force=force)
        note(f"plan written to {out}")
    emit(PlanSummary.of(plan, out), as_json=as_json, render=show)


def _plan(name: str, model: str | None, compression: float | None, image_size: tuple[int, int] | None) -> "PruningPlan":
    from calibrate.place.presets import PRESETS
    from graphs.files.paths import expanded
    from graphs.records.plan import PruningPlan

    path = expanded(name)
    if path.is_dir() and name not in PRESETS:
        path = path / "plan.json"
    if model is not None:
        return _plan_for_model(name if name in PRESETS else str(path), model, compression, image_size)
    if image_size is not None:
        raise InputError("--image-size without a model", wanted="the model it is for", do="add --model NAME")
    if name in PRESETS:
        raise InputError(
            f"the preset {name} without a model",
            wanted="the model it is scaled to",
            do=f"btp-export plan {name} --model demo",
        )
    if compression is not None:
        raise InputError("--compression with a plan file", wanted="a preset", do="leave --compression out")
    return PruningPlan.load(path)


def _plan_for_model(
    choice: str, model: str, compression: float | None, image_size: tuple[int, int] | None
) -> "PruningPlan":
    from btp_export.model.defaults import default_profile
    from btp_export.model.open_model import open_model
    from btp_export.planning.plan_files import plan_for
    from graphs.records.match_plan import plan_for_profile, spec_at

    opened = open_model(model)
    profile = default_profile(opened, image_size)
    plan = plan_for(choice, spec_at(opened.spec, profile), compression=compression)
    return plan if image_size is None else plan_for_profile(plan, profile)


def _switched(plan: "PruningPlan", **switches: Any) -> "PruningPlan":
    """The plan with switches turned, which its record then names."""
    turned = {name: value for name, value in switches.items() if value is not None and value is not True}
    if not turned:
        return plan
    from calibrate.place.ablations import switched

    named = {name: list(value) if isinstance(value, tuple) else value for name, value in turned.items()}
    record = {**plan.calibration, "switched": named}
    return switched(plan, **switches).model_copy(update={"calibration": record})


def _presets() -> "Presets":
    """Names and summaries; a preset that the families bring settings for names those families, and what they lose."""
    from btp_export.families import family_for, known_families
    from btp_export.results.plans import Preset, Presets
    from calibrate.place.presets import PRESETS

    released = {name: family_for({"model_type": name}).released for name in known_families()}
    settings = {name: setting for name, setting in released.items() if setting is not None}
    cautions = [f"; {name}: {setting.caution}" for name, setting in settings.items() if setting.caution]

    def summary(entry: "NamedPlan") -> str:
        families = f" ({', '.join(settings)})" if entry.uses_released else ""
        return entry.summary + families + ("".join(cautions) if entry.name == "btp-paper" else "")

    listed = [Preset(name=entry.name, summary=summary(entry)) for entry in PRESETS.values()]
    calibrated = Preset(name="btp", summary="made by `btp-export calibrate` from pictures")
    return Presets(presets=(*listed, calibrated))


def _show_presets(result: "Presets") -> Any:
    from btp_export.console import table

    return table(["plan", ""], [[entry.name, entry.summary] for entry in result.presets], text=2)
