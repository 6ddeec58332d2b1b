"""The signatures in docs/api.md, from the functions themselves:  python -m btp_export.api_reference."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import btp_export
from graphs.dtypes import Precision
from graphs.files.atomic import Link
from graphs.records.plan import Importance, SpatialMetric

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MARKS = ("<!-- signatures: begin -->", "<!-- signatures: end -->")
FUNCTIONS = ("load", "export", "calibrate", "verify", "evaluate", "bench", "build")
# What a user calls types of ours; choices are written out.
PUBLIC = {"PruningPlan": "Plan", "PathLike": "Path | str"}
CHOICES = {"Precision": Precision, "Link": Link, "Importance": Importance, "SpatialMetric": SpatialMetric}


def page(text: str) -> str:
    """The page with its signatures as the functions have them now."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    sections = [_section(name, getattr(btp_export, name)) for name in FUNCTIONS]
    return "\n\n".join([f"{before}{MARKS[0]}", *sections, f"{MARKS[1]}{after}"])


def _section(name: str, function: Callable[..., Any]) -> str:
    summary, arguments = _documented(inspect.getdoc(function) or "")
    lines = [f"### {name}", "", "```text", *_signature(name, function), "```", "", summary]
    return "\n".join([*lines, "", *arguments] if arguments else lines)


def _signature(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """One line a parameter."""
    signature = inspect.signature(function)
    yield f"btp_export.{name}("
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "    *,"
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        yield f"    {parameter.name}: {_type(parameter.annotation)}{default},"
    yield f") -> {_type(signature.return_annotation)}"


def _value(default: object) -> str:
    return "..." if callable(default) else repr(default).replace("'", '"')


def _type(annotation: str) -> str:
    names = PUBLIC | {name: _choices(get_args(choices)) for name, choices in CHOICES.items()}
    annotation = re.sub(r"Literal\[(.*?)\]", lambda match: _choices(ast.literal_eval(f"({match[1]},)")), annotation)
    return re.sub(r"(?<![\w\"-])\w+(?![\w\"-])", lambda match: names.get(match[0], match[0]), annotation)


def _choices(values: tuple[str, ...]) -> str:
    return " | ".join(f'"{value}"' for value in values)


def _documented(text: str) -> tuple[str, list[str]]:
    """The docstring's prose, and its arguments as a list."""
    prose, _, rest = text.partition("\nArgs:\n")
    # A line that is indented further goes on with the one before.
    arguments = re.sub(r"\n {5,}", " ", rest.rstrip()).replace("    ", "").splitlines()
    return prose.strip(), [f"- `{name}`: {words}" for name, _, words in (line.partition(": ") for line in arguments)]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
