"""onnxruntime-genai on a model that its own builder made (see `build`)."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers import Array, Given, Opened, Program


def build(llama: Path, out: Path, *, four_bits: bool = False) -> Path:
    """The builder's model for CPUs: only the last token goes through the output projection, as in every other program.

    In four bits it rounds the weights itself, in groups of 32, multiplies with rows of int8, and leaves the output
    projection as it is, as ours does.
    """
    if not (out / "genai_config.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        rounding = ["accuracy_level=4", "block_size=32", "nodes_to_exclude=/lm_head/MatMul"]
        precision = ["int4", *rounding] if four_bits else ["fp32"]
        arguments = ["-i", str(llama), "-o", str(out), "-p", precision[0], "-e", "cpu", "-c", str(out / "cache")]
        arguments += ["--extra_options", "prune_lm_head=true", *precision[1:]]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
        if done.returncode:
            raise RuntimeError(f"onnxruntime-genai's builder: {done.stderr[-300:]}")
    return out


def _set_threads(folder: Path, threads: int) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config), encoding="utf-8")


class Genai:
    """Tokens are appended and never drawn, so that all programs read the same."""

    def __init__(self, given: Given) -> None:
        import onnxruntime_genai as og

        _set_threads(Path(given.folder), given.threads)
        self._model = og.Model(given.folder)
        self._ids = np.array(given.ids, np.int32)
        self._params = og.GeneratorParams(self._model)
        self._params.set_search_options(
            max_length=self._ids.shape[1] + given.room, batch_size=len(self._ids), do_sample=False
        )
        self._generator = None

    def prefill(self) -> Array:
        import onnxruntime_genai as og

        self._generator = og.Generator(self._model, self._params)
        return self._append(self._ids)

    def step(self, ids: Sequence[int]) -> Array:
        return self._append(np.array(ids, np.int32)[:, None])

    def _append(self, ids: Array) -> Array:
        self._generator.append_tokens(ids)
        logits: Array = self._generator.get_logits()[:, -1]
        return logits


def _open(given: Given) -> Opened:
    return Genai(given)


PROGRAM = Program("onnxruntime-genai", "onnxruntime_genai", _open)
