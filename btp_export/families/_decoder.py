"""DecoderSpec from a text_config, shared by the families; refuses what the decoder block does not compute."""

import re
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from graphs.checkpoint import Checkpoint
from graphs.errors import InputError
from graphs.spec import DecoderSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXT_TYPES = ("llama", "mistral", "qwen2")
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
# Old checkpoints store the rotary table, which is computed from the configuration.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def text_config(config: dict[str, Any]) -> "PreTrainedConfig":
    """transformers' own configuration object of the decoder, with its defaults filled in."""
    from transformers import AutoConfig

    fields = dict(config.get("text_config") or {})
    model_type = fields.pop("model_type", "llama")
    if model_type not in TEXT_TYPES:
        raise InputError(
            f"a {model_type} decoder", wanted=f"one of {', '.join(TEXT_TYPES)}", do="use a model with such a decoder"
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"text_config: {error}", wanted=f"a {model_type} configuration", do="restore it") from error


def decoder_spec(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder of a checkpoint whose tensors carry canonical names.

    Raises InputError for a feature that the decoder block does not compute: it would give wrong numbers in silence.
    """
    config = checkpoint.config
    text = text_config(config)
    _refuse_features(config, text)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bias = bool(getattr(text, "attention_bias", False))
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
        qkv_bias=bias or text.model_type == "qwen2",  # Qwen2 has these three always, and no setting for it
        o_bias=bias,
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        # transformers ties if either level says so, also when the file holds a separate matrix
        tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.tie_word_embeddings),
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


def _refuse_features(config: dict[str, Any], text: "PreTrainedConfig") -> None:
    for holder, fields in (("config.json", config), ("text_config", config.get("text_config") or {})):
        for key, harmless in NEUTRAL.items():
            if fields.get(key) not in harmless:
                _refuse(f"{holder} sets {key} to {fields[key]!r}", f"{key} unset")
    if text.hidden_act not in ACTIVATIONS:
        _refuse(f"text_config sets hidden_act to {text.hidden_act!r}", f"one of {', '.join(ACTIVATIONS)}")
    if text.num_attention_heads % text.num_key_value_heads:
        _refuse(
            f"{text.num_attention_heads} query heads and {text.num_key_value_heads} key heads",
            "a multiple of the key heads",
        )
    rotary = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1)
    if rotary not in (None, 1, 1.0):
        _refuse(f"text_config rotates {rotary} of each head", "the whole head")


def _refuse_tensors(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """A tensor the block does not read (a query norm, an expert, a bias) means the block is not this model's."""
    linear = {f"self_attn.{x}_proj": spec.qkv_bias for x in "qkv"} | {"self_attn.o_proj": spec.o_bias}
    linear |= {f"mlp.{x}_proj": spec.mlp_bias for x in ("gate", "up", "down")}
    known = {f"{module}.weight" for module in (*linear, "input_layernorm", "post_attention_layernorm")}
    known |= {f"{module}.bias" for module, has_bias in linear.items() if has_bias}
    for name, ref in checkpoint.tensors.items():
        if not name.startswith("language_model.") or IGNORED.search(name):
            continue
        layer, within = split_layer(name)
        if layer is not None and layer >= spec.num_layers:
            _refuse(
                f"the decoder has a tensor {ref.stored_name}", f"{spec.num_layers} layers, as the configuration says"
            )
        if within not in known and within not in ("embed_tokens.weight", "norm.weight"):
            _refuse(f"the decoder has a tensor {ref.stored_name}", "layers like Llama's, as the configuration says")


def split_layer(name: str) -> tuple[int | None, str]:
    """Layer number, if it has one, and the rest of a canonical decoder tensor name."""
    found = re.fullmatch(r"language_model\.(?:layers\.(\d+)\.)?(.+)", name)
    assert found is not None
    return (int(found[1]) if found[1] else None), found[2]


def _refuse(got: str, wanted: str) -> NoReturn:
    raise InputError(got, wanted=wanted, do="use a model without it: the exported graphs do not compute it")
