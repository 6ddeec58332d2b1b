"""The model's forward pass as it is trained: transformers' weights, but many question blocks behind one image.

The arithmetic is that of `LlavaForConditionalGeneration` (a test compares the two); what differs is the layout.
Matrix products run in bfloat16, the residual stream and the norms in float32. Letters: B pictures, V image tokens,
P = 8 prefix tokens, N blocks of Q tokens, S = P + V + N*Q, C hidden, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from btp_export.demo import attention
from btp_export.demo.model_files import IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS, PATCH, PREFIX_TOKENS

LayerFunction = Callable[..., Tensor]

_DECODER_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_VISION_PARTS = (
    "layer_norm1",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)


@dataclass(frozen=True)
class Outputs:
    """What a training step looks at."""

    logits: Tensor  # [B, N, Q, words] float32
    features: Tensor  # [B, V, C] the projector's output


class BlockForward:
    """Runs pictures with question blocks through a model's own weights."""

    def __init__(self, model: LlavaForConditionalGeneration, prefix: Tensor, *, fast: bool, compiled: bool) -> None:
        """`prefix` [P] are the token ids before the image; `fast` takes bfloat16 products, `compiled` fuses layers."""
        self.model = model
        self.prefix = prefix
        self.dtype = torch.bfloat16 if fast else torch.float32
        self._decoder_layer: LayerFunction = torch.compile(decoder_layer, dynamic=False) if compiled else decoder_layer
        self._vision_layer: LayerFunction = torch.compile(vision_layer, dynamic=False) if compiled else vision_layer
        self._attend = attention.attend if compiled else attention.plain
        self._epsilon = model.config.text_config.rms_norm_eps
        self._tables = rotary_tables(model)

    def features(self, pixels: Tensor, patches: Tensor) -> Tensor:
        """pixels [B, h, w, 3] uint8 and patches [B, V] -> projected image features [B, V, C] float32."""
        tower = self.model.model.vision_tower
        heads = self.model.config.vision_config.num_attention_heads
        embeddings = tower.embeddings
        flat = unfold(normalise(pixels))
        hidden = flat @ embeddings.patch_embedding.weight.flatten(1).T
        hidden = hidden + embeddings.position_embedding.weight[1:][patches]
        first = (embeddings.class_embedding + embeddings.position_embedding.weight[0]).expand(len(hidden), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat([first, hidden], dim=1))
        used = len(tower.encoder.layers) + 1 + self.model.config.vision_feature_layer
        for layer in tower.encoder.layers[:used]:
            hidden = self._vision_layer(hidden, vision_weights(layer), heads, self.dtype, self._attend)
        projector = self.model.model.multi_modal_projector
        hidden = functional.gelu(linear(hidden[:, 1:], projector.linear_1, self.dtype))
        return linear(hidden, projector.linear_2, self.dtype).float()

    def __call__(self, pixels: Tensor, patches: Tensor, tokens: Tensor) -> Outputs:
        """pixels [B, h, w, 3] uint8, patches [B, V], tokens [B, N, Q] -> logits of every block position."""
        features = self.features(pixels, patches)
        return Outputs(self._answer(features, patches, tokens), features)

    def _answer(self, features: Tensor, patches: Tensor, tokens: Tensor) -> Tensor:
        language = self.model.model.language_model
        heads = self.model.config.text_config.num_attention_heads
        size, blocks, length = tokens.shape
        image_end = PREFIX_TOKENS + features.shape[1]
        prefix = language.embed_tokens(self.prefix).expand(size, -1, -1)
        hidden = torch.cat([prefix, features, language.embed_tokens(tokens.flatten(1))], dim=1)
        positions = block_positions(patches, blocks, length)
        cos, sin = (table[positions][:, None].to(self.dtype) for table in self._tables)
        mask = block_mask(image_end, blocks, length).to(self.dtype)
        for layer in language.layers:
            weights = decoder_weights(layer)
            hidden = self._decoder_layer(
                hidden, weights, cos, sin, mask, image_end, heads, self._epsilon, self.dtype, self._attend
            )
        hidden = language.norm(hidden[:, image_end:])
        logits = functional.linear(hidden, self.model.lm_head.weight)
        return logits.view(size, blocks, length, -1)


# Layout


def block_positions(patches: Tensor, blocks: int, length: int) -> Tensor:
    """[B, P+V+N*Q]: every block starts right after the full image, and image tokens keep the place they have in it."""
    size = len(patches)
    prefix = torch.arange(PREFIX_TOKENS).expand(size, -1)
    block = (PREFIX_TOKENS + IMAGE_TOKENS + torch.arange(length)).repeat(blocks).expand(size, -1)
    return torch.cat([prefix, PREFIX_TOKENS + patches, block], dim=1)


def block_mask(image_end: int, blocks: int, length: int) -> Tensor:
    """[N*Q, P+V+N*Q] added to the scores: a block sees the prefix, the image and its own past."""
    index = torch.arange(blocks * length)
    same = (index[:, None] // length == index[None, :] // length) & (index[:, None] >= index[None, :])
    seen = torch.cat([torch.ones(blocks * length, image_end, dtype=torch.bool), same], dim=1)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


def normalise(pixels: Tensor) -> Tensor:
    """[B, h, w, 3] uint8 -> float32, as the processor does it."""
    return (pixels.float() / 255.0 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)


def unfold(pixels: Tensor) -> Tensor:
    """[B, h, w, 3] -> [B, V, 3*4*4] in the order of a convolution's weight."""
    size, height, width, channels = pixels.shape
    grid = pixels.view(size, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(size, -1, channels * PATCH * PATCH)


def rotary_tables(model: LlavaForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D/2] of the model's own rotary embedding."""
    rotary = model.model.language_model.rotary_emb
    last = PREFIX_TOKENS + IMAGE_TOKENS + 64
    angles = torch.arange(last).float()[:, None] * rotary.inv_freq[None, :].float()
    return angles.cos(), angles.sin()


# Layers. Functions of tensors only, so that one compiled copy serves every layer.


def linear(x: Tensor, module: nn.Linear, dtype: torch.dtype) -> Tensor:
    """A linear layer whose product runs in `dtype`."""
    bias = None if module.bias is None else module.bias.to(dtype)
    return functional.linear(x.to(dtype), module.weight.to(dtype), bias)


def decoder_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """The tensors `decoder_layer` takes, from transformers' LlamaDecoderLayer."""
    return tuple(layer.get_parameter(f"{name}.weight") for name in _DECODER_PARTS)


def decoder_layer(
    hidden: Tensor,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    image_end: int,
    heads: int,
    epsilon: float,
    dtype: torch.dtype,
    attend: LayerFunction,
) -> Tensor:
    """hidden [B, S, C] -> [B, S, C]; cos and sin [B, 1, S, D/2]; mask [N*Q, S] for the blocks, causal before them."""
    norm_1, query_w, key_w, value_w, out_w, norm_2, gate_w, up_w, down_w = weights
    x = functional.rms_norm(hidden, norm_1.shape, norm_1, epsilon).to(dtype)
    query, key, value = (split_heads(functional.linear(x, w.to(dtype)), heads) for w in (query_w, key_w, value_w))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    image = attend(query[:, :, :image_end], key[:, :, :image_end], value[:, :, :image_end], None)
    block = attend(query[:, :, image_end:], key, value, mask)
    mixed = torch.cat([image, block], dim=2).transpose(1, 2).flatten(2)
    hidden = hidden + functional.linear(mixed, out_w.to(dtype))
    x = functional.rms_norm(hidden, norm_2.shape, norm_2, epsilon).to(dtype)
    gate = functional.silu(functional.linear(x, gate_w.to(dtype))) * functional.linear(x, up_w.to(dtype))
    return hidden + functional.linear(gate, down_w.to(dtype))


def vision_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """The tensors `vision_layer` takes, from transformers' CLIPEncoderLayer."""
    return tuple(layer.get_parameter(f"{name}.{half}") for name in _VISION_PARTS for half in ("weight", "bias"))


def vision_layer(
    hidden: Tensor, weights: tuple[Tensor, ...], heads: int, dtype: torch.dtype, attend: LayerFunction
) -> Tensor:
    """hidden [B, 1+V, C] -> [B, 1+V, C], every token sees every token."""
    norm_1w, norm_1b, *attention, norm_2w, norm_2b, fc1_w, fc1_b, fc2_w, fc2_b = weights
    x = functional.layer_norm(hidden, norm_1w.shape, norm_1w, norm_1b, 1e-5).to(dtype)
    query, key, value = (
        split_heads(functional.linear(x, attention[i].to(dtype), attention[i + 1].to(dtype)), heads) for i in (0, 2, 4)
    )
    everything = x.new_zeros(x.shape[1], x.shape[1])
    mixed = attend(query, key, value, everything).transpose(1, 2).flatten(2)
    hidden = hidden + functional.linear(mixed, attention[6].to(dtype), attention[7].to(dtype))
    x = functional.layer_norm(hidden, norm_2w.shape, norm_2w, norm_2b, 1e-5).to(dtype)
    x = functional.linear(x, fc1_w.to(dtype), fc1_b.to(dtype))
    return hidden + functional.linear(x * torch.sigmoid(1.702 * x), fc2_w.to(dtype), fc2_b.to(dtype))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, C] -> [B, H, S, D]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in transformers' half-split form: x [B, H, S, D], cos and sin [B, 1, S, D/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
