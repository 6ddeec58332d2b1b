"""Small random LLaVA models of transformers' real classes, saved as checkpoints, for the graph tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from btp_export.families import family_for
from graphs.building.decoder_graphs import BuiltGraph, serialize
from graphs.files.checkpoint import Checkpoint, open_checkpoint
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

PREFIX, GRID, TEXT, NEW = 3, (4, 4), 6, 4
LAYERS, VOCAB = 5, 40

COMMON: dict[str, Any] = {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 512}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 2},
    "llama-bias-tied": {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral-gqa": {
        "model_type": "mistral",
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "gelu",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2-gqa": {
        "model_type": "qwen2",
        "hidden_size": 512,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


@dataclass(frozen=True)
class Sample:
    """One model: transformers' module (eval, float32), its checkpoint folder as read by us, and its spec."""

    module: LlavaForConditionalGeneration
    checkpoint: Checkpoint
    spec: ModelSpec

    def profile(self, batch: int = 1) -> ShapeProfile:
        family = family_for(self.checkpoint.config)
        return family.profile(self.spec, batch=batch, image_size=None, text_tokens=TEXT, new_tokens=NEW)

    def plan(self, *stages: Stage, **settings: Any) -> PruningPlan:
        return PruningPlan(model_type="llava", num_layers=LAYERS, image_tokens=16, grid=GRID, stages=stages, **settings)


def random_llava(decoder: str) -> LlavaForConditionalGeneration:
    """Random weights with biases and norms that differ from 0 and 1, so that a forgotten one shows."""
    fields = dict(DECODERS[decoder])
    text = CONFIG_MAPPING[fields.pop("model_type")](**COMMON, **fields)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        elif name.endswith("bias") or parameter.dim() == 1:
            parameter.copy_(0.2 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


@functools.cache
def _saved(decoder: str, folder: Path) -> Sample:
    model = random_llava(decoder)
    model.save_pretrained(folder)
    (folder / "btp.json").write_text(f'{{"prefix_tokens": {PREFIX}}}')
    family = family_for({"model_type": "llava"})
    checkpoint = open_checkpoint(folder, family.renames)
    return Sample(model, checkpoint, family.spec(checkpoint, decoder))


def sample_model(decoder: str, root: Path) -> Sample:
    """The model of that name, made once below `root`."""
    return _saved(decoder, root / decoder)


def write_graphs(graphs: list[BuiltGraph], checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    """Put the graphs in a folder with the checkpoint's shards in weights/, as in a bundle."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    for file, name in zip(checkpoint.files, checkpoint.shards, strict=True):
        (weights / name).write_bytes(file.read_bytes())
    paths = {graph.name: folder / f"{graph.name}.onnx" for graph in graphs}
    for graph in graphs:
        paths[graph.name].write_bytes(serialize(graph))
    return paths


class Runner:
    """ONNX Runtime sessions of a folder of graphs, by name; single thread."""

    def __init__(self, paths: dict[str, Path]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for name, path in paths.items()
        }

    def __call__(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        session = self.sessions[name]
        wanted = {value.name for value in session.get_inputs()}
        assert wanted == set(inputs), wanted ^ set(inputs)
        feeds = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))
