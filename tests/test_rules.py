"""Rules of the layout: imports point one way, light things stay light, nothing names the machine it was made on."""

import ast
import functools
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
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
        ["cache_memory"],
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
        ["extras"],
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


@functools.cache
def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """The syntax tree of a file, flat; every rule reads all files."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


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


NAME_STEM = re.compile(r"(?:^|past_|\W)(prefill|select|key|value|length|indices|last|layer|segment|stage)_$|^past_$")
NAME_PATTERN = re.compile(r"(prefill|select|key|value|length|indices|last|layer|segment|stage)_\\d")


def name_makers(path: Path) -> Iterator[str]:
    """Where a file makes the name of a graph or a tensor itself, or takes one apart: graphs/names.py is for that."""
    for node in nodes(path):
        match node:
            case ast.JoinedStr(values=parts):
                for text, value in itertools.pairwise(parts):
                    written = str(text.value) if isinstance(text, ast.Constant) else ""
                    if NAME_STEM.search(written) and isinstance(value, ast.FormattedValue):
                        yield f"{node.lineno}: makes {written}<number>"
            case ast.Call(func=ast.Attribute(attr="partition" | "rpartition" | "split" | "rsplit"), args=[first, *_]):
                if isinstance(first, ast.Constant) and first.value == "_":
                    yield f"{node.lineno}: takes a name apart at _"
            case ast.Constant(value=str() as text) if NAME_PATTERN.search(text):
                yield f"{node.lineno}: a pattern of names"


def test_names_are_made_and_taken_apart_in_one_place() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in python_files(folder)
        if path != ROOT / "graphs" / "names.py"
        for said in name_makers(path)
    ]
    assert not wrong
    assert len(list(name_makers(ROOT / "graphs" / "names.py"))) >= 9, "the rule finds nothing where names are made"


FOREIGN_TYPES = {"F16", "F32", "BF16", "HALF", "FLOAT", "FLOAT16", "BFLOAT16", "tensor(float)", "tensor(float16)"}
OWN_TYPES = {"float16", "float32", "bfloat16"}


def type_tables(path: Path) -> Iterator[str]:
    """Where a file has a table of element types of its own, or looks one up in torch: graphs/dtypes.py is for that."""
    for node in nodes(path):
        match node:
            case ast.Dict(keys=keys, values=values):
                names = {text for entry in (*keys, *values) if entry for text in type_words(entry)}
                if len(names) > 1 or gives_bytes(node):
                    yield f"{node.lineno}: a table of element types"
            case ast.Call(func=ast.Name("getattr"), args=[ast.Name("torch"), *_]):
                yield f"{node.lineno}: looks a type up in torch"
            case ast.Import(names=[ast.alias("ml_dtypes")]):
                yield f"{node.lineno}: imports ml_dtypes"


def gives_bytes(table: ast.Dict) -> bool:
    pairs = zip(table.keys, table.values, strict=True)
    entries = [(k.value, v.value) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)]
    return len(entries) > 1 and ("float32", 4) in entries


def type_words(node: ast.expr) -> Iterator[str]:
    """Names of element types in an entry: a foreign name as text, or an attribute such as np.float16."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and part.value in FOREIGN_TYPES:
            yield str(part.value)
        elif isinstance(part, ast.Attribute) and part.attr in FOREIGN_TYPES | OWN_TYPES:
            yield part.attr


def test_element_types_have_one_table() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in python_files(folder)
        if path != ROOT / "graphs" / "dtypes.py"
        for said in type_tables(path)
    ]
    assert not wrong


def test_the_plan_without_stages_has_one_spelling() -> None:
    """Others would keep settings that only stages read, and so have other digests for the same graphs."""
    pattern = re.compile(r"""["']?stages["']?[:=] ?\(\)(?! *$)|\.plan\(\(\)\)""")
    homes = [ROOT / "graphs" / "records" / "plan.py", ROOT / "calibrate" / "place" / "counts.py"]
    wrong = [
        str(path.relative_to(ROOT))
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in python_files(folder)
        if path not in homes and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


def renames_and_links(path: Path) -> Iterator[str]:
    """Where a file is renamed, replaced or hard-linked; str.replace and dataclasses.replace take more than a place."""
    for node in nodes(path):
        match node:
            case ast.Call(func=ast.Attribute(ast.Name("os"), "replace" | "rename" | "renames" | "link")):
                yield f"{node.lineno}: os"
            case ast.Call(func=ast.Attribute(ast.Name("shutil"), "move")):
                yield f"{node.lineno}: shutil.move"
            case ast.Call(func=ast.Attribute(attr="replace" | "rename" | "hardlink_to"), args=[_], keywords=[]):
                yield f"{node.lineno}: {node.func.attr}"


def test_files_are_put_in_their_place_by_two_modules() -> None:
    homes = [ROOT / "graphs" / "files" / name for name in ("atomic.py", "folders.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in python_files(folder)
        if path not in homes
        for said in renames_and_links(path)
    ]
    assert not wrong
    assert all(len(list(renames_and_links(home))) >= 3 for home in homes), "the rule finds nothing where it is done"


# Files that the project or the system has written itself: logs, notes beside what was compiled, /proc, our own page.
OWN_FILES = {
    "btp_export/api_reference.py",
    "btp_export/report/machine.py",
    "btp_export/serving/page.py",
    "btp_export/serving/preparing.py",
    "engines/native/compile_ort.py",
    "engines/native/libraries.py",
    "engines/runners/packed_files.py",
    "engines/tensorrt/build/builder.py",
    "engines/tensorrt/build/worker.py",
    "engines/tensorrt/trtexec.py",
    "graphs/files/memory.py",
}
# The second: what its own parent says. The third: a body that parse_json has read.
VALIDATES = {
    "graphs/records/record.py",
    "engines/tensorrt/build/worker.py",
    "btp_export/serving/schemas.py",
}


def readings(path: Path) -> Iterator[str]:
    """Where a file's contents, or JSON, is read without the limits of graphs/records/reading.py."""
    name = path.relative_to(ROOT).as_posix()
    for node in nodes(path):
        match node:
            case ast.Attribute(ast.Name("json"), "load" | "loads" | "JSONDecoder"):
                yield f"{node.lineno}: json.{node.attr}"
            case ast.ImportFrom(module="json"):
                yield f"{node.lineno}: from json"
            case ast.Attribute(attr="model_validate_json") if name not in VALIDATES:
                yield f"{node.lineno}: {node.attr}"
            case ast.Attribute(attr="read_text" | "read_bytes") if name not in OWN_FILES:
                yield f"{node.lineno}: {node.attr}"


def test_what_others_wrote_is_read_in_one_place() -> None:
    home = ROOT / "graphs" / "records" / "reading.py"
    wrong = [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in MAY_IMPORT
        for path in python_files(folder)
        if path != home
        for said in readings(path)
    ]
    assert not wrong
    assert list(readings(home)), "the rule finds nothing where it is done"
    assert all((ROOT / name).is_file() for name in OWN_FILES | VALIDATES)


def graph_openings(path: Path) -> Iterator[str]:
    """Where an ONNX file is parsed: what it raises then has some ten types."""
    for node in nodes(path):
        match node:
            case ast.Attribute(ast.Name("onnx" | "ir"), "load" | "load_model" | "load_model_from_string"):
                yield f"{node.lineno}: {node.attr}"
            case ast.Attribute(attr="ParseFromString" | "FromString" | "InferenceSession"):
                yield f"{node.lineno}: {node.attr}"
            case ast.ImportFrom(module="onnx" | "onnx_ir") if any(name.name.startswith("load") for name in node.names):
                yield f"{node.lineno}: from {node.module}"


def test_graphs_are_opened_in_one_place() -> None:
    homes = [ROOT / "graphs" / "files" / "onnx_file.py", ROOT / "engines" / "runners" / "onnxruntime.py"]
    packing = ROOT / "engines" / "runners" / "packed_files.py"  # runs a model that it has made itself
    wrong = [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in MAY_IMPORT
        for path in python_files(folder)
        if path not in (*homes, packing)
        for said in graph_openings(path)
    ]
    assert not wrong
    assert all(list(graph_openings(home)) for home in homes), "the rule finds nothing where it is done"


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
