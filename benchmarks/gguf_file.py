"""A model's decoder as a GGUF file: the same numbers, in float32, float16 or Q4_0.

Q4_0 is 32 codes of four bits with a float16 scale, w = (q - 8) s, which is what a packed checkpoint in groups of 32
holds; only the order of nibbles differs. Rows of query and key are in llama.cpp's order, which turns neighbouring
numbers where transformers turns halves.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from btp_export.model.open_model import Model
from graphs.files.atomic import move
from graphs.files.packed_weights import QWEIGHT, SCALES
from graphs.packing import unpack
from graphs.records.spec import DecoderSpec

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["F32", "F16", "Q4_0"]
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(model: Model, path: Path, kind: Kind) -> Path:
    """Write the decoder, one tensor in memory at a time; embedding and output projection in F16 beside Q4_0."""
    import gguf

    if path.is_file():
        return path
    spec, partial = model.spec.decoder, path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(writer, spec)
    for name, shape, type_ in _tensors(spec, kind):
        _announce(writer, name, shape, gguf.GGMLQuantizationType[type_])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in _values(model, kind):
        writer.write_tensor_data(np.ascontiguousarray(array))
    writer.close()
    move(partial, path)
    return path


def _describe(writer: Any, spec: DecoderSpec) -> None:
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _announce(writer: Any, name: str, shape: tuple[int, ...], type_: Any) -> None:
    import gguf

    stored = gguf.quant_shape_to_byte_shape(shape, type_)
    size = math.prod(stored)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=type_)


def _tensors(spec: DecoderSpec, kind: Kind) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and types, in the order of the file."""
    outside = "F16" if kind == "Q4_0" else kind
    hidden, inner, width = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    narrow = spec.num_kv_heads * spec.head_dim
    yield "token_embd.weight", (spec.vocab_size, hidden), outside
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (spec.vocab_size, hidden), outside
    rows = [(width, hidden), (narrow, hidden), (narrow, hidden), (hidden, width)]
    rows += [(inner, hidden), (inner, hidden), (hidden, inner)]
    for layer in range(spec.num_layers):
        for name, shape in zip(LAYER.values(), rows, strict=True):
            yield f"blk.{layer}.{name}.weight", shape, kind
        for name in NORMS.values():
            yield f"blk.{layer}.{name}.weight", (hidden,), "F32"


def _values(model: Model, kind: Kind) -> Iterator[Array]:
    """What is in them, in the same order."""
    checkpoint, spec = model.checkpoint, model.spec.decoder
    plain = np.float32 if kind == "F32" else np.float16
    yield checkpoint["language_model.embed_tokens.weight"].read().astype(plain)
    yield checkpoint["language_model.norm.weight"].read().astype(np.float32)
    yield checkpoint["lm_head.weight"].read().astype(plain)
    for layer in range(spec.num_layers):
        prefix = f"language_model.layers.{layer}"
        for module in LAYER:
            heads = {"self_attn.q_proj": spec.num_heads, "self_attn.k_proj": spec.num_kv_heads}.get(module)
            if kind != "Q4_0":
                yield _turned(checkpoint[f"{prefix}.{module}.weight"].read().astype(plain), heads)
            else:
                codes, scales = (checkpoint[f"{prefix}.{module}.{part}"].read() for part in (QWEIGHT, SCALES))
                yield blocks(_turned(np.asarray(codes), heads), _turned(np.asarray(scales), heads))
        for norm in NORMS:
            yield checkpoint[f"{prefix}.{norm}.weight"].read().astype(np.float32)


def _turned(rows: Array, heads: int | None) -> Array:
    """Rows of query or key [heads x (2 x D/2), ...] in llama.cpp's order [heads x (D/2 x 2), ...]; others unchanged."""
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def blocks(qweight: Array, scales: Array) -> Array:
    """qweight [N,G,16] and scales [N,G] as Q4_0 [N,18 G]: the scale, then codes j and j + 16 in byte j."""
    count, groups = scales.shape
    codes = unpack(qweight).reshape(count, groups, 2, 16)
    block = np.empty((count, groups, 18), np.uint8)
    block[:, :, :2] = scales.astype("<f2").view(np.uint8).reshape(count, groups, 2)
    block[:, :, 2:] = codes[:, :, 0] | codes[:, :, 1] << 4
    return block.reshape(count, -1)
