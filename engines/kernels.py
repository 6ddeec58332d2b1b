"""The CUDA kernels' C interface (libbtp_kernels) for Python: device addresses in, an error or nothing out."""

import ctypes
from collections.abc import Sequence
from math import prod
from pathlib import Path

from engines.native_library import find, open_library
from graphs.errors import CheckError, InputError
from graphs.ops.common.trt_python import Tensor

COUNTS = ("keep", "attention_quota", "diversity_quota", "pool", "boundary")
RULES = {"farthest": 0, "coverage": 1}  # kernel.h: BTP_FARTHEST, BTP_COVERAGE
SIMILARITY = {"float32": 1, "float16": 2}  # kernel.h: BTP_FLOAT32, BTP_FLOAT16
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


class _Select(ctypes.Structure):
    """kernel.h: BtpSelect."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("batch", "tokens", *COUNTS, "seeds", "similarity", "diversity_rule", "weighted")
    ]


class _Gather(ctypes.Structure):
    """kernel.h: BtpGather."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "rows", "start", "count", "kept")),
        ("row_bytes", ctypes.c_int64),
    ]


class Kernels:
    """The kernels of one library. Launches go to a stream and return at once; every refusal is raised.

    Args:
        path: the library; None takes the one that engines.native_library finds.

    Raises UnavailableError if there is none, or if it is for another machine or of another version.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else find("btp_kernels")
        self._library = open_library(self.path)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        select, gather = self._library.btp_select_tokens, self._library.btp_gather_tokens
        select.argtypes = [pointer] * 6 + [size, pointer]
        gather.argtypes = [pointer] * 5
        self._library.btp_select_tokens_workspace.restype = size
        for name in ("btp_select_tokens_problem", "btp_gather_tokens_problem", "btp_error_string"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def workspace(self, inputs: Sequence[Tensor], **attributes: int | str) -> int:
        """Bytes of workspace that select_tokens needs for these inputs."""
        return int(self._library.btp_select_tokens_workspace(ctypes.byref(_select(inputs, attributes))))

    def select_tokens(
        self, inputs: Sequence[Tensor], output: int, workspace: int, *, stream: int, **attributes: int | str
    ) -> None:
        """BtpSelectTokens. inputs: scores [B,V], similarity [B,V,V], seeds [m] (the last two optional).

        output: address of indices [B,keep] int32; workspace: address of as many bytes as workspace() says, 16-byte
        aligned; attributes: the operator's, of which diversity_rule and weighted may be missing. Raises InputError for
        sizes that break the rules, CheckError if the launch fails.
        """
        select = _select(inputs, attributes)
        self._require(self._library.btp_select_tokens_problem(ctypes.byref(select)))
        bytes_ = int(self._library.btp_select_tokens_workspace(ctypes.byref(select)))
        addresses = [tensor.address for tensor in inputs] + [None] * (3 - len(inputs))
        if select.seeds == 0:
            addresses[2] = None
        self._check(
            self._library.btp_select_tokens(ctypes.byref(select), *addresses, output, workspace, bytes_, stream)
        )

    def gather_tokens(self, inputs: Sequence[Tensor], output: int, *, stream: int, start: int, count: int) -> None:
        """BtpGatherTokens. inputs: tokens [B,S,...] and indices [B,k]; output: address of [B,S-count+k,...].

        Raises InputError for sizes that break the rules, CheckError if the launch fails.
        """
        tokens, indices = inputs
        row_bytes = prod(tokens.shape[2:]) * ITEM_BYTES[tokens.dtype]
        gather = _Gather(*tokens.shape[:2], start, count, indices.shape[1], row_bytes)
        self._require(self._library.btp_gather_tokens_problem(ctypes.byref(gather)))
        self._check(
            self._library.btp_gather_tokens(ctypes.byref(gather), tokens.address, indices.address, output, stream)
        )

    def _require(self, problem: bytes | None) -> None:
        if problem is not None:
            raise InputError(problem.decode(), do="export the graph again with settings that fit")

    def _check(self, status: int) -> None:
        if status != 0:
            text = self._library.btp_error_string(status).decode()
            raise CheckError(f"{self.path.name}: {text} (code {status})", do="see docs/native.md")


def _select(inputs: Sequence[Tensor], attributes: dict[str, int | str]) -> _Select:
    similarity = SIMILARITY[inputs[1].dtype] if len(inputs) > 1 else 0
    seeds = inputs[2].shape[0] if len(inputs) > 2 else 0
    rule = RULES[str(attributes.get("diversity_rule", "farthest"))]
    weighted = attributes.get("weighted", 0)
    return _Select(*inputs[0].shape, *(attributes[name] for name in COUNTS), seeds, similarity, rule, weighted)
