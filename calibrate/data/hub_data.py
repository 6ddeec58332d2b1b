"""Pictures and prompts from a Hugging Face data set, by the `datasets` library if it is installed.

`hf:owner/name[:split]` is streamed: only as much is fetched as is looked at. A folder that `datasets` saved
(`save_to_disk`) is read from the disk. Pictures are taken as they are stored and decoded here, one by one, so that a
broken one can be named and skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from calibrate.data.samples import Choice, SampleSet, SourcePicture, take
from graphs.files.paths import expanded
from graphs.files.pictures import open_picture
from graphs.records.errors import InputError, UnavailableError

PREFIX = "hf:"
NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")  # as the hub takes them
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "text", "caption")
_SAVED = ("dataset_dict.json", "dataset_info.json")  # what save_to_disk leaves in a folder of splits, or of one
_BUFFER = 256  # rows among which a stream is shuffled, at least


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / _SAVED[0]).is_file() or all((folder / name).is_file() for name in (_SAVED[1], "state.json"))


def samples(source: str, choice: Choice) -> SampleSet:
    """Pictures of a data set, with its own prompts where it has any.

    Raises UnavailableError if `datasets` is not installed or the hub not reached, InputError for a set without
    pictures, an unknown split, or too few pictures that can be read.
    """
    library = _library()
    table, name = _open(library, source)
    features = table.features or {}
    image = next((key for key, feature in features.items() if isinstance(feature, library.Image)), None)
    if image is None:
        raise InputError(
            f"{source} has no column of pictures: {', '.join(features) or 'its columns are not known'}",
            wanted="a data set with an image column",
            do="give another one, or a folder of pictures",
        )
    question = None if choice.prompts else next((key for key in PROMPT_COLUMNS if _is_text(features.get(key))), None)
    table = table.cast_column(image, library.Image(decode=False))
    streamed = {"buffer_size": max(_BUFFER, 4 * choice.count)} if isinstance(table, library.IterableDataset) else {}
    shuffled = table.shuffle(seed=choice.seed, **streamed)

    def pictures() -> Iterator[SourcePicture]:
        for number, row in enumerate(shuffled):
            label = f"row {number} of {name}"  # in the shuffled order; stored paths are of other machines
            stored = row[image] or {}
            yield SourcePicture(label, _reader(stored, label), row[question] if question else None)

    what = f"data set {name}" + (f", column {question}" if question else "")
    return take(pictures(), choice, where=f"in {source}", source=what)


def _library() -> Any:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnavailableError(
            "the library `datasets` is not installed",
            wanted="it, to read a Hugging Face data set",
            do="pip install 'btp-export[data]'",
        ) from error
    return datasets


def _open(library: Any, source: str) -> tuple[Any, str]:
    """One split of the data set, and what it is called."""
    name, split = source, ""
    try:
        if source.startswith(PREFIX):
            name, _, split = source.removeprefix(PREFIX).partition(":")
            if not NAME.fullmatch(name):
                raise InputError(f"{source} names no data set", wanted="hf:owner/name[:split]")
            opened = library.load_dataset(name, streaming=True)
        else:
            name = expanded(source).resolve().name
            opened = library.load_from_disk(str(expanded(source)))
    except (ConnectionError, TimeoutError) as error:
        raise UnavailableError(
            f"cannot reach the hub for {name}", wanted="a network", do="give a folder of pictures, or a saved data set"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot open the data set {name}: {reason}", wanted="hf:owner/name[:split]") from error
    if not isinstance(opened, dict):
        return opened, name
    split = split or ("train" if "train" in opened else next(iter(opened)))
    if split not in opened:
        raise InputError(f"{name} has no split {split!r}", wanted=", ".join(opened), do=f"{PREFIX}{name}:SPLIT")
    return opened[split], f"{name}, split {split}"


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _reader(stored: dict[str, Any], label: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        if stored.get("bytes") is not None:
            return open_picture(stored["bytes"], label)
        if stored.get("path"):
            return open_picture(Path(stored["path"]), label)
        raise InputError(f"cannot read the picture {label}: the row has none", wanted="a picture in every row")

    return read
