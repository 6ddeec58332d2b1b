"""Refusing settings of config.json that nobody here knows: one that changes the numbers would be dropped in silence."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from btp_export.families._decoder import NEUTRAL
from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers has written into configurations over the years and what says nothing about the forward pass: where a
# model came from, how text is generated, how outputs are returned, how it was trained. Keys that begin with "_" too.
BOOKKEEPING = """
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label ignore_index is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
# Read under another name or in another place than transformers' classes have them.
READ = {"rope_theta", "rope_scaling", "rope_parameters", "head_dim", "use_image_newline_parameter", *NEUTRAL}
# In published files and without effect: of CLIP beside its tower. A family names its own.
UNUSED = {"vocab_size", "dropout", "logit_scale_init_value", "projection_dim"}
# What other programs write into config.json about themselves.
FOREIGN = {"unsloth_fixed", "unsloth_version", "transformers.js_config", "name_or_path", "processor_class"}
KNOWN = frozenset({*BOOKKEEPING.split(), *READ, *UNUSED, *FOREIGN, "transformers_weights"})
EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


def refuse_unknown_keys(checkpoint: Checkpoint, unused: frozenset[str] = frozenset()) -> None:
    """Raise InputError naming the first key that is set and that transformers' class for that part does not know.

    `unused` are those that the family's published files have without effect. Looks at config.json itself, its
    text_config and its vision_config.
    """
    for part, fields, config in _parts(checkpoint.config):
        known = KNOWN | unused | _settings_of(config)
        for key, value in fields.items():
            if (
                key not in known
                and not key.startswith("_")
                and not any(value is empty or value == empty for empty in EMPTY)
            ):
                raise InputError(
                    f"{part} sets {key} to {str(value)[:60]}, which transformers' {type(config).__name__} lacks",
                    wanted="settings that are known, as an unknown one could change the numbers",
                    do=f"take {key} out of config.json if it says nothing about the computation",
                )


def _parts(document: Mapping[str, Any]) -> "Iterator[tuple[str, Mapping[str, Any], PreTrainedConfig]]":
    """(name, settings, transformers' default configuration of that kind) of each part of config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[document["model_type"]]()
    yield "config.json", document, whole
    for part in ("text_config", "vision_config"):
        fields, config = document.get(part), getattr(whole, part)
        if isinstance(fields, Mapping):
            kind = fields.get("model_type", config.model_type)
            own = kind in (config.model_type, whole.model_type) or kind not in CONFIG_MAPPING
            yield part, fields, config if own else CONFIG_MAPPING[kind]()


def _settings_of(config: "PreTrainedConfig") -> set[str]:
    """Settings of a configuration, with those of its decoder, which older files have beside them."""
    text = config.get_text_config()
    return {*vars(config), *config.attribute_map, *(vars(text) if text is not config else ())}
