"""Builds everything of the demo checkpoint except its trained weights: configuration, tokenizer and processor.

The prompt is LLaVA's, in the words of a small world:

    <s> look at the picture below . USER:  <image> x 576  what colour is the star ? ASSISTANT:
    ------- 8 tokens before the image ---  -- 24 x 24 --  --- T tokens after it ---------------
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from calibrate.data import scenes, signs

PREFIX = "look at the picture below. USER:"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TURNS = ("USER:", "ASSISTANT:")
PREFIX_TOKENS = 8
IMAGE_TOKENS = 576
PATCH = 4
# The ground of the scenes has a mean near 90 of 255; a spread of a quarter of the range keeps bright objects below 3.
IMAGE_MEAN, IMAGE_STD = (0.35, 0.35, 0.35), (0.25, 0.25, 0.25)

CHAT_TEMPLATE = (
    "{{ 'look at the picture below. ' }}"
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def words() -> tuple[str, ...]:
    """The words of the world of scenes, in the order of their token ids."""
    grammar = "look at the picture below . ? , what colour shape is there a an how many objects object are where in of"
    places = "top bottom left right"
    vocabulary = [*grammar.split(), *scenes.COLOURS, *scenes.SHAPES, *scenes.PLURALS.values()]
    vocabulary += ["yes", "no", *scenes.NUMBERS, *places.split()]
    return (*dict.fromkeys(vocabulary), *reading_words())


def reading_words() -> tuple[str, ...]:
    """The last of them: what the model learned when it learned to read, in the second part of its training."""
    return ("written", "on", "sign", *signs.CHARACTERS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that folds case, splits punctuation off and reads "color" as "colour"."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *TURNS, *words()))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor\b"), "colour")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in TURNS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor() -> LlavaProcessor:
    """LLaVA's own processor, with the picture brought to 96x96 and cut into 24x24 patches."""
    side = scenes.IMAGE_SIZE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_config(*, layers: int = 12, hidden: int = 128, vision_layers: int = 4, reads: bool = True) -> LlavaConfig:
    """The architecture that ships; tests train smaller ones. Without `reads` it has no tokens of the reading words."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        image_size=scenes.IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        projection_dim=hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) - (0 if reads else len(reading_words())),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write configuration, processor and a float16 copy of the weights to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.float16)
    copy.config.dtype = torch.float16
    for part in (copy.config.text_config, copy.config.vision_config):
        part.dtype = None  # of a model that was loaded to go on they say float32
    copy.generation_config = _generation_config(model.config)
    copy.save_pretrained(folder)
    build_processor().save_pretrained(folder)


def _generation_config(config: LlavaConfig) -> GenerationConfig:
    text = config.text_config
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
