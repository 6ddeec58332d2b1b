"""Plans by name or file for a model, and how a plan is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphs.files.atomic import check_writable, write_text
from graphs.files.paths import expanded
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.spec import ModelSpec

if TYPE_CHECKING:
    from btp_export.results.job import JobResult
    from btp_export.results.plans import PlanSummary

CALIBRATED = "btp"


def plan_for(
    name: str, spec: ModelSpec, *, compression: float | None = None, average_tokens: float | None = None
) -> PruningPlan:
    """A preset by name, scaled to the model at its own image size, or a plan file, checked to be for this model.

    The file of a model that takes any image size may be for another one: graphs.records.match_plan.plan_for_profile
    brings it to a profile. A budget goes with presets only. Raises InputError for an unknown name, an unreadable file
    or another model's plan.
    """
    from btp_export.families import family_of
    from calibrate.place.presets import PRESETS, preset

    if name == "none" and compression:
        raise InputError(
            f"--compression {compression:g} with the preset none, which prunes nothing",
            wanted="one of them",
            do="leave --compression out, or take another preset",
        )
    if name in PRESETS:
        return preset(
            name,
            model_type=spec.model_type,
            num_layers=spec.decoder.num_layers,
            image_tokens=spec.vision.image_tokens,
            grid=spec.vision.grid,
            blocks=spec.vision.blocks,
            released=family_of(spec).released,
            compression=compression,
            average_tokens=average_tokens,
            class_token=bool(spec.vision.class_token),
        )
    path = expanded(name)
    if name == CALIBRATED or not (path.suffix == ".json" or path.exists()):
        raise InputError(
            f"no preset or plan file is called {name!r}",
            wanted=f"{', '.join(PRESETS)} or a plan.json",
            do="btp-export calibrate --out plan.json" if name == CALIBRATED else "btp-export plan --list",
        )
    if compression is not None:
        raise InputError(
            f"--compression with the plan file {name}",
            wanted="a preset: the counts of a file are fixed",
            do="leave --compression out, or calibrate again",
        )
    plan = PruningPlan.load(path)
    check_model(plan, spec, name)
    return plan


def check_model(plan: PruningPlan, spec: ModelSpec, source: str) -> None:
    """Raise InputError unless the plan is for this model, and for its image size if it has only one."""
    got = (plan.model_type, plan.num_layers, plan.image_tokens, tuple(plan.grid))
    wanted = (spec.model_type, spec.decoder.num_layers, spec.vision.image_tokens, tuple(spec.vision.grid))
    if got[:2] != wanted[:2] or (got != wanted and not spec.vision.dynamic):
        raise InputError(
            f"{source} is for {_words(*got)}",
            wanted=f"{_words(*wanted)}, as {spec.name} has",
            do="calibrate again for this model, or take a preset",
        )


def show(result: PlanSummary | JobResult) -> Any:
    """A plan as a table of segments for the console."""
    from rich.console import Group

    from btp_export.console import table

    plan = result.plan
    rows = []
    for segment in plan.segments():
        stage = plan.stages[segment.stage] if segment.stage is not None else None
        share = f"{stage.attention_quota} / {stage.diversity_quota} / {stage.seeds}" if stage and stage.keep else ""
        layers = f"{segment.start} to {segment.stop - 1}" if segment.stop - segment.start > 1 else f"{segment.start}"
        rows.append([layers, f"{segment.image_tokens}", f"{segment.image_tokens / plan.image_tokens:.1%}", share])
    shown = table(["layers", "image tokens", "of all", "attention / diversity / spatial"], rows)
    total = (
        f"{plan.average_tokens:.1f} of {plan.image_tokens} image tokens on average: "
        f"compression {plan.compression:.3f}; importance {plan.importance}"
    )
    return Group(shown, total)


def check_out(out: Path, *, force: bool) -> None:
    """Raise InputError unless a plan may be written to `out`.

    Only a plan file is ever replaced, and only with `force`.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder", wanted="a file name", do=f"--out {out / 'plan.json'}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist", wanted="a folder that exists", do=f"mkdir -p {out.parent}")
    check_writable(out.parent)
    if out.exists():
        if not force:
            raise InputError(f"{out} already exists", wanted="a new file", do="another --out, or --force")
        PruningPlan.load(out)


def write_plan_file(plan: PruningPlan, out: Path, *, force: bool = False) -> None:
    """Write a plan beside its place and rename it into it. Raises InputError as `check_out`."""
    check_out(out, force=force)
    write_text(out, plan.to_json())


def _words(model_type: str, layers: int, tokens: int, grid: tuple[int, ...]) -> str:
    return f"{model_type} with {layers} layers and {tokens} image tokens on {grid[0]} x {grid[1]}"
