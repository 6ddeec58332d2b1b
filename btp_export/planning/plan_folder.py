"""A folder of plans of several budgets: one file a plan, and front.json that says what each is predicted to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from btp_export.results.plans import Front, FrontRow
from graphs.files.atomic import check_writable, write_texts
from graphs.records.errors import InputError
from graphs.records.reading import read_object

if TYPE_CHECKING:
    from calibrate.pareto import Point

INDEX: Final = "front.json"


def file_names(points: Sequence[Point]) -> list[str]:
    """btp-0.780.json and so on, by the requested compression."""
    return [f"btp-{point.requested:.3f}.json" for point in points]


def front_of(points: Sequence[Point], out: Path | None = None) -> Front:
    """What front.json holds and `--json` prints."""
    rows = [FrontRow(**point.summary(), file=name) for point, name in zip(points, file_names(points), strict=True)]
    return Front(rows=tuple(rows), out=out)


def check_folder(out: Path, *, force: bool) -> None:
    """Raise InputError unless plans may be put into `out`: a new or empty folder, or an earlier front and `force`."""
    if not out.exists():
        if not out.parent.is_dir():
            raise InputError(f"{out.parent} does not exist", wanted="a folder that exists", do=f"mkdir -p {out.parent}")
        check_writable(out)
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file", wanted="a folder for the plans", do="give another --out")
    check_writable(out)
    if not any(out.iterdir()):
        return
    if not _is_front(out):
        raise InputError(
            f"{out} is not empty and holds no {INDEX}", wanted="a new or empty folder", do="give another --out"
        )
    if not force:
        raise InputError(f"{out} already holds plans", wanted="a new or empty folder", do="--force, or another --out")


def write_front(points: Sequence[Point], out: Path, *, force: bool = False) -> None:
    """Write the plans and the index, all or none; an earlier front's own files are replaced with `force`.

    Raises InputError as `check_folder`.
    """
    check_folder(out, force=force)
    out = out.resolve()
    front = front_of(points)
    texts = {row.file: point.plan.to_json() for point, row in zip(points, front.rows, strict=True)}
    out.mkdir(exist_ok=True)
    stale = _files_of(out) if _is_front(out) else []
    write_texts(out, texts | {INDEX: front.to_json()})  # the index last
    for name in set(stale) - texts.keys():
        (out / name).unlink(missing_ok=True)


def _is_front(folder: Path) -> bool:
    try:
        document = read_object(folder / INDEX)
    except InputError:
        return False
    return str(document.get("format", "")).startswith("btp-front/")


def _files_of(folder: Path) -> list[str]:
    """The plan files that an earlier front names, and that lie in its folder."""
    rows = read_object(folder / INDEX).get("rows", [])
    names = [str(row.get("file", "")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [name for name in names if name and Path(name).name == name and name.startswith("btp-")]
