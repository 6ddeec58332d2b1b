"""Putting files and folders in their place as a whole: written beside the destination and renamed when complete.

    staged          a folder (a bundle, a kit), refused where something else is
    replacing       one file, as a stream;  write_bytes, write_text, write_json, write_texts: its contents
    move            something that is complete already
    link_or_copy    a file that is somewhere else, without a second copy where the file system allows it

Also what these need: space checked beforehand, sizes and hashes. No other file of the project renames or links,
graphs/files/folders.py apart, which exchanges folders and clears up after runs that were killed. Records are loaded
where one is made: the GPU check moves files on machines without pydantic.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from graphs.files.folders import PARTIAL, locked_folder, new_file, put_in_place, recover, sweep_files, sync_folder
from graphs.files.paths import require_utf8
from graphs.files.signals import uninterrupted
from graphs.records.errors import InputError, with_article
from graphs.records.reading import read_object

if TYPE_CHECKING:
    from graphs.records.manifest import FileRecord

Link = Literal["auto", "hard", "copy"]

# Up to this size `auto` copies, so that small bundles open in every ONNX tool (onnx.checker refuses hard links), and
# the quick check of a bundle hashes.
SMALL_FILE = 64 * 2**20
RESERVE = 64 * 2**20  # bytes left free besides the bundle itself
CHUNK = 8 * 2**20
HASH_THREADS = 2  # beside the capture of the vision tower, which wants the other cores


@contextlib.contextmanager
def staged(
    destination: Path,
    *,
    force: bool = False,
    is_ours: Callable[[Path], bool] | None = None,
    noun: str = "bundle",
    sync: bool = True,
) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; when the block ends well it becomes `destination`.

    On any error, Ctrl-C included, the folder and the parents made for it are removed and `destination` is as before.
    A bundle at `destination` is replaced only with `force`, in one step; anything else there is never touched.
    `is_ours` and `noun`: what else than a bundle is made and may be replaced. What a killed run left is cleared up.
    `sync` waits until the contents are on the disk; leave it out only for what lies in a folder that is removed again.
    Raises InputError if the destination is taken or cannot be written.
    """
    destination = destination.resolve()
    check_destination(destination, force=force, is_ours=is_ours, noun=noun)
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            parents = _make_parents(destination.parent)
            folder = stack.enter_context(_sibling(destination, parents))
        try:
            yield folder
            if sync:
                _sync_tree(folder)
            check_destination(destination, force=force, is_ours=is_ours, noun=noun)  # it may have appeared meanwhile
            with uninterrupted():
                put_in_place(folder, destination)
        except BaseException:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)
                _remove_empty(parents)
            raise


@contextlib.contextmanager
def _sibling(destination: Path, parents: Sequence[Path]) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(locked_folder(destination.parent, f".{destination.name}.", PARTIAL))
        except OSError as error:
            _remove_empty(parents)
            raise _cannot_write(destination.parent, error) from error
        yield folder


def check_destination(
    destination: Path, *, force: bool, is_ours: Callable[[Path], bool] | None = None, noun: str = "bundle"
) -> None:
    """Raise InputError unless a bundle may be put at `destination`: free, an empty folder, or a bundle and `force`.

    An old bundle that an interrupted replacement left aside is put back first.
    """
    another = "give another --out" if is_ours is None else "move it away"
    require_utf8(destination)
    recover(destination, is_ours or is_bundle)
    if not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"{destination} is a file", wanted=f"a folder for the {noun}", do=another)
    if not any(destination.iterdir()):
        return
    if not (is_ours or is_bundle)(destination):
        raise InputError(
            f"{destination} is not empty and is no {noun}",
            wanted=f"a new or empty folder; --force replaces {noun}s only",
            do=another,
        )
    if not force:
        raise InputError(
            f"{destination} already holds {with_article(noun)}",
            wanted="a new or empty folder",
            do="--force" + (", or another --out" if is_ours is None else f", which replaces this {noun}"),
        )


def check_writable(folder: Path, *, do: str = "give another --out") -> None:
    """Raise InputError unless files can be made in `folder`, or where it is to be made: for before long work."""
    folder = folder.resolve()
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file", wanted="a folder", do=do)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _cannot_write(there, error, do) from error


def check_outside(destination: Path, reads: Sequence[Path]) -> None:
    """Raise InputError if one of the files or folders `reads` lies in what --force would replace at `destination`."""
    place = destination.resolve()
    for path in reads:
        if path.resolve().is_relative_to(place) or path.absolute().is_relative_to(destination.absolute()):
            raise InputError(
                f"{path} lies in {destination}, which would be replaced",
                wanted="a model, a plan and data outside --out",
                do="give another --out, or move it away",
            )


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest of ours, of whatever version."""
    try:
        manifest = read_object(folder / "manifest.json")
    except InputError:
        return False
    from graphs.records.manifest import FORMAT

    family = FORMAT.split("/")[0] + "/"
    return str(manifest.get("format", "")).startswith(family)


# -- single files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream into a new file beside `path`; when the block ends well it becomes `path`, else it is removed.

    The file has a name of its own, so that two writers do not meet, and is made anew: a link that somebody has put
    there is never written through. Its permissions are those of any new file. `sync` waits until the contents are on
    the disk; leave it out only for what can be made again. Files that killed runs were writing for `path` are removed.
    Raises OSError where nothing can be written.
    """
    if sync:  # what can be made again lies in folders of ours, which go as a whole
        sweep_files(path)
    handle, partial = new_file(path)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with uninterrupted():
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write, which names no file
            error.filename = os.fspath(path)
        raise
    if sync:
        sync_folder(path.parent)


def fresh(path: Path) -> BinaryIO:
    """A new file at `path`, open for writing, in place of what was there: a log, which is read while it is written.

    A link is removed, not followed, and one in place of its folder is refused. Raises InputError or OSError.
    """
    if path.parent.is_symlink():
        raise InputError(f"{path.parent} is a link", wanted="a folder of its own", do="remove the link")
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write or replace a file in one step: a reader sees the old one or the new one."""
    with replacing(path, sync=sync) as stream:
        stream.write(content)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Text in UTF-8, as `write_bytes`."""
    write_bytes(path, text.encode(), sync=sync)


def write_json(path: Path, document: Any, *, sync: bool = True) -> None:
    """JSON types as all our files hold them, as `write_bytes`."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n", sync=sync)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Files that belong together: all are complete before the first takes its place, in the order given."""
    with uninterrupted(), contextlib.ExitStack() as stack:
        for name in reversed(list(texts)):  # the stack ends with what came last
            stream = stack.enter_context(replacing(folder / name))
            stream.write(texts[name].encode())


def move(source: Path, target: Path) -> None:
    """Give a complete file or folder of the same file system its place, in one step; a file there is replaced."""
    os.replace(source, target)


# -- links and copies ------------------------------------------------------------------------------------------------


def link_or_copy(source: Path, target: Path) -> None:
    """Put `source` (symbolic links resolved) at `target`, which must be free: linked if possible, else copied."""
    source = source.resolve()
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        _copy(source, target)


def check_space(
    destination: Path,
    needed: int,
    *,
    what: str = "the bundle",
    do: str = "free some space, give --out on another disk, or --link hard",
) -> None:
    """Raise InputError unless the disk of `destination` has `needed` bytes and a reserve."""
    folder = existing_parent(destination)
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE:
        raise InputError(
            f"{what} needs {size_text(needed + RESERVE)}, {folder} has {size_text(free)} free",
            wanted="enough space for all of it",
            do=do,
        )


def place(source: Path, target: Path, link: Link, *, small: int = SMALL_FILE) -> "FileRecord":
    """Put `source` (symbolic links resolved) at `target` as a hard link or a copy, and hash it.

    `auto` copies up to `small` bytes. The record's path is the file name. Raises InputError if `link` is hard and the
    file system refuses.
    """
    from graphs.records.manifest import FileRecord

    known = put(source, target, link, small=small)
    return FileRecord(file=target.name, size=target.stat().st_size, sha256=known or sha256(target))


def put(source: Path, target: Path, link: Link, *, small: int = SMALL_FILE) -> str | None:
    """Put `source` at `target` as `place` does; gives its hash if that is known without reading it once more.

    A large file in the hub's cache is believed to have the hash it is kept under; a full check of the bundle hashes it.
    """
    source = source.resolve()
    if will_link(source, target.parent, link, small=small):
        try:
            os.link(source, target)
        except OSError as error:
            if link == "hard":
                raise InputError(
                    f"cannot hard-link {source}: {error.strerror}",
                    wanted="a bundle on the same file system as the checkpoint, with hard links allowed",
                    do="--link copy",
                ) from error
        else:
            return hub_sha256(source) if source.stat().st_size > SMALL_FILE else None
    return _copy(source, target)


def hub_sha256(path: Path) -> str | None:
    """The hash that the hub's cache keeps a file under, if it is one of large files (symbolic links resolved).

    The cache stores a repository's files as models--<owner>--<name>/blobs/<etag>; the etag of a file in large file
    storage is its sha256, of other files a shorter git hash.
    """
    in_cache = path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
    return path.name if in_cache and re.fullmatch(r"[0-9a-f]{64}", path.name) else None


def will_link(source: Path, folder: Path, link: Link, *, small: int = SMALL_FILE) -> bool:
    """Whether `place` will try a hard link from a file in (or below) `folder` to `source`."""
    if link == "copy" or (link == "auto" and source.stat().st_size <= small):
        return False
    return link == "hard" or source.stat().st_dev == existing_parent(folder).stat().st_dev


def copied_bytes(sources: Sequence[Path], folder: Path, link: Link, *, small: int = SMALL_FILE) -> int:
    """Bytes that `place` will write for these files."""
    return sum(path.stat().st_size for path in sources if not will_link(path.resolve(), folder, link, small=small))


def sha256(path: Path, stop: threading.Event | None = None, chunk_bytes: int = CHUNK) -> str:
    """Hash of a file's bytes; given up, with a wrong result, once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while (chunk := stream.read(chunk_bytes)) and not (stop and stop.is_set()):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def hashing(paths: Sequence[Path], *, chunk_bytes: int = CHUNK) -> Iterator[Callable[[], dict[Path, str]]]:
    """Hash files in threads while the block does something else; what is yielded waits and gives the hashes.

    Reading and hashing leave the interpreter to others, and 14 GB of weights take as long as capturing a vision tower.
    If the block ends early the threads stop too.
    """
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        futures = {path: pool.submit(sha256, path, stop, chunk_bytes) for path in paths}
        try:
            yield lambda: {path: future.result() for path, future in futures.items()}
        finally:
            stop.set()


def record(root: Path, file: str) -> "FileRecord":
    """Size and hash of `root`/`file`."""
    from graphs.records.manifest import FileRecord

    return FileRecord(file=file, size=(root / file).stat().st_size, sha256=sha256(root / file))


def existing_parent(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def size_text(count: int) -> str:
    """Bytes for people: 3.2 GiB, 70.0 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _copy(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder`; gives the folders that were new, deepest first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return new


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _cannot_write(folder: Path, error: OSError, do: str = "give another --out") -> InputError:
    return InputError(f"cannot write in {folder}: {error.strerror}", wanted="a writable folder", do=do)


def _sync_tree(folder: Path) -> None:
    """Everything is on disk before the rename makes it visible."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)
