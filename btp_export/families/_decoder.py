"""DecoderSpec from a text_config, shared by the families; refuses what the decoder block does not compute."""

import re
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from graphs.files import configuration
from graphs.files.checkpoint import Checkpoint
from graphs.files.packed_weights import PARTS, QWEIGHT, packed_linear
from graphs.records.errors import InputError
from graphs.records.spec import DecoderSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_pytorch_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
# Multipliers, caps and layouts of Llama-like relatives: each changes the numbers, and each has one harmless value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "use_parallel_residual": (None, False),
    "parallel_residual": (None, False),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "num_local_experts": (None, 0, 1),
    "quantization_config": (None,),
}
MROPE_SECTION = [16, 24, 24]  # transformers' own default
# Old checkpoints store the rotary table, which is computed from the configuration.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def text_config(config: dict[str, Any]) -> "PreTrainedConfig":
    """transformers' own configuration object of the decoder, with its defaults filled in.

    Raises InputError for a decoder that the block does not compute, or settings that transformers refuses.
    """
    text = configuration.text_config(config)
    if text.model_type not in TEXT_TYPES:
        raise InputError(
            f"a {text.model_type} decoder",
            wanted=f"one of {', '.join(TEXT_TYPES)}",
            do="use a model with such a decoder",
        )
    return text


def biased_projections(text: "PreTrainedConfig") -> frozenset[str]:
    """The projections of a layer that have a bias, as a decoder's configuration says."""
    attention = bool(getattr(text, "attention_bias", False))
    # Qwen2 has the first three always, and no setting for it.
    parts = ("q_proj", "k_proj", "v_proj") if attention or text.model_type.startswith("qwen2") else ()
    output = ("o_proj",) if attention else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if getattr(text, "mlp_bias", False) else ()
    return frozenset((*parts, *output, *mlp))


def decoder_spec(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder of a checkpoint whose tensors carry canonical names.

    Raises InputError for a feature that the decoder block does not compute: it would give wrong numbers in silence.
    """
    config = checkpoint.config
    text = text_config(config)
    _refuse_features(config, text)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    biased = biased_projections(text)
    spec = DecoderSpec(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=checkpoint["language_model.embed_tokens.weight"].shape[0],
        rms_norm_eps=text.rms_norm_eps,
        hidden_act=ACTIVATIONS[text.hidden_act],
        qkv_bias="q_proj" in biased,
        o_bias="o_proj" in biased,
        mlp_bias="up_proj" in biased,
        # transformers ties if either level says so, but not where the file holds a separate matrix
        tie_word_embeddings="lm_head.weight" not in checkpoint.tensors
        and bool(config.get("tie_word_embeddings") or getattr(text, "tie_word_embeddings", False)),
        rope_sections=_rope_sections(text, head_dim),
        max_positions=_max_positions(text),
    )
    _refuse_tensors(checkpoint, spec)
    return spec


def _max_positions(text: "PreTrainedConfig") -> int:
    """Positions over which full attention is what the model computes: a sliding window bounds them."""
    positions: int = text.max_position_embeddings
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = kinds is None or any(kind != "full_attention" for kind in kinds)
    return min(positions, window) if window is not None and slides else positions


def _rope_sections(text: "PreTrainedConfig", head_dim: int) -> tuple[int, ...] | None:
    """M-RoPE's division of D/2; None for decoders whose tokens have one position."""
    if text.model_type != "qwen2_5_vl_text":
        return None
    sections = (text.rope_parameters or {}).get("mrope_section", MROPE_SECTION)
    whole = isinstance(sections, list) and all(isinstance(size, int) and size > 0 for size in sections)
    if not whole or 2 * sum(sections) != head_dim:
        _refuse(f"mrope_section {sections} with heads of {head_dim}", f"sections that add up to {head_dim // 2}")
    return tuple(sections)


def _refuse_features(config: dict[str, Any], text: "PreTrainedConfig") -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for holder, fields in (("config.json", config), ("text_config", config.get("text_config") or {})):
        for key, harmless in NEUTRAL.items():
            if fields.get(key) not in harmless:
                _refuse(f"{holder} sets {key} to {fields[key]!r}", f"{key} unset")
    if text.hidden_act not in ACTIVATIONS:
        _refuse(f"text_config sets hidden_act to {text.hidden_act!r}", f"one of {', '.join(ACTIVATIONS)}")
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for key in sizes:
        if getattr(text, key) < 1:
            _refuse(f"text_config sets {key} to {getattr(text, key)}", "a number above 0")
    if text.num_attention_heads % text.num_key_value_heads:
        _refuse(
            f"{text.num_attention_heads} query heads and {text.num_key_value_heads} key heads",
            "a multiple of the key heads",
        )
    parameters = getattr(text, "rope_parameters", None) or {}
    kind, known = parameters.get("rope_type", "default"), {"default", "mrope", *ROPE_INIT_FUNCTIONS}
    if kind not in known:
        _refuse(f"text_config sets rope_type to {kind!r}", f"one of {', '.join(sorted(known))}")
    rotary = parameters.get("partial_rotary_factor", 1)
    if rotary not in (None, 1, 1.0):
        _refuse(f"text_config rotates {rotary} of each head", "the whole head")


def _refuse_tensors(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """A tensor the block does not read (a query norm, an expert, a bias) means the block is not this model's.

    Nor is it if the block reads a tensor of another shape, or one that is not there.
    """
    known = _shapes(spec)
    for name, ref in checkpoint.tensors.items():
        if not name.startswith("language_model.") or IGNORED.search(name):
            continue
        layer, within = split_layer(name)
        if layer is not None and layer >= spec.num_layers:
            _refuse(
                f"the decoder has a tensor {ref.stored_name}", f"{spec.num_layers} layers, as the configuration says"
            )
        module, _, part = within.rpartition(".")
        if part in PARTS and f"{module}.weight" in known and len(known[f"{module}.weight"]) == 2:
            _refuse_packed(checkpoint, name.rpartition(".")[0], known[f"{module}.weight"])
            continue
        if within not in known:
            _refuse(f"the decoder has a tensor {ref.stored_name}", "layers like Llama's, as the configuration says")
        if ref.shape != known[within]:
            raise InputError(
                f"{ref.stored_name} has shape {list(ref.shape)}",
                wanted=f"{list(known[within])}, as config.json says",
                do="use the config.json and the safetensors files of the same model",
            )
    outside = {"norm.weight", "embed_tokens.weight"}
    for within in known:
        layers = [""] if within in outside else [f"layers.{layer}." for layer in range(spec.num_layers)]
        for prefix in layers:
            name = f"language_model.{prefix}{within}"
            if f"{name.removesuffix('weight')}{QWEIGHT}" not in checkpoint.tensors:
                checkpoint[name]  # raises for one that is not there
    if not spec.tie_word_embeddings:
        checkpoint["lm_head.weight"]


def _refuse_packed(checkpoint: Checkpoint, module: str, shape: tuple[int, ...]) -> None:
    """A matrix of four bits must be there once, whole, of the shape that config.json says, and recorded there."""
    linear = packed_linear(checkpoint, module)
    if linear is None:
        checkpoint[f"{module}.{QWEIGHT}"]  # raises: its scales are there without it
        return
    if checkpoint.quantization is None or f"{module}.weight" in checkpoint.tensors:
        raise InputError(
            f"{linear.qweight.stored_name} holds codes of four bits"
            + (", and its weight is there too" if checkpoint.quantization else ", which config.json does not mention"),
            wanted="a packed checkpoint as btp-export writes it, with its quantization_config",
            do="make it again from its source",
        )
    if (linear.n, linear.k) != shape:
        raise InputError(
            f"{linear.qweight.stored_name} is of a matrix {[linear.n, linear.k]}",
            wanted=f"{list(shape)}, as config.json says",
            do="use the config.json and the safetensors files of the same model",
        )


def _shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a layer, and of those around the layers, by its name within."""
    width, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = {
        "self_attn.q_proj": (queries, width, spec.qkv_bias),
        "self_attn.k_proj": (keys, width, spec.qkv_bias),
        "self_attn.v_proj": (keys, width, spec.qkv_bias),
        "self_attn.o_proj": (width, queries, spec.o_bias),
        "mlp.gate_proj": (spec.intermediate_size, width, spec.mlp_bias),
        "mlp.up_proj": (spec.intermediate_size, width, spec.mlp_bias),
        "mlp.down_proj": (width, spec.intermediate_size, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (rows, columns) for name, (rows, columns, _) in matrices.items()
    }
    shapes |= {f"{name}.bias": (rows,) for name, (rows, _, has_bias) in matrices.items() if has_bias}
    shapes |= {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm", "norm")}
    return shapes | {"embed_tokens.weight": (spec.vocab_size, width)}


def split_layer(name: str) -> tuple[int | None, str]:
    """Layer number, if it has one, and the rest of a canonical decoder tensor name."""
    match = re.fullmatch(r"language_model\.(?:layers\.(\d+)\.)?(.+)", name)
    assert match is not None
    return (int(match[1]) if match[1] else None), match[2]


def _refuse(got: str, wanted: str) -> NoReturn:
    raise InputError(got, wanted=wanted, do="use a model without it: the exported graphs do not compute it")
