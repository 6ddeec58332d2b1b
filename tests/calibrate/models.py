"""Small random LLaVA checkpoints of transformers' own classes, and inputs for them."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from calibrate.reference.records import ReferenceInput
from graphs.files.checkpoint import Checkpoint, open_checkpoint

IMAGE_TOKEN = 4
PREFIX, VOCABULARY = 5, 64
RENAMES = (("model.", ""), ("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head."))


def make_llava(folder: Path, *, layers: int = 6, heads: int = 4, kv_heads: int = 2, side: int = 6, hidden: int = 64,
               seed: int = 0, tied: bool = False) -> LlavaForConditionalGeneration:  # fmt: skip
    """A saved model with side x side image tokens; attention is made sharper than a fresh initialisation has it."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=side * 4, patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
            tie_word_embeddings=tied,
        ),
        image_token_id=IMAGE_TOKEN, image_seq_length=side * side, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0 if "q_proj" in name or "k_proj" in name else 3.0)
    model.save_pretrained(folder)
    return model


def checkpoint(folder: Path) -> Checkpoint:
    """The saved model by canonical names."""
    return open_checkpoint(folder, RENAMES)


def make_input(
    model: LlavaForConditionalGeneration, *, text: int = 7, seed: int = 0
) -> tuple[ReferenceInput, torch.Tensor]:
    """A prompt with random words and a random picture, and its pixel values [1,3,h,w]."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size, tokens = config.vision_config.image_size, config.image_seq_length
    pixels = torch.randn(1, 3, size, size, generator=generator)
    words = torch.randint(5, VOCABULARY, (PREFIX + text,), generator=generator)
    ids = torch.cat([words[:PREFIX], torch.full((tokens,), IMAGE_TOKEN), words[PREFIX:]])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
    features = torch.cat(list(features)).reshape(tokens, -1)
    return ReferenceInput(ids, features), pixels
