"""Plans of the tiny model (tests/conftest.py), and the one that most tests take: a stage of each kind."""

from graphs.records.plan import PruningPlan, Stage
from graphs.records.spec import ModelSpec


def plan_of(spec: ModelSpec, *stages: Stage) -> PruningPlan:
    """A plan of a model with those stages, none if none is given."""
    return PruningPlan(
        model_type=spec.model_type,
        num_layers=spec.decoder.num_layers,
        image_tokens=spec.vision.image_tokens,
        grid=spec.vision.grid,
        stages=stages,
    )


def tiny_plan(*stages: Stage) -> PruningPlan:
    """A plan of the tiny model: 6 layers, V = 36 in a 6 x 6 grid."""
    return PruningPlan(model_type="llava", num_layers=6, image_tokens=36, grid=(6, 6), stages=stages)


# Every part of the rules; scores alone, and it chooses among what the first one kept; drops all.
PLAN = tiny_plan(
    Stage(layer=2, keep=18, attention_quota=6, pool=18, boundary=18, diversity_quota=4, seeds=9),
    Stage(layer=4, keep=7, attention_quota=7, pool=9, boundary=7),
    Stage(layer=5, keep=0),
)
