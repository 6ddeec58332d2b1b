"""Random Qwen2.5-VL checkpoints of transformers' own classes, as they are published, with a small real tokenizer."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
TEXTS = ("You are a helpful assistant.", "system user assistant", "what color is the circle in the picture?")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREFIX_TEXT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
ROPE_THETA = 500000.0  # not transformers' default, so that reading it is tested

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}  # fmt: skip

Layout = Literal["hub", "new"]
"""hub: as the published files are: names of transformers 4, flat config.json, shards. new: names of transformers 5."""


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE like Qwen2's with its special tokens, trained on three sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def make_qwen(
    folder: Path,
    layout: Layout = "hub",
    *,
    tied: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    max_pixels: int = 28 * 28 * 64,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """Write a whole checkpoint into `folder`; gives its model (eval, float32). `text` and `vision` change settings."""
    tokenizer = make_tokenizer(folder)
    ids = {name: tokenizer.token_to_id(token) for name, token in {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }.items()}  # fmt: skip
    stop = {"eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": tokenizer.token_to_id("<|endoftext|>")}
    vocabulary = tokenizer.get_vocab_size() + 4  # published tables have unused rows too
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": vocabulary, "bos_token_id": None} | stop | (text or {}),
        vision_config=VISION | (vision or {}),
        tie_word_embeddings=tied,
        **ids,
    )
    model = random_model(config, seed)
    model.generation_config.eos_token_id = [stop["eos_token_id"], stop["pad_token_id"]]
    model.generation_config.pad_token_id = stop["pad_token_id"]
    model.save_pretrained(folder, max_shard_size="200KB" if layout == "hub" and not text else "5GB")
    if layout == "hub":
        _as_published(folder, max_pixels)
    else:
        _as_transformers_5(model, folder, max_pixels)
    return model


def random_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Biases and norms that differ from 0 and 1, so that a forgotten one shows, and attention that is not flat."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=1.0 if "norm" in name or "ln_q" in name else 0.0, std=0.2)
        else:
            sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.normal_(std=sharp * parameter[0].numel() ** -0.5)
    model.model.language_model.embed_tokens.weight.mul_(4.0)
    return model


def _as_published(folder: Path, max_pixels: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    for name in ("layer_types", "model_type", "dtype"):
        config["text_config"].pop(name, None)
    flat = config.pop("text_config") | config
    flat |= {
        "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "use_sliding_window": False, "sliding_window": 64, "max_window_layers": flat["num_hidden_layers"],
    }  # fmt: skip
    flat["vision_config"] = {key: value for key, value in flat["vision_config"].items() if key != "model_type"}
    (folder / "config.json").write_text(json.dumps(flat))
    image_processor = {
        "min_pixels": 28 * 28 * 2, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _as_transformers_5(model: Qwen2_5_VLForConditionalGeneration, folder: Path, max_pixels: int) -> None:
    """Module names as they are, nested config.json (which save_pretrained wrote), one file for all processors."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": 1568, "longest_edge": max_pixels},
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    }  # fmt: skip
    video_processor = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14}
    document = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": image_processor,
        "video_processor": video_processor,
    }
    (folder / "processor_config.json").write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
