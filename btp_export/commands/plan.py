"""`btp-export plan`: show, check or make a pruning plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from btp_export.console import JsonOption, emit, note
from graphs.errors import InputError


def command(
    name: Annotated[str | None, typer.Argument(help="A preset, a plan file or a bundle.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Model that a preset is scaled to, or a file is checked against."),
    ] = None,
    compression: Annotated[
        float | None, typer.Option("--compression", metavar="X", help="Budget for a preset, e.g. 0.78.")
    ] = None,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write the plan.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan file at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a plan: its stages, the tokens each layer sees and what it saves. Presets are scaled to --model."""
    from btp_export.plans import show, summary, write_plan_file

    if list_presets:
        emit({"presets": _presets()}, as_json=as_json, render=_show_presets)
        return
    if name is None:
        raise InputError("no plan named", wanted="a preset, a plan file or a bundle", do="btp-export plan --list")
    plan = _plan(name, model, compression)
    if out is not None:
        write_plan_file(plan, out, force=force)
        note(f"plan written to {out}")
    emit({**summary(plan), "out": out}, as_json=as_json, render=show)


def _plan(name: str, model: str | None, compression: float | None) -> Any:
    from btp_export.plans import plan_for
    from calibrate.presets import PRESETS
    from graphs.plan import PruningPlan

    path = Path(name)
    if path.is_dir() and name not in PRESETS:
        path = path / "plan.json"
    if model is not None:
        from btp_export.models import open_model

        return plan_for(name if name in PRESETS else str(path), open_model(model).spec, compression=compression)
    if name in PRESETS:
        raise InputError(
            f"the preset {name} without a model",
            wanted="the model it is scaled to",
            do=f"btp-export plan {name} --model demo",
        )
    if compression is not None:
        raise InputError("--compression with a plan file", wanted="a preset", do="leave --compression out")
    return PruningPlan.load(path)


def _presets() -> list[dict[str, str]]:
    from calibrate.presets import PRESETS

    listed = [{"name": entry.name, "summary": entry.summary} for entry in PRESETS.values()]
    return [*listed, {"name": "btp", "summary": "made by `btp-export calibrate` from pictures"}]


def _show_presets(result: dict[str, Any]) -> Any:
    from btp_export.console import table

    return table(["plan", ""], [[entry["name"], entry["summary"]] for entry in result["presets"]], text=2)
