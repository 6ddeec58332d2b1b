"""What is written in one place only: names, types, the unpruned plan, renames, reading and opening files."""

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.source_files import ROOT, nodes, python_files
from tests.test_rules import MAY_IMPORT

NAME_STEM = re.compile(r"(?:^|past_|\W)(prefill|select|key|value|length|indices|last|layer|segment|stage)_$|^past_$")
NAME_PATTERN = re.compile(r"(prefill|select|key|value|length|indices|last|layer|segment|stage)_\\d")


def said_outside(homes: Sequence[Path], rule: Callable[[Path], Iterator[str]]) -> list[str]:
    """What a rule finds in all our files but those where it is at home, each after the file's name."""
    return [
        f"{path.relative_to(ROOT)}:{said}"
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in python_files(folder)
        if path not in homes
        for said in rule(path)
    ]


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
    assert not said_outside([ROOT / "graphs" / "names.py"], name_makers)
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
    assert not said_outside([ROOT / "graphs" / "dtypes.py"], type_tables)


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
    assert not said_outside(homes, renames_and_links)
    assert all(len(list(renames_and_links(home))) >= 3 for home in homes), "the rule finds nothing where it is done"


# Files that the project or the system has written itself: sources, logs, notes beside what was compiled, /proc.
OWN_FILES = {
    "btp_export/commands/_model_names.py",
    "btp_export/api_reference.py",
    "btp_export/report/machine.py",
    "btp_export/serving/page.py",
    "btp_export/serving/preparing_process.py",
    "engines/native/compile_cpu.py",
    "engines/native/libraries.py",
    "engines/native/wheels.py",
    "engines/runners/packed_files.py",
    "engines/tensorrt/build/builder.py",
    "engines/tensorrt/build/worker.py",
    "engines/tensorrt/trtexec.py",
    "graphs/files/memory.py",
}
# The second: what its own parent says. The third: a body that parse_json has read.
VALIDATES = {
    "graphs/records/record.py",
    "engines/tensorrt/build/child.py",
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
