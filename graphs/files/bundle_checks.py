"""What is checked when a bundle is opened: that everything in it is listed, unchanged, and fits together.

    manifest's own digest     manifest_sha256 is that of the file with 64 zeros in its place; old bundles have none
    listed files              there, with their sizes and hashes
    other files               none in graphs/ and processor/, where libraries pick up what they find
    graphs                    inputs, outputs and external data are what the manifest says

None of this is a signature: who can write all files of a bundle can write one that passes (docs/security.md).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from graphs import dtypes
from graphs.files.onnx_file import REMEDY
from graphs.files.onnx_wire import GraphFile, Value
from graphs.records.errors import InputError
from graphs.records.manifest import FileRecord, GraphRecord, Manifest, TensorRecord

CLOSED: Final = ("graphs", "processor")  # folders in which nothing but listed files may lie
_DIGEST: Final = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')
NO_DIGEST: Final = "0" * 64


def listed_files(manifest: Manifest) -> Iterator[FileRecord]:
    """Every file that the manifest vouches for."""
    yield manifest.plan
    yield from manifest.profile_plans.values()
    yield from manifest.processor
    yield from manifest.graphs
    yield from manifest.weights


def digest_of(text: bytes) -> str:
    """The digest of a manifest that ends with one, whatever it is now."""
    match = _DIGEST.search(text)
    start = match.start(1) if match else len(text)
    return hashlib.sha256(text[:start] + NO_DIGEST.encode() + text[start + 64 :]).hexdigest()


def check_digest(path: Path, text: bytes, manifest: Manifest) -> None:
    """Raise InputError unless the manifest is as it was written; one of an earlier version has no digest."""
    recorded = manifest.manifest_sha256
    if recorded is not None and (_DIGEST.search(text) is None or digest_of(text) != recorded):
        raise InputError(f"{path} was changed: sha256 {digest_of(text)}", wanted=f"sha256 {recorded}", do=REMEDY)


def check_size(root: Path, entry: FileRecord) -> None:
    """Raise InputError unless a listed file is there with its size."""
    path = root / entry.file
    if not path.is_file():
        raise InputError(f"{path} is missing", wanted="the bundle as it was exported", do=REMEDY)
    size = path.stat().st_size
    if size != entry.size:
        raise InputError(f"{path} has {size} bytes", wanted=f"{entry.size} bytes as exported", do=REMEDY)


def check_hash(root: Path, entry: FileRecord, got: str) -> None:
    """Raise InputError unless the hash `got` is the recorded one."""
    if got != entry.sha256:
        raise InputError(f"{root / entry.file} was changed: sha256 {got}", wanted=f"sha256 {entry.sha256}", do=REMEDY)


def check_unlisted(root: Path, manifest: Manifest) -> None:
    """Raise InputError for a file in graphs/ or processor/ that is not listed; hidden files are read by nobody."""
    listed = {entry.file for entry in listed_files(manifest)}
    for folder in CLOSED:
        for path in sorted((root / folder).rglob("*")):
            file = path.relative_to(root).as_posix()
            if path.name.startswith(".") or file in listed or (path.is_dir() and not path.is_symlink()):
                continue
            raise InputError(
                f"{path} does not belong to the bundle", wanted="the files that manifest.json lists", do="remove it"
            )


def check_config(root: Path, manifest: Manifest) -> None:
    """Raise InputError unless processor/config.json is the one that the model's record was made from."""
    config = next((entry for entry in manifest.processor if entry.file == "processor/config.json"), None)
    if config is None or config.sha256 != manifest.model.config_sha256:
        got = "is not listed" if config is None else f"has sha256 {config.sha256}"
        raise InputError(
            f"{root / 'processor' / 'config.json'} {got}", wanted=f"sha256 {manifest.model.config_sha256}", do=REMEDY
        )


# -- graphs ----------------------------------------------------------------------------------------------------------


def check_graphs(root: Path, graphs: Sequence[GraphRecord], weights: Sequence[FileRecord]) -> None:
    """Raise InputError unless every graph has the recorded inputs and outputs, and external data in listed files."""
    files = {PurePosixPath(entry.file).relative_to("graphs").as_posix() for entry in weights}
    for graph in graphs:
        path = root / graph.file
        content = GraphFile(path)
        for recorded, values in ((graph.inputs, content.inputs), (graph.outputs, content.outputs)):
            _check_values(path, recorded, values)
        content.wide_weights()  # refuses a type that we do not know
        for tensor in content.outside():
            if tensor.location not in files:
                raise InputError(
                    f"{path}: {tensor.name} lies in {tensor.location!r}",
                    wanted="weights that manifest.json lists",
                    do=REMEDY,
                )


def _check_values(path: Path, recorded: Sequence[TensorRecord], values: Sequence[Value]) -> None:
    known = {element.onnx: element.name for element in dtypes.TYPES}
    got = [(value.name, known.get(value.element, f"type {value.element}"), value.shape) for value in values]
    wanted = [(tensor.name, tensor.dtype, tensor.shape) for tensor in recorded]
    if got != wanted:
        first, other = next(
            (pair for pair in zip(got, wanted, strict=False) if pair[0] != pair[1]), (f"{len(got)}", f"{len(wanted)}")
        )
        raise InputError(f"{path} has {first}", wanted=f"{other} as in manifest.json", do=REMEDY)
