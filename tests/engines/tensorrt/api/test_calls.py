"""The calls we make exist in TensorRT 10.3, 10.16 and 11.1, and the stand-in for its module offers no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engines.native import builds
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.api.calls import ASKED_FOR, CALLS, CLASSES, VERSIONS, listed, read, version_of
from tests.engines.tensorrt.run import host_tensorrt

ROOT = Path(__file__).parents[4]
SOURCES = [
    *(ROOT / "engines" / "tensorrt").rglob("*.py"),
    ROOT / "engines" / "native" / "plugins.py",
    *(ROOT / "graphs" / "ops").rglob("trt_python.py"),
]
OURS = {"__version__", "__init__", "get_plugin_registry"}  # of every Python module, and the one function


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_is_declared(version: str) -> None:
    known = read(version)
    assert known.keys() == CALLS.keys()
    for name, text in known.items():
        usable = [one for one in text.split("; ") if one != "-" and not one.startswith("deprecated")]
        assert usable or name in ASKED_FOR, f"TensorRT {version} has no {name}: {text}"


def test_versions_agree_where_the_runner_calls() -> None:
    """Arguments too: what is passed suits all versions."""
    for name in CALLS:
        if name.startswith(("IExecutionContext.", "INetworkDefinition.", "IProgressMonitor.", "ILogger.")):
            assert len({re.sub(r"AsciiChar|char", "char", read(version)[name]) for version in VERSIONS}) == 1, name


def names_used() -> Iterator[str]:
    """What the sources ask of TensorRT's module: `trt.DataType`, `trt.ILogger.Severity`."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            whole = ([node.id] if isinstance(node, ast.Name) else []) + parts[::-1]
            for place, part in enumerate(whole[:-1]):
                if part == "trt" or whole[max(place - 1, 0) : place + 1] == ["library", "module"]:
                    yield ".".join(whole[place + 1 :])


def test_nothing_else_is_asked_of_the_module() -> None:
    classes = {name.split(".")[0] for name in CALLS} | CLASSES | OURS
    used = {name for name in names_used() if name[0].isupper() or name in OURS}
    assert len(used) > 15
    for name in used:
        first, *rest = name.split(".")
        assert first in classes, f"{name} is in no list: tests/engines/tensorrt/api/calls.py"
        if rest and rest[-1].isupper() and rest[-1] != "ATTENTION_INPUT":
            assert name in CALLS, f"{name} is in no list"


def test_the_stand_in_offers_no_other_calls() -> None:
    module = host_tensorrt.module(HostCuda())
    classes: dict[str, Any] = {
        "Runtime": module.Runtime, "ICudaEngine": host_tensorrt.Engine, "ILogger": host_tensorrt.ILogger,
        "IExecutionContext": host_tensorrt.Context, "EngineInspector": host_tensorrt.Inspector,
    }  # fmt: skip
    for name, made in classes.items():
        public = {member for member, value in vars(made).items() if not member.startswith("_") and value is not None}
        methods = {member for member in public if member[0].islower()}
        assert methods <= {call.split(".")[1] for call in CALLS if call.startswith(f"{name}.")}, name
    registry = {name for name in vars(module.get_plugin_registry()) if not name.startswith("_")}
    assert registry <= {call.split(".")[1] for call in CALLS if call.startswith("IPluginRegistry.")}
    assert isinstance(module, SimpleNamespace)


def test_the_lists_are_those_of_the_headers() -> None:
    """Where TENSORRT_INCLUDE_DIR names headers of these versions."""
    folders = {version_of(folder): folder for folder in builds.tensorrt_headers()}
    there = [version for version in VERSIONS if version in folders]
    if not there:
        pytest.skip("TENSORRT_INCLUDE_DIR names no headers of 10.3, 10.16 or 11.1")
    for version in there:
        lines = listed(folders[version]).splitlines()
        assert {name: text for name, _, text in (line.partition(": ") for line in lines)} == read(version)
