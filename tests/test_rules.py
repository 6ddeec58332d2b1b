"""Rules of the layout: imports point one way, light things stay light, nothing names the machine it was made on."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.source_files import ROOT, nodes, python_files

MAY_IMPORT = {
    "graphs": set(),
    "engines": {"graphs"},
    "calibrate": {"graphs"},
    "btp_export": {"graphs", "engines", "calibrate"},
}
# Rooms of each package from the ground up; a file outside a folder is a room of its own. A room may import those below
# its line, not those beside it or above. CONTRIBUTING.md says what is in each.
ROOMS = {
    "graphs": [
        ["dtypes"],  # a GPU machine without pydantic reads it
        ["__init__", "records"],
        ["names", "packing", "tf32"],  # they speak of plans, which are records, and raise their errors
        ["files", "pruning"],
        ["ops"],
        ["building"],
    ],
    "engines": [
        ["__init__", "targets", "native"],
        ["jetson"],
        ["runners"],
        ["cache_memory", "prompt_memory", "wiring"],
        ["joined_prefill"],
        ["chain", "tensorrt"],  # tensorrt: the files beside its rooms, which its rooms share
        ["verify", "tensorrt.prepare"],
        ["tensorrt.run"],  # holds the runner of engines: it needs a session, which the runners of graphs do not
        ["tensorrt.kit"],
        ["tensorrt.build"],
    ],
    "calibrate": [
        ["__init__", "reference"],
        ["data", "quantise"],
        ["measure"],
        ["place"],
        ["calibrate"],
        ["pareto"],
    ],
    "btp_export": [
        ["__init__"],  # the version, and names that are loaded when they are asked for: ON_REQUEST
        ["results"],
        ["extras", "bounds", "arguments"],
        ["console"],
        ["drawing", "preprocess", "spreading"],
        ["families"],
        ["demo"],
        ["dummy", "quantised"],
        ["model"],
        ["planning", "running", "exporting"],
        ["measuring", "profiling", "serving", "engine_inputs", "quantising"],
        ["report"],
        ["pipeline", "api"],  # what users import, by way of __init__
        ["commands", "api_reference"],
        ["cli"],
        ["__main__"],
    ],
}
# What a package's own __init__ gives its users is imported on request, from above it.
ON_REQUEST = {("btp_export", "btp_export.api")}
DEVICE_MODULES = {"tensorrt", "tensorrt_rtx", "pycuda", "cuda", "cupy", "polygraphy", "onnxruntime"}
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "matplotlib", "huggingface_hub", "PIL")
COMMANDS = sorted(
    path.stem for path in (ROOT / "btp_export" / "commands").glob("[a-z]*.py") if path.stem != "main"
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Top-level names of every import in the file, those inside functions and TYPE_CHECKING included."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, write the whole name"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(package)
        for name in imported(path)
        if name in MAY_IMPORT and name not in allowed
    ]
    assert python_files(package) and not wrong


def test_graphs_know_no_device() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files("graphs")
        for name in imported(path)
        if name in DEVICE_MODULES
    ]
    assert not wrong


def test_nothing_imports_the_tests() -> None:
    wrong = [str(path) for package in MAY_IMPORT for path in python_files(package) if "tests" in set(imported(path))]
    assert not wrong


LIGHT = """
import contextlib, io, json, sys

def heavy():
    return [name for name in HEAVY if name in sys.modules]

import btp_export
seen = {"import": [0, heavy(), "", ""]}
from btp_export.cli import main
for arguments in COMMANDS:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    seen[" ".join(arguments)] = [status, heavy(), out.getvalue(), err.getvalue()]
json.dump(seen, sys.stdout)
"""
REFUSED = ["plan", "nothing", "--model", "nowhere"]
LIGHT_COMMANDS = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]


@pytest.fixture(scope="module")
def light() -> dict[str, list[Any]]:
    """Status, heavy libraries loaded so far, output and errors of each, in one fresh interpreter: this one is not."""
    script = f"HEAVY = {HEAVY!r}\nCOMMANDS = {[*LIGHT_COMMANDS, REFUSED]!r}\n{LIGHT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    seen: dict[str, list[Any]] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize("command", ["import", *(" ".join(arguments) for arguments in LIGHT_COMMANDS)])
def test_light_things_load_nothing_heavy(command: str, light: dict[str, list[Any]]) -> None:
    status, heavy, output, errors = light[command]
    assert (status, heavy, errors) == (0, [], "")
    assert output or command == "import"
    assert all(len(line) <= 80 for line in output.splitlines())


def test_a_name_that_is_no_model_is_refused_before_anything_heavy_is_loaded(light: dict[str, list[Any]]) -> None:
    status, heavy, output, errors = light[" ".join(REFUSED)]
    assert (status, output) == (2, "") and set(heavy) <= {"PIL"} and "no model is called 'nowhere'" in errors


def test_packages_import_without_side_effects() -> None:
    script = "import calibrate, engines, graphs, btp_export"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def project_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_files_name_no_machine() -> None:
    """Absolute home and work folders have no place in a project that others build (tests may make some up)."""
    pattern = re.compile(rb"/(?:home|root|work|Users)/[\w.]")
    text_suffixes = {".py", ".md", ".toml", ".json", ".jsonl", ".j2", ".txt", ".csv", ".cu", ".cc", ".cpp", ".h", ""}
    wrong = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if path.suffix in text_suffixes
        and path.relative_to(ROOT).parts[0] != "tests"
        and pattern.search(path.read_bytes())
    ]
    assert not wrong


def test_no_pickles_and_no_remote_code() -> None:
    forbidden = re.compile(
        r"torch\.load\((?!.*weights_only=True)|pickle\.load|trust_remote_code=True|allow_pickle=True"
    )
    wrong = [
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in python_files(package)
        if forbidden.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


MOST_LINES, MOST_BODY = 400, 60


def lines_of_code(path: Path) -> int:
    """Without docstrings: what an interface promises may be long."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in nodes(path) if isinstance(node, documented) and node.body]
    texts = [node for node in first if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    docstrings = sum((node.end_lineno or 0) - node.lineno + 1 for node in texts)
    return len(path.read_text(encoding="utf-8").splitlines()) - docstrings


def bodies(path: Path) -> Iterator[tuple[str, int]]:
    """Functions with their lines from the docstring on: a signature with many options has no paths through it."""
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.body[0].lineno + 1


def test_files_and_functions_have_a_size_that_is_read_at_once() -> None:
    files = [path for folder in (*MAY_IMPORT, "benchmarks", "tests") for path in python_files(folder)]
    long = [path.name for path in files if lines_of_code(path) > MOST_LINES]
    deep = [f"{path.name}: {name}" for path in files for name, lines in bodies(path) if lines > MOST_BODY]
    assert (long, deep) == ([], [])


def modules() -> dict[str, Path]:
    found = {}
    for package in MAY_IMPORT:
        for path in python_files(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules of ours that a file imports, at the top, in functions or for types."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in whole}
    return found & known.keys()


def import_graph() -> dict[str, set[str]]:
    known = modules()
    edges = {name: imports_of(path, known) - {name} for name, path in known.items()}
    return {name: {to for to in targets if (name, to) not in ON_REQUEST} for name, targets in edges.items()}


def room_of(path: Path) -> str:
    """The folder below its package (two of them in engines/tensorrt), or the file where there is none."""
    _, *folders, name = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(folders[: 2 if folders[:1] == ["tensorrt"] else 1]) or name


def test_rooms_import_only_what_is_below_them() -> None:
    rooms = {name: (name.split(".")[0], room_of(path)) for name, path in modules().items()}
    floors = {(package, room): n for package, lines in ROOMS.items() for n, line in enumerate(lines) for room in line}
    assert floors.keys() == set(rooms.values()), "ROOMS says where every room stands, and no others"
    wrong = [
        f"{name} imports {target}"
        for name, targets in import_graph().items()
        for target in sorted(targets)
        if rooms[name] != rooms[target] and rooms[name][0] == rooms[target][0]
        if floors[rooms[target]] >= floors[rooms[name]]
    ]
    assert not wrong


def test_no_circle_of_files() -> None:
    """A file that is imported again from what it imports cannot be read alone."""
    edges, state, circles = import_graph(), dict[str, str](), []

    def visit(name: str, way: list[str]) -> None:
        if state.get(name) == "done":
            return
        if name in way:
            circles.append(" -> ".join([*way[way.index(name) :], name]))
            return
        for target in sorted(edges[name]):
            visit(target, [*way, name])
        state[name] = "done"

    for name in sorted(edges):
        visit(name, [])
    assert not circles


def test_contributing_lists_every_room_in_this_order() -> None:
    """The tree of CONTRIBUTING.md goes from the top down, so that a room imports only what is listed below it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package, levels in ROOMS.items():
        [tree] = re.findall(rf"^{package}/\n((?:  .*\n)+)", text, re.MULTILINE)
        listed = re.findall(r"^  ([\w/]+?)(?:\.py|/) +\S", tree, re.MULTILINE)
        level = {room.replace(".", "/"): number for number, rooms in enumerate(levels) for room in rooms}
        assert sorted(listed) == sorted(level.keys() - {"__init__"}), package
        assert [level[room] for room in listed] == sorted((level[room] for room in listed), reverse=True), package


def test_every_file_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest passes over folders by their names: one called `build` was left out for long."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert Path("tests/engines/tensorrt/build") in folders
    assert not [folder for folder in folders for part in folder.parts for rule in passed_over if fnmatch(part, rule)]
