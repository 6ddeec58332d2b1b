"""Whether a plan, a shape profile and a model belong together."""

from graphs.errors import InputError
from graphs.plan import PruningPlan
from graphs.profile import ShapeProfile
from graphs.spec import ModelSpec


def check_fits(spec: ModelSpec, plan: PruningPlan, profile: ShapeProfile) -> None:
    """Raise InputError unless the plan and the profile are for this model and for each other."""
    pairs = [
        ("model type", plan.model_type, spec.model_type),
        ("decoder layers", plan.num_layers, spec.decoder.num_layers),
        ("image tokens", plan.image_tokens, profile.image_tokens),
        ("grid", list(plan.grid), list(profile.grid)),
        ("tokens before the image in the profile", profile.prefix_tokens, spec.prefix_tokens),
    ]
    for what, got, wanted in pairs:
        if got != wanted:
            raise InputError(
                f"{what}: {got}", wanted=f"{wanted} for {spec.name}", do="make the plan again for this model"
            )
    if profile.max_positions > spec.decoder.max_positions:
        raise InputError(
            f"the profile needs {profile.max_positions} positions",
            wanted=f"at most {spec.decoder.max_positions}, which {spec.name} was trained for",
            do="lower --text-tokens or --max-new-tokens",
        )
