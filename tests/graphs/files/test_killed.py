"""kill -9 at every rename: what is there is whole, old or new, and the next run clears up and succeeds."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphs.building.derived_bundles import derive
from graphs.files import folders
from graphs.files.atomic import replacing, write_texts
from graphs.files.bundle import Bundle
from graphs.records.plan import PruningPlan, Stage
from tests.plans import tiny_plan

MOST = 40  # renames of one piece of work
TEXTS = {"a.json": "new", "b.json": "new", "front.json": "new"}
OLD, NEW = tiny_plan(Stage(layer=2, keep=0)), tiny_plan(Stage(layer=4, keep=0))


def write_one(path: Path) -> None:
    with replacing(path) as stream:
        stream.write(b"new")


def write_several(folder: Path) -> None:
    write_texts(folder, TEXTS)


def write_bundle(source: Path, out: Path, plan: PruningPlan = NEW) -> None:
    derive(Bundle.open(source), plan, out, force=True)


def dying(number: int, after: bool, can_exchange: bool, work: Callable[..., None], *given: Any) -> None:
    """In a child: do the work, and die at its rename of that number, before or after it."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **named)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    # The two modules that rename (tests/test_rules.py) do it by these.
    os.replace, Path.rename = counted(os.replace), counted(Path.rename)  # type: ignore[method-assign]
    folders.exchange = counted(folders.exchange) if can_exchange else lambda one, other: False
    work(*given)


@pytest.fixture(scope="module")
def children() -> Any:
    """Forked from a process without threads, which this one may have by now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graphs.building.derived_bundles", "tests.plans"])
    return context


def at_every_rename(
    children: Any, check: Callable[[], None], work: Callable[..., None], *given: Any, can_exchange: bool = True
) -> int:
    """Kill the work before and after each of its renames, check each time, and give how often it was killed."""
    kills = 0
    for after in (False, True):
        for number in range(1, MOST):
            child = children.Process(target=dying, args=(number, after, can_exchange, work, *given))
            child.start()
            child.join(120)
            check()
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL
            kills += 1
    return kills


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file(children: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def check() -> None:
        assert path.read_text() in ("old", "new")

    assert at_every_rename(children, check, write_one, path) == 2
    write_one(path)
    assert names(tmp_path) == ["x.json"], "the next writer removes what the killed ones left"


def test_files_that_belong_together(children: Any, tmp_path: Path) -> None:
    """Each is old or new as a whole, and the last, which says what belongs together, is never ahead of the others."""
    for name in TEXTS:
        (tmp_path / name).write_text("old")

    def check() -> None:
        contents = [(tmp_path / name).read_text() for name in TEXTS]
        assert set(contents) <= {"old", "new"} and (contents[-1] == "old" or set(contents) == {"new"})
        for name in TEXTS:
            (tmp_path / name).write_text("old")

    assert at_every_rename(children, check, write_several, tmp_path) == 6
    write_several(tmp_path)
    assert names(tmp_path) == sorted(TEXTS)


@pytest.mark.parametrize(("old", "can_exchange"), [(False, True), (True, False)])
def test_a_bundle_is_whole_or_absent(
    old: bool, can_exchange: bool, children: Any, tiny_bundle: Any, tmp_path: Path
) -> None:
    """A real one, with every check that opening has. Without exchanging, an old one may stand aside in between."""
    source, out = tiny_bundle().root, tmp_path / "place" / "bundle"
    if old:
        write_bundle(source, out, OLD)

    def check() -> None:
        if out.exists():
            assert Bundle.open(out, check="full").plan in (OLD, NEW)
        elif old:
            aside = folders.set_aside(out)
            assert aside is not None and not can_exchange
            assert Bundle.open(aside, check="full").plan in (OLD, NEW)

    assert at_every_rename(children, check, write_bundle, source, out, can_exchange=can_exchange) >= 2
    write_bundle(source, out)
    assert names(out.parent) == ["bundle"]
    assert Bundle.open(out, check="full").plan == NEW
