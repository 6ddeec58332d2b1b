"""One bundle of two picture sizes for a batch of three, behind one server for all tests of the room."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from btp_export import cli
from btp_export.running.runtime import BundleModel, load
from btp_export.serving.limits import Limits
from btp_export.serving.service import Service, Serving
from graphs.files.bundle import Bundle
from tests.btp_export.families import parity
from tests.btp_export.families.test_llava_next import make_next
from tests.btp_export.serving.running import Server
from tests.conftest import made_once

KEY = "correct horse"
LIMITS = Limits(body=400_000, picture=200_000, pixels=1_000_000, seconds=20, prepare_seconds=5, queue=6)


@pytest.fixture(scope="session")
def served_bundle(demo_checkpoint: Path, shared_folder: Path) -> Bundle:
    def make(folder: Path) -> None:
        model = make_next(demo_checkpoint, folder / "model")
        sizes = ["--image-size", "48x48", "--image-size", "40x72", "--batch", "3"]
        room = ["--text-tokens", "48", "--max-new-tokens", "12"]
        arguments = ["export", "--model", str(model), "--plan", "btp-paper", "--out", str(folder / "bundle")]
        assert cli.main([*arguments, *sizes, *room]) == 0

    return Bundle.open(made_once(shared_folder / "served", make) / "bundle")


@pytest.fixture(scope="session")
def alone(served_bundle: Bundle) -> dict[str, BundleModel]:
    """Models that are asked one request at a time, by profile: what the server's answers are compared with."""
    return {
        profile.name: load(served_bundle, profile=profile.name, threads=1)
        for profile in served_bundle.manifest.profiles
    }


@pytest.fixture(scope="session")
def serving(served_bundle: Bundle) -> Iterator[Server]:
    """At the first address anybody may ask, at the second those with the key."""
    service = Service(served_bundle, Serving("tiny", wait=0.05, threads=1, limits=LIMITS))
    with Server(service, None, KEY).running() as running:
        yield running


@pytest.fixture(scope="session")
def square() -> Image.Image:
    return parity.picture(48, 48, seed=1)


@pytest.fixture(scope="session")
def wide() -> Image.Image:
    return parity.picture(40, 72, seed=3)  # its answer fills the room that there is
