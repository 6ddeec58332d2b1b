"""llama.cpp, by way of its Python package, on a GGUF file (benchmarks/gguf_file.py)."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import Array, Given, Opened, Program


class LlamaCpp:
    """The C interface itself: a batch of tokens in, the logits of the last one out."""

    def __init__(self, given: Given) -> None:
        import llama_cpp as lib

        self._lib = lib
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(given.folder.encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not open {given.folder}")
        (self._ids,) = given.ids
        settings = lib.llama_context_default_params()
        settings.n_ctx = len(self._ids) + given.room
        settings.n_batch = settings.n_ubatch = max(len(self._ids), 512)
        settings.n_threads = settings.n_threads_batch = given.threads
        settings.type_k = settings.type_v = given.more.get("cache_type", lib.GGML_TYPE_F32)
        self._context: Any = lib.llama_init_from_model(self._model, settings)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def prefill(self) -> Array:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._run(self._ids)

    def step(self, ids: Sequence[int]) -> Array:
        return self._run(ids)

    def _run(self, ids: Sequence[int]) -> Array:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        row = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (self._vocab,))
        return row[None]


def _open(given: Given) -> Opened:
    return LlamaCpp(given)


PROGRAM = Program("llama.cpp", "llama_cpp", _open)
