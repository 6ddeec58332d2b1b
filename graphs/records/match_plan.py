"""Whether a plan, a shape profile and a model belong together, and how they are brought together."""

from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, rescale
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec


def check_fits(spec: ModelSpec, plan: PruningPlan, profile: ShapeProfile) -> None:
    """Raise InputError unless the plan and the profile are for this model and for each other."""
    pairs = [
        ("model type", plan.model_type, spec.model_type),
        ("decoder layers", plan.num_layers, spec.decoder.num_layers),
        ("image tokens", plan.image_tokens, profile.image_tokens),
        ("grid", list(plan.grid), list(profile.grid)),
        ("blocks of image tokens", list(plan.blocks), list(profile.blocks)),
        ("tokens before the image in the profile", profile.prefix_tokens, spec.prefix_tokens),
    ]
    for what, got, wanted in pairs:
        if got != wanted:
            raise InputError(
                f"{what}: {got}", wanted=f"{wanted} for {spec.name}", do="make the plan again for this model"
            )
    if plan.needs_class_attention and not spec.vision.class_token:
        unknown = spec.vision.class_token is None
        raise InputError(
            f"a plan that scores by vision-cls for {spec.name}",
            wanted="a vision tower with a class token" + (", of a bundle that says so" if unknown else ""),
            do="export the model again" if unknown else "importance norm, or another plan",
        )
    if profile.max_positions > spec.decoder.max_positions:
        raise InputError(
            f"the profile needs {profile.max_positions} positions",
            wanted=f"at most {spec.decoder.max_positions}, which {spec.name} was trained for",
            do="lower --text-tokens or --max-new-tokens",
        )


def plan_for_profile(plan: PruningPlan, profile: ShapeProfile) -> PruningPlan:
    """The plan for the profile's image tokens: the plan itself, or rescaled. Raises InputError as `rescale`."""
    return rescale(plan, image_tokens=profile.image_tokens, grid=profile.grid, blocks=profile.blocks)


def spec_at(spec: ModelSpec, profile: ShapeProfile) -> ModelSpec:
    """The model with the profile's picture as its default: plans made for that are the profile's."""
    picture = {"image_size": profile.image_size, "grid": profile.grid, "blocks": profile.blocks}
    return spec.model_copy(update={"vision": spec.vision.model_copy(update=picture)})
