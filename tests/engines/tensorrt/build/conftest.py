"""The tiny model with four layers: TensorRT takes as long for each."""

from pathlib import Path

import pytest

from tests.conftest import BundleMaker, bundle_maker, made_once, make_tiny

LAYERS = 4


@pytest.fixture(scope="session")
def short_checkpoint(demo_checkpoint: Path, shared_folder: Path) -> Path:
    """The tiny checkpoint, but for its layers."""
    parent = shared_folder / "short"
    return made_once(parent, lambda out: make_tiny(demo_checkpoint, out / "model", num_hidden_layers=LAYERS)) / "model"


@pytest.fixture(scope="session")
def short_bundle(short_checkpoint: Path, shared_folder: Path) -> BundleMaker:
    """`short_bundle(plan=None, **options)`: a bundle of it."""
    return bundle_maker(short_checkpoint, shared_folder / "short-bundles", {"text_tokens": 16, "new_tokens": 12})
