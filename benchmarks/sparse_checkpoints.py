"""Checkpoints of real shapes whose decoder is a hole in the file: it takes no disk (benchmarks/export_cost.py)."""

import json
from pathlib import Path


def sparse_checkpoint(folder: Path, model: str, layers: int | None) -> None:
    """The model's shapes and processor; the decoder's weights are zeros that take no space.

    The image side has random values: equal tensors would be stored once in the vision graph.
    """
    import numpy as np

    from btp_export.dummy.checkpoints import configured, in_shards, tensor_bits, tensor_shapes
    from btp_export.dummy.processor import save_processor
    from graphs import dtypes
    from graphs.files.safetensors_file import header_bytes, tensor_offsets

    config, _ = configured(model, layers=layers)
    dtype = dtypes.numpy_of(config["torch_dtype"])
    weight_map: dict[str, str] = {}
    for name, shapes in in_shards(tensor_shapes(config), dtype).items():
        arrays = {tensor: np.broadcast_to(np.zeros((), dtype), shape) for tensor, shape in shapes.items()}
        header = header_bytes(arrays)
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(array.nbytes for array in arrays.values()))
            offsets = tensor_offsets(arrays)
            for tensor in (tensor for tensor in shapes if not tensor.startswith(("model.language_model.", "lm_head."))):
                stream.seek(offsets[tensor])
                for piece in tensor_bits(tensor, shapes[tensor], config["torch_dtype"], 0):
                    stream.write(piece.data)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_processor(config, folder)


def decoder_alone(folder: Path, model: str, layers: int, *, weights: bool) -> None:
    """A plain Llama-like checkpoint of the decoder, as the other exporters take it; sparse."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from btp_export.dummy.checkpoints import configured
    from btp_export.dummy.processor import build_tokenizer
    from graphs.files.safetensors_file import header_bytes

    config, _ = configured(model, layers=layers)
    text = dict(config["text_config"])
    if text["model_type"] == "qwen2_5_vl_text":  # the same decoder with one position a token
        text |= {"model_type": "qwen2", "rope_scaling": None}
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    document = text | {
        "architectures": [names[text["model_type"]]],
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    build_tokenizer(config).save_pretrained(folder)
    if not weights:
        return
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(CONFIG_MAPPING[text["model_type"]].from_dict(document))
    arrays = {
        name: np.broadcast_to(np.zeros((), np.float16), tuple(tensor.shape))
        for name, tensor in shell.state_dict().items()
    }
    header = header_bytes(arrays)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(array.nbytes for array in arrays.values()))
