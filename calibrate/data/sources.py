"""Where the samples of a calibration come from, as a user says it."""

from __future__ import annotations

from pathlib import Path

from calibrate.data import hub_data
from calibrate.data.samples import (
    DEFAULT_SAMPLES,
    NO_CHECKS,
    Checks,
    Choice,
    SampleSet,
    folder_samples,
    jsonl_pictures,
    read_prompts,
    scene_samples,
)
from graphs.files.paths import expanded
from graphs.records.errors import InputError
from graphs.records.progress import Note


def calibration_samples(
    images: str | None,
    *,
    prompts: Path | None = None,
    count: int = DEFAULT_SAMPLES,
    seed: int = 0,
    note: Note | None = None,
    checks: Checks = NO_CHECKS,
) -> SampleSet:
    """Up to `count` samples in a seeded order, from where `images` says.

    None: generated scenes. Otherwise a folder of pictures, a JSONL file of image and prompt, `hf:owner/name[:split]`,
    or a folder that `datasets` saved. `prompts` is a file of them, one a line, which then take turns. Pictures that
    `checks` refuses are named and skipped, prompts of a file that it refuses are an error.
    Raises InputError for a source that cannot be used or holds too few pictures, UnavailableError for a data set when
    `datasets` is not installed or the hub cannot be reached.
    """
    if images is None:
        return scene_samples(count, seed=seed, split="calibration")
    given = None if prompts is None else read_prompts(prompts, checks)
    choice = Choice(count, seed, given, note, checks)
    path = expanded(images)
    if images.startswith(hub_data.PREFIX) or hub_data.is_saved(path):
        return hub_data.samples(images, choice)
    if path.is_dir():
        return folder_samples(path, choice)
    if path.is_file():
        return jsonl_pictures(path, choice)
    address = "://" in images
    raise InputError(
        f"{images} is an address" if address else f"{images} is not there",
        wanted="a folder of pictures, a JSONL file of image and prompt, or hf:owner/name[:split]",
        do="download the pictures into a folder: --images DIR" if address else "--images DIR",
    )
