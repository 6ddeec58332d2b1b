"""Plans whose stages differ in what their selection reads: similarity and seeds, similarity, scores alone, nothing; or
in their rule."""

from pathlib import Path
from typing import Any

from engines.tensorrt.build.build import build
from engines.tensorrt.kit.device_kit import Recorder
from engines.tensorrt.prepare.build_plan import BuildPlan
from graphs.records.plan import PruningPlan, Stage
from tests.plans import plan_of

STAGES = (
    Stage(layer=2, keep=18, attention_quota=6, pool=20, boundary=18, diversity_quota=4, seeds=4),
    Stage(layer=3, keep=12, attention_quota=4, pool=8, diversity_quota=2),
    Stage(layer=4, keep=6, attention_quota=6, pool=6),
    Stage(layer=5, keep=0),
)
RULES = (
    Stage(layer=2, keep=18, attention_quota=6, pool=20, boundary=18, diversity_quota=4, seeds=4),
    Stage(layer=3, keep=12, attention_quota=4, pool=8, diversity_quota=2, diversity="coverage"),
    Stage(layer=4, keep=6, attention_quota=2, pool=6, diversity="coverage", weights="scores"),
)


def staged_plan(spec: Any, *stages: Stage) -> PruningPlan:
    """A plan of those stages, all four forms if none is given."""
    return plan_of(spec, *(stages or STAGES))


def staged_bundle(tiny_bundle: Any, *stages: Stage, **options: Any) -> Any:
    """The tiny model with those stages, all four forms if none is given."""
    return tiny_bundle(staged_plan(tiny_bundle().spec, *stages), **options)


def prepared(plan: BuildPlan, *, force: bool = False, recorder: Recorder | None = None) -> Path:
    """engines/<target>/ as `btp-export build` leaves it on a machine without TensorRT; the folder."""
    return build(plan, None, reason="no TensorRT here", force=force, recorder=recorder).folder
