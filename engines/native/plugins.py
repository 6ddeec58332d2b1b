"""Registers the operators with TensorRT or TensorRT for RTX: the Python plugins, or the C++ library."""

import functools
from pathlib import Path
from typing import Any

from engines.native.kernels import Kernels
from engines.native.libraries import find, inspect
from graphs import ops
from graphs.ops.common.trt_python import Operator, creators
from graphs.records.errors import CheckError, UnavailableError


def operators() -> list[type[Operator]]:
    """What the Python plugins have to know of each operator that has a trt_python.py."""
    return [module.OPERATOR for module in ops.forms("trt_python")]


def register_python(trt: Any, kernels: Path | None = None) -> list[Any]:
    """Register the Python plugins; returns their creators, which the caller must keep as long as TensorRT uses them.

    `kernels`: the kernel library that enqueue launches; found by engines.native.libraries if None, and only when an
    engine runs. Raises CheckError if operators of these names are registered already; then none of ours is.
    """
    registry = trt.get_plugin_registry()
    _refuse_registered(registry)
    registered = creators(trt, operators(), functools.cache(lambda: Kernels(kernels)))
    for number, creator in enumerate(registered):
        if not registry.register_creator(creator, ""):
            for earlier in registered[:number]:
                registry.deregister_creator(earlier)
            raise CheckError(f"TensorRT refused the plugin {creator.name}", do="see its log above")
    return registered


def register_native(trt: Any, library: Path | None = None) -> Any:
    """Load btp_trt_dynamic into TensorRT's registry; returns the handle for `deregister_library`.

    Raises UnavailableError if the library is missing, for another machine or of another version, CheckError if
    operators of these names are registered already; nothing is registered then.
    """
    path = library if library is not None else find("btp_trt_dynamic")
    inspect("btp_trt_dynamic", path)
    registry = trt.get_plugin_registry()
    _refuse_registered(registry)
    handle = registry.load_library(str(path))
    if handle is None:
        raise UnavailableError(f"TensorRT refused {path}", "a plugin library for this TensorRT", "see its log above")
    return handle


def _refuse_registered(registry: Any) -> None:
    known = {creator.name for creator in registry.all_creators}
    for operator in operators():
        if operator.NAME in known:
            got = f"the plugin {operator.NAME} is registered already"
            raise CheckError(got, "one form of the plugins in a process", "start a new process")
