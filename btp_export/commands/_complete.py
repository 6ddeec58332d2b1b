"""What the shell offers for an option's value. Read without any heavy library: a shell waits for it at every Tab."""

import re
from pathlib import Path

import typer

from btp_export.commands._model_names import model_names
from graphs.records.errors import InputError
from graphs.records.reading import read_object

# Names from a bundle become words of the user's shell: only these, so that none is a command in it.
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MOST_BYTES = 16 * 2**20  # of a manifest


def models(incomplete: str) -> list[str]:
    """Models known by name; folders are completed by the shell."""
    return _beginning(["demo", *model_names()], incomplete)


def targets(incomplete: str) -> list[str]:
    """Devices that engines are built for."""
    from engines.targets import known_targets

    return _beginning(known_targets(), incomplete)


def plans(incomplete: str) -> list[str]:
    """btp and the presets."""
    from calibrate.place.presets import PRESETS

    return _beginning(["btp", *PRESETS], incomplete)


def plan_lists(incomplete: str) -> list[str]:
    """The same after commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in plans(last)]


def devices(incomplete: str) -> list[str]:
    """Where PyTorch and ONNX Runtime compute."""
    return _beginning(["auto", "cpu", "cuda"], incomplete)


def profiles(context: typer.Context, incomplete: str) -> list[str]:
    """Shape profiles of the bundle that stands on the command line."""
    words = context.args  # an option that still waits for its value leaves the arguments before it there
    if not words:
        return []
    manifest = Path(words[0]).expanduser() / "manifest.json"
    try:
        entries = read_object(manifest, most=MOST_BYTES)["profiles"]
        names = [str(entry["name"]) for entry in entries]
    except (InputError, TypeError, KeyError):
        return []  # the command itself says what is wrong with the bundle
    return _beginning([name for name in names if SAFE.fullmatch(name)], incomplete)


def _beginning(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
