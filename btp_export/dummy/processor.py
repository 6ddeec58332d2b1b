"""The text side of a dummy checkpoint: a tokenizer, a chat template and a processor with the model's real ids.

The models' own tokenizers cannot be made up. This one splits known words whole and spells others in letters; special
tokens have their real ids, every other id is a made-up word, and the chat template's text before the picture is as
many tokens as the real one makes of it (35 for LLaVA, 15 for Qwen2.5-VL). A family's file has what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.families import family_for
from btp_export.families._known import DummyProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_WORDS = (
    "A chat between a curious user human and an intelligence assistant The gives helpful answers to the s questions"
)
PROMPT_WORDS = "USER ASSISTANT system You are Describe image What How many things there picture see do"
SPLIT_WORDS = ("art", "##ificial", "detail", "##ed", "pol", "##ite")  # artificial, detailed and polite are two tokens
MESSAGES = (
    "{% for message in messages %}{{ START }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ END }}{% endfor %}{% if add_generation_prompt %}{{ ANSWER }}{% endif %}"
)


def save_processor(config: dict[str, Any], folder: Path) -> None:
    """Tokenizer, image processor and chat template, of the model's own classes and settings."""
    from transformers import GenerationConfig

    parts = _parts(config)
    tokenizer = build_tokenizer(config)
    parts.save(config, tokenizer, chat_template(parts), folder)
    generation = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)


def _parts(config: Mapping[str, Any]) -> DummyProcessor:
    parts = family_for(dict(config)).dummy
    assert parts is not None, "checked before a checkpoint is made"
    return parts


def chat_template(parts: DummyProcessor) -> str:
    """A template with the text of the model's published one."""
    text = "{{ " + json.dumps(parts.opening) + " }}" + MESSAGES
    for name in ("start", "image", "end", "answer"):
        text = text.replace(f"{{{{ {name.upper()} }}}}", "{{ " + getattr(parts, name).replace("\n", "\\n") + " }}")
    return text


def build_tokenizer(config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Words, letters, made-up words; special tokens at the model's own ids."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    parts = _parts(config)
    tokenizer = Tokenizer(WordPiece(_vocabulary(config, parts.special), unk_token=parts.named["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(parts.special))
    begin = parts.named.get("bos_token")
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, parts.special[begin])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=config["text_config"]["max_position_embeddings"],
        extra_special_tokens=dict(parts.extra),
        **parts.named,
    )


def _vocabulary(config: dict[str, Any], special: Mapping[str, int]) -> dict[str, int]:
    """Every id of the embedding has a token."""
    from btp_export.demo.model_files import words as demo_words

    letters = [chr(code) for code in range(33, 127)]
    pieces = [
        *TEMPLATE_WORDS.split(),
        *PROMPT_WORDS.split(),
        *SPLIT_WORDS,
        *demo_words(),
        "\n",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    words = iter(dict.fromkeys(pieces))
    by_id = {number: token for token, number in special.items()}
    size = config["text_config"]["vocab_size"]
    return {by_id.get(number) or next(words, f"word{number}"): number for number in range(size)}
