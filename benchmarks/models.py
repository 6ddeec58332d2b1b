"""Decoders that several programs compute: the same weights as a LLaVA, as a plain Llama and as a GGUF file.

Weights are made up (btp_export/dummy), of 16 bits each, so that float32, float16 and GGUF files hold the same numbers;
codes of four bits are in groups of 32 with scales of 16 bits, which are llama.cpp's Q4_0 byte for byte but for their
order. Vision towers are small: none of this is about pictures.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.findings import Wishes
from btp_export.demo import checkpoint_path
from btp_export.dummy import packed
from btp_export.dummy.checkpoints import configured, stored_type, tensor_bits, tensor_shapes
from btp_export.dummy.processor import save_processor
from btp_export.exporting import Options, export_bundle
from btp_export.model.open_model import open_model
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import Checkpoint
from graphs.files.packed_weights import QWEIGHT, SCALES
from graphs.files.safetensors_file import write_tensors
from graphs.packing import dequantise
from graphs.records.plan import PruningPlan, Stage
from graphs.records.spec import ModelSpec

Array = np.ndarray[Any, np.dtype[Any]]
LIKE = "llava-1.5-7b"  # whose configuration is changed
GROUP = 32  # of four bits: what Q4_0 has
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Width:
    """A decoder's shapes. Heads have 128 numbers, as those of LLaVA-1.5 do; V = 576, S = 675 with 64 tokens of text."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocab: int = 32064
    head: int = 128

    @property
    def text(self) -> dict[str, int]:
        """As transformers' configuration says it."""
        heads = self.hidden // self.head
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": self.head,
            "vocab_size": self.vocab,
        }  # fmt: skip


TINY = Width("hidden 64", 64, 96, 2, head=32)
NARROW = Width("hidden 2048, 6 layers", 2048, 5632, 6)
WIDE = Width("hidden 4096, 3 layers", 4096, 11008, 3)


def checkpoint(width: Width, folder: Path, *, four_bits: bool = False) -> Path:
    """A LLaVA of the width in float32, or with codes of four bits and the rest in float16."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    config, _ = configured(LIKE)
    config["text_config"] |= width.text
    config["vision_config"] |= TOWER
    shapes = tensor_shapes(config)
    kind = np.dtype(np.float16 if four_bits else np.float32)
    config["torch_dtype"] = config["text_config"]["torch_dtype"] = kind.name
    if four_bits:
        config["quantization_config"] = packed.quantization(shapes, GROUP)
        shapes = packed.packed_shapes(shapes, GROUP)
    write_tensors(folder / "model.safetensors", {name: _values(name, shapes[name], kind) for name in shapes})
    save_processor(config, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _values(name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Values that float16 holds, in the type they are stored in."""
    bits = np.concatenate(list(tensor_bits(name, shape, "float16", 0)))
    stored = stored_type(name, kind.name)
    return (bits if stored == np.uint8 else bits.view(np.float16).astype(stored, copy=False)).reshape(shape)


def demo_checkpoint() -> Path:
    """The shipped model."""
    return checkpoint_path()


def bundle(source: Path, folder: Path, *, profiles: tuple[str, ...] = ()) -> Bundle:
    """Our export in float32 without pruning."""
    if folder.is_dir():
        return Bundle.open(folder)
    model = open_model(str(source))
    options = Options(precision="float32", profiles=profiles, link="hard")
    return export_bundle(model, plan(model.spec, 1.0), folder, options)


def pruned(unpruned: Bundle, folder: Path, share: float) -> Bundle:
    """The same model with a plan that leaves this share."""
    if folder.is_dir():
        return Bundle.open(folder)
    return derive(unpruned, plan(unpruned.spec, share), folder)


def small(wishes: Wishes, part: str, profiles: tuple[str, ...] = ()) -> Iterator[tuple[str, Bundle]]:
    """The demo, in words and as bundles, with all image tokens and with 22 % of them; `quick`: a tiny model instead."""
    source, name = demo_checkpoint(), "demo"
    if wishes.quick:
        source, name = checkpoint(TINY, wishes.folder / "tiny"), TINY.name
    folder = wishes.folder / part / name
    unpruned = bundle(source, folder / "full", profiles=profiles)
    yield f"{name}, all image tokens", unpruned
    yield f"{name}, 22% of them", pruned(unpruned, folder / "pruned", 0.22)


def plan(spec: ModelSpec, share: float) -> PruningPlan:
    """As calibration finds for the demo: most of the picture goes before layer 0 by coverage, then half by attention.

    The average over the layers is `share` of the image tokens; 1 is no pruning.
    """
    grid = spec.vision.grid
    tokens, layers = grid[0] * grid[1], spec.decoder.num_layers
    stages: tuple[Stage, ...] = ()
    if share < 1:
        first = round(4 / 3 * share * tokens)
        middle = layers // 2
        second = round((share * tokens * layers - first * middle) / (layers - middle))
        stages = (
            Stage(layer=0, keep=first, importance="norm", diversity="coverage", features="centred", weights="scores"),
            Stage(layer=middle, keep=second, attention_quota=second, pool=first),
        )
    return PruningPlan(model_type=spec.model_type, num_layers=layers, image_tokens=tokens, grid=grid, stages=stages)


def llama(source: Path, folder: Path) -> Path:
    """The decoder alone in float32, as other programs' exporters take it."""
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    model = open_model(str(source))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    text["tie_word_embeddings"] = model.spec.decoder.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps({key: text[key] for key in text if key != "dtype"}))
    wide = {name.replace("language_model.", "model.", 1): array for name, array in _full_weights(model.checkpoint)}
    write_tensors(folder / "model.safetensors", wide)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, folder / file)
    return folder


def _full_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """The decoder's tensors in float32 by name, those of four bits multiplied out."""
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if not name.startswith(("language_model.", "lm_head.")) or part == SCALES:
            continue
        if part == QWEIGHT:
            scales = checkpoint[f"{module}.{SCALES}"].read()
            yield f"{module}.weight", dequantise(tensor.read(), scales, dtype=np.dtype(np.float32))
        else:
            yield name, tensor.read().astype(np.float32, copy=False)
