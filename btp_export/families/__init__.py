"""Model families: one file per transformers `model_type`. Adding a family is adding a file that defines FAMILY.

All that is particular to a family stands in its file: what it computes, its published models with their names and
shapes, the settings that were released for it. Files that begin with "_" are shared. May use `calibrate.place` for the
form of released settings, and graphs.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

from btp_export.families._known import DummyProcessor, KnownModel
from btp_export.families._vision import Layout
from calibrate.place.presets import ReleasedSettings
from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn


class Family(Protocol):
    """What the toolkit needs to know about a kind of model."""

    model_type: str
    renames: tuple[tuple[str, str], ...]
    """(stored prefix, canonical prefix) pairs for open_checkpoint, for every published weight-name layout."""
    models: tuple[KnownModel, ...]
    """Published models that have a name on the command line."""
    released: ReleasedSettings | None
    """What `btp-paper` is made from; None: the family has no such preset."""
    dummy: DummyProcessor | None
    """How `--dummy-weights` makes the text side of `models`; None: it does not."""

    def spec(self, checkpoint: Checkpoint, name: str) -> ModelSpec:
        """The model as data. Raises InputError for a configuration the graphs cannot express."""
        ...

    def profile(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        image_size: tuple[int, int] | None,
        text_tokens: int,
        new_tokens: int,
    ) -> ShapeProfile:
        """The static shapes for one batch, image size (height, width; None = the model's own), bucket and room."""
        ...

    def layout(self, spec: ModelSpec, picture: tuple[int, int]) -> Layout:
        """What a picture of that height and width becomes; models of one size scale every picture to it.

        Raises InputError for a picture that the model cannot take.
        """
        ...

    def vision_module(
        self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None, *, class_attention: bool = False
    ) -> "nn.Module":
        """Vision tower and projector, float32, for pictures of that height and width (None: the model's own).

        forward(pixel_values, shaped as the profile's `pixel_input`) -> image features [B,V,C]; B follows from the
        pixels' first dimension. With `class_attention` it gives a pair: the features, and the attention of the tower's
        class token to each of the V tokens, [B,V] float32. Raises InputError if the tower has none; that is asked for
        only where the spec's `vision.class_token` is true.
        """
        ...


def known_families() -> list[str]:
    """The model types there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def known_models() -> dict[str, KnownModel]:
    """Every family's published models by their names on the command line."""
    return {model.name: model for name in known_families() for model in _family(name).models}


def family_of(spec: ModelSpec) -> Family:
    """The family that made a spec."""
    return family_for({"model_type": spec.model_type})


def family_for(config: dict[str, Any]) -> Family:
    """The family of a checkpoint's config.json. Raises InputError for a model type without a file here."""
    model_type = config.get("model_type")
    if model_type not in known_families():
        raise InputError(
            f"model type {model_type!r}" if model_type else "config.json names no model_type",
            wanted=f"one of {', '.join(known_families())}",
            do="give a checkpoint in the transformers layout of one of these",
        )
    return _family(model_type)


def _family(model_type: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
