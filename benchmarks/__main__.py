"""All that this machine can measure, in one table with the limit beside each number.

    python -m benchmarks [--only NAME[:PART]] [--quick] [--out FILE] [--write] [--threads N] [--folder DIR]

Benchmarks are the modules of this folder that have a function `benchmark`; what one cannot run here is a row that
says why. The others are programs of their own (python -m benchmarks.NAME), named below the table. --out writes machine,
versions, load and all rows as JSON.
"""

import argparse
import ast
import importlib
import json
import os
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.findings import NotHere, Row, Wishes, document, markdown, skipped
from benchmarks.machine import Machine, this_machine
from benchmarks.pages import put_between_marks
from graphs.files.atomic import write_text
from graphs.files.cache_folder import cache_folder
from graphs.files.cores import available_cores
from graphs.records.errors import BtpError

HERE = Path(__file__).parent
ENTRY = "benchmark"  # the function that makes a module a benchmark of this program
FORMAT = "btp-benchmarks/1"
RESULTS = HERE / "results" / "benchmarks.json"
PAGE = HERE.parent / "docs" / "performance.md"


def programs() -> dict[str, bool]:
    """Every module here that can be run, by name, and whether it is a benchmark of this program. None is imported."""
    found = {}
    files = {path.stem: path for path in HERE.glob("*.py")} | {
        path.parent.name: path for path in HERE.glob("*/__main__.py")
    }
    for name, path in sorted(files.items()):
        functions = {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        if path != Path(__file__) and functions & {ENTRY, "main"}:
            found[name] = ENTRY in functions
    return found


def measure(names: Sequence[str], wishes: Wishes) -> Iterator[tuple[str, Row]]:
    """The rows of these benchmarks, one after another. One that breaks is a row too, and the others still run."""
    for wanted in names:
        name, _, part = wanted.partition(":")
        wishes.note(wanted)
        try:
            for row in importlib.import_module(f"benchmarks.{name}").benchmark(replace(wishes, part=part)):
                wishes.note(f"  {row.what}: {row.missing or f'{row.value:.3g} {row.unit}, {row.detail}'}")
                yield name, replace(row, rounds=wishes.rounds, load=os.getloadavg()[0])
        except (NotHere, BtpError, ImportError) as error:
            yield name, skipped("all", error)
        except Exception as error:
            wishes.note(traceback.format_exc())
            yield name, skipped("the rest, which broke", error)


def beside(kept: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded, with new rows in place of those of the same name, or behind the last of their benchmark.

    Machine and settings are the recorded ones (`difference` says whether they are the same), versions those of both.
    """
    new = {(row["benchmark"], row["what"]): dict(row) for row in found["rows"]}
    merged = [new.pop((row["benchmark"], row["what"]), dict(row)) for row in kept["rows"]]
    for (name, _), row in new.items():
        places = [place for place, other in enumerate(merged) if other["benchmark"] == name]
        merged.insert(places[-1] + 1 if places else len(merged), row)
    versions = kept["machine"]["versions"] | found["machine"]["versions"]
    return {**kept, "machine": kept["machine"] | {"versions": versions}, "rows": merged}


def difference(kept: Mapping[str, Any], machine: Machine, threads: int) -> str:
    """In what the recorded rows were measured otherwise than here, so that rows of both are no one table; "" if not."""
    before, now = kept["machine"], asdict(machine)
    unlike = [name for name in ("processor", "cores") if before[name] != now[name]]
    common = before["versions"].keys() & now["versions"].keys()
    unlike += sorted(name for name in common if before["versions"][name] != now["versions"][name])
    unlike += ["threads"] if kept["settings"]["threads"] != threads else []
    return ", ".join(unlike)


def recorded(machine: Machine, found: Sequence[tuple[str, Row]], wishes: Wishes) -> dict[str, Any]:
    """The same for JSON."""
    settings = {"threads": wishes.threads, "quick": wishes.quick}
    return {"format": FORMAT, "machine": asdict(machine), "settings": settings, "rows": document(found)}


def render(document: Mapping[str, Any]) -> str:
    """Where, with what and how it was measured, and the table."""
    found = [(row.pop("benchmark"), row) for row in map(dict, document["rows"])]
    rows = [(name, Row(**{key: row[key] for key in row if key != "holds"})) for name, row in found]
    threads = document["settings"]["threads"]
    return f"{Machine(**document['machine']).sentence()}; {threads} threads each.\n\n{markdown(rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    everything = programs()
    mine = [name for name, is_mine in everything.items() if is_mine]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        metavar="NAME[:PART]",
        action="append",
        help="this one, of its models only those with PART in their name; repeat for several",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds, to try the programs")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--write",
        action="store_true",
        help="record the results, and show them in docs/performance.md; with --only beside what is recorded of others",
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="of every program; all cores")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="turns of each program; medians count (of tokens, as many as caches have room for)",
    )
    parser.add_argument("--folder", type=Path, help="where models are made and stay; a temporary one if left out")
    given = parser.parse_args(arguments)
    for name in given.only or ():
        if name.partition(":")[0] not in mine:
            parser.error(f"no benchmark {name}: one of {', '.join(mine)}")
    if given.quick and given.write:
        parser.error("--quick --write: wanted one of them, as quick runs measure nothing")
    if given.rounds < 1 or given.threads < 1:
        parser.error(f"--rounds {given.rounds}, --threads {given.threads}: wanted 1 or more")
    kept = json.loads(RESULTS.read_text("utf-8")) if given.write and given.only else None
    if kept is not None and (unlike := difference(kept, this_machine(), given.threads)):
        parser.error(f"--only with --write: what is recorded has another {unlike}; leave --only out, or take --out")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="benchmarks-") as scratch:
        rounds = min(given.rounds, 2) if given.quick else given.rounds
        wishes = Wishes(given.folder or Path(scratch), given.threads, rounds, given.quick)
        found: list[tuple[str, Row]] = []
        for one in measure(given.only or mine, wishes):
            found.append(one)  # written as they come: a run that is stopped leaves what it found
            document = recorded(this_machine(), found, wishes)
            whole = document if kept is None else beside(kept, document)
            for path, one in [(given.out, document)] * (given.out is not None) + [(RESULTS, whole)] * given.write:
                write_text(path, json.dumps(one, indent=1) + "\n")
    if given.write:
        put_between_marks(PAGE, render(whole))
    print(render(document))
    print(f"\nby themselves: {', '.join(name for name in everything if name not in mine)}")


if __name__ == "__main__":
    main()
