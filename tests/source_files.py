"""The project's own source files and their syntax trees, for the tests that hold rules."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]


@functools.cache
def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """The syntax tree of a file, flat; every rule reads all files."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
