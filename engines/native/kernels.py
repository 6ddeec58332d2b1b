"""The CUDA kernels' C interface (libbtp_kernels) for Python: device addresses in, an error or nothing out.

What differs from operator to operator is in its folder (graphs/ops/<operator>/kernel_python.py): the structure of its
settings and the pointers it takes.
"""

import ctypes
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.native.libraries import find, open_library
from graphs import ops
from graphs.ops.common.trt_python import Tensor
from graphs.records.errors import CheckError, InputError, UnavailableError


class Kernels:
    """The kernels of one library, one method an operator, named as its folder. Every refusal is raised.

    `kernels.select_tokens(inputs, output, workspace, stream=0, keep=288, ...)` puts the operator's launches on the
    stream and returns at once. inputs: the node's, without what is missing at their end; output: address of the output;
    workspace: address of as many bytes as workspace() says, 16-byte aligned, for the operators that want one; the
    attributes by name. Raises InputError for sizes that break the rules, CheckError if the launch fails.

    Args:
        path: the library; None takes the one that engines.native.libraries finds.

    Raises UnavailableError if there is none, or if it is for another machine or of another version.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else find("btp_kernels")
        self._library = open_library(self.path)

    def workspace(self, operator: str, inputs: Sequence[Tensor], **attributes: int | str) -> int:
        """Bytes of workspace that the operator needs for these inputs."""
        interface = _interface(operator)
        return self._workspace(operator, interface.settings(inputs, attributes)) if interface.WORKSPACE else 0

    def __getattr__(self, operator: str) -> Callable[..., None]:
        if operator not in ops.names():
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {operator!r}")
        interface = _interface(operator)

        def launch(
            inputs: Sequence[Tensor], output: int, workspace: int = 0, *, stream: int, **attributes: int | str
        ) -> None:
            settings = interface.settings(inputs, attributes)
            problem = self._function(f"btp_{operator}_problem", ctypes.c_char_p)(ctypes.byref(settings))
            if problem is not None:
                raise InputError(problem.decode(), do="export the graph again with settings that fit")
            room = [workspace, self._workspace(operator, settings)] if interface.WORKSPACE else []
            function = self._function(f"btp_{operator}")
            pointer = ctypes.c_void_p
            room_types = [pointer, ctypes.c_size_t] if interface.WORKSPACE else []
            function.argtypes = [pointer, *[pointer] * interface.INPUTS, pointer, *room_types, pointer]
            status = function(ctypes.byref(settings), *interface.pointers(inputs), output, *room, stream)
            if status != 0:
                text = self._function("btp_error_string", ctypes.c_char_p)(status).decode()
                raise CheckError(f"{self.path.name}: {text} (code {status})", do="see docs/native.md")

        return launch

    def _workspace(self, operator: str, settings: ctypes.Structure) -> int:
        return int(self._function(f"btp_{operator}_workspace", ctypes.c_size_t)(ctypes.byref(settings)))

    def _function(self, name: str, result: Any = ctypes.c_int32) -> Any:
        """A function of the library, which returns that type."""
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            got = f"{self.path} has no function {name}"
            raise UnavailableError(got, "a library of these operators", "build it again, see docs/native.md") from error
        function.restype = result
        return function


def _interface(operator: str) -> ModuleType:
    return import_module(f"graphs.ops.{operator}.kernel_python")
