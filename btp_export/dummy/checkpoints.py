"""Checkpoints of the known models with made-up weights: real shapes, real configuration, no download, no meaning.

For measuring time and memory, which do not depend on the values. The values are sound all the same: norms are one,
matrices keep the scale of what goes through them, so that every layer's activations stay finite in half precision and
attention is neither flat nor on one token. A matrix element is a random sign and mantissa with one fixed exponent, that
is a magnitude spread evenly over [2^e, 2^(e+1)): only integer operations, so the bytes are the same everywhere, and as
fast as the disk.

A checkpoint lies in the cache folder by model, seed and number of layers, and is used again. Shards that an interrupted
run has finished are kept.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
from pydantic import Field

from btp_export.model.cache_folder import cache_folder
from graphs.files.atomic import check_space
from graphs.files.safetensors_file import header_bytes, tensor_order
from graphs.records.errors import InputError
from graphs.records.progress import Report
from graphs.records.record import Strict, parse_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARKER = "btp-dummy.json"  # in the checkpoint's folder: these weights are made up
SHARD_BYTES = 5 * 10**9  # as the hub's shards
PIECE = 2**23  # elements made and written at a time
SENTENCE = "DUMMY WEIGHTS: the weights are random numbers; times and sizes are real, text and accuracy mean nothing"

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Sign and mantissa bits of each type, where its exponent begins, and the exponent's bias.
LAYOUT = {"float16": (0x83FF, 10, 15), "bfloat16": (0x807F, 7, 127)}

ONES = re.compile(r"(norm\d?|ln_q)\.weight$")
ZEROS = re.compile(r"norm\d?\.bias$")
SHARP = re.compile(r"(q_proj|k_proj|qkv|lm_head)\.weight$")  # twice the scale: attention and answers have preferences
RESIDUAL = re.compile(r"(o_proj|down_proj|out_proj|fc2|attn\.proj)\.weight$")  # half: the residual stream grows slowly
SPREAD = math.sqrt(7 / 3)  # root mean square of magnitudes spread evenly over [1, 2)


class DummyRecord(Strict):
    """btp-dummy.json: which model's shapes a checkpoint has, and that nothing else of it is real."""

    format: Literal["btp-dummy/1"] = "btp-dummy/1"
    note: str = SENTENCE
    model: str
    seed: int = Field(ge=0)
    layers: int = Field(ge=1)
    all_layers: int = Field(ge=1)

    @property
    def origin(self) -> str:
        """What stands for the source of the weights in a manifest."""
        layers = "" if self.layers == self.all_layers else f", {self.layers} of {self.all_layers} decoder layers"
        return f"dummy weights in the shapes of {self.model}, seed {self.seed}{layers}"


def read_marker(folder: Path) -> DummyRecord | None:
    """The record of a dummy checkpoint, None for any other. Raises InputError if it is damaged."""
    path = folder / MARKER
    if not path.is_file():
        return None
    return parse_record(DummyRecord, path.read_bytes(), source=path, noun="dummy checkpoint record")


def dummy_checkpoint(
    model: str, *, seed: int = 0, layers: int | None = None, report: Report | None = None, root: Path | None = None
) -> Path:
    """The folder of a known model's dummy checkpoint, made now if it is not in the cache; `layers` cuts the decoder.

    Raises InputError for a model whose configuration is not known, a number of layers it does not have, or too little
    disk, before anything is written.
    """
    config, record = configured(model, seed, layers)
    place = (root or cache_folder("dummy")) / _folder_name(record)
    if (place / MARKER).is_file():
        return place
    tensors = tensor_shapes(config)
    with _only_one(place):
        if not (place / MARKER).is_file():  # somebody else may just have made it
            _make(place, config, record, tensors, report)
    return place


def configured(model: str, seed: int = 0, layers: int | None = None) -> tuple[dict[str, Any], DummyRecord]:
    """A known model's configuration with so many decoder layers, and the record of its dummy checkpoint."""
    from btp_export.dummy.configs import CONFIGS

    if model not in CONFIGS:
        raise InputError(
            f"--dummy-weights for {model!r}", wanted=f"one of {', '.join(CONFIGS)}", do="--model llava-1.5-7b"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} of the dummy weights", wanted="0 to 4294967295", do="--seed 0")
    config = copy.deepcopy(CONFIGS[model])
    everything = config["text_config"]["num_hidden_layers"]
    chosen = everything if layers is None else layers
    if not 1 <= chosen <= everything:
        raise InputError(f"--dummy-layers {chosen}", wanted=f"1 to {everything}, as {model} has", do="leave it out")
    config["text_config"]["num_hidden_layers"] = chosen
    return config, DummyRecord(model=model, seed=seed, layers=chosen, all_layers=everything)


def _folder_name(record: DummyRecord) -> str:
    layers = "" if record.layers == record.all_layers else f"-{record.layers}-layers"
    return f"{record.model}-seed{record.seed}{layers}"


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by stored name, from transformers' own model without weights."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(whole)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def _only_one(place: Path) -> Iterator[None]:
    """Nobody else makes the same checkpoint at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)


def _make(
    place: Path,
    config: dict[str, Any],
    record: DummyRecord,
    tensors: Mapping[str, tuple[int, ...]],
    report: Report | None,
) -> None:
    """Write beside the place, shard by shard, and rename when all is there."""
    kind = str(config["torch_dtype"])
    folder = place.with_name(f".{place.name}.partial")
    shards = in_shards(tensors, DTYPES[kind])
    total = sum(math.prod(shape) for shape in tensors.values()) * DTYPES[kind].itemsize
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    check_space(place, total - there, what=f"the dummy checkpoint of {record.model}", do="set XDG_CACHE_HOME elsewhere")
    folder.mkdir(exist_ok=True)
    done = 0
    for name, part in shards.items():
        for written in _write_shard(folder / name, part, kind, record.seed):
            done += written
            if report is not None:
                report(done // 2**20, total // 2**20, "writing dummy weights, MiB")
    names = {tensor: file for file, part in shards.items() for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_processor(config, folder)
    (folder / MARKER).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if place.exists():
        shutil.rmtree(place)  # without its marker it is not whole
    folder.rename(place)


def in_shards(tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors in the model's order, packed into files of at most SHARD_BYTES."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > SHARD_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str, seed: int) -> Iterator[int]:
    """Write one shard if it is not there; gives the bytes of each piece as it is written."""
    stand_ins = {name: np.broadcast_to(np.zeros((), DTYPES[kind]), shape) for name, shape in shapes.items()}
    size = sum(array.nbytes for array in stand_ins.values())
    header = header_bytes(stand_ins)
    if path.is_file() and path.stat().st_size == len(header) + size:
        yield size
        return
    part = path.with_suffix(".part")
    with part.open("wb") as stream:
        stream.write(header)
        for name in tensor_order(stand_ins):
            for piece in tensor_bits(name, shapes[name], kind, seed):
                stream.write(piece.data)
                yield piece.nbytes
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)


def tensor_bits(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Iterator[np.ndarray]:
    """The bits of one tensor's elements, as uint16 pieces in order; the same for the same name, shape and seed."""
    mask, shift, bias = LAYOUT[kind]
    one = np.uint16(bias << shift)
    count = math.prod(shape)
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    random = np.random.SFC64(start)
    exponent = np.uint16((bias + _exponent(name, shape)) << shift)
    for first in range(0, count, PIECE):
        size = min(PIECE, count - first)
        if ONES.search(name) or ZEROS.search(name):
            yield np.full(size, one if ONES.search(name) else 0, np.uint16)
            continue
        bits = random.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size]
        bits &= np.uint16(mask)
        bits |= exponent
        yield bits


def _exponent(name: str, shape: tuple[int, ...]) -> int:
    """e of the magnitudes [2^e, 2^(e+1)): the nearest to gain / sqrt(inputs), the scale that keeps a signal's own."""
    if "embed_tokens" in name:
        return -1
    if len(shape) < 2 or "position_embedding" in name:
        return -6
    gain = 2.0 if SHARP.search(name) else 0.5 if RESIDUAL.search(name) else 1.0
    return round(math.log2(gain / math.sqrt(math.prod(shape[1:])) / SPREAD))


# -- tokenizer and processor -----------------------------------------------------------------------------------------
#
# The models' own tokenizers cannot be made up. This one splits known words whole and spells others in letters; special
# tokens have their real ids, every other id is a made-up word, and the chat template's text before the picture is as
# many tokens as the real one makes of it (35 for LLaVA, 15 for Qwen2.5-VL).

VICUNA_TURNS = {
    "llava": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
    "llava_next": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. ",
}
VICUNA_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
QWEN_SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
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


def chat_template(model_type: str) -> str:
    """A template with the text of the model's published one."""
    if model_type == "qwen2_5_vl":
        parts = {
            "START": "'<|im_start|>' + message['role'] + '\n'",
            "IMAGE": "'<|vision_start|><|image_pad|><|vision_end|>'",
            "END": "'<|im_end|>\n'",
            "ANSWER": "'<|im_start|>assistant\n'",
        }
        opening = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    else:
        parts = {"START": "message['role'].upper() + ': '", "IMAGE": "'<image>\n'", "END": "' '"}
        parts["ANSWER"] = "'ASSISTANT:'"
        opening = "{{ " + json.dumps(VICUNA_TURNS[model_type]) + " }}"
    text = MESSAGES
    for name, expression in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", "{{ " + expression.replace("\n", "\\n") + " }}")
    return opening.replace("\n", "\\n") + text


def build_tokenizer(config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Words, letters, made-up words; special tokens at the model's own ids."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    qwen = config["model_type"] == "qwen2_5_vl"
    special = QWEN_SPECIAL if qwen else VICUNA_SPECIAL
    unknown = "<|endoftext|>" if qwen else "<unk>"
    tokenizer = Tokenizer(WordPiece(_vocabulary(config, special), unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(special))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    if not qwen:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special["<s>"])]
        )
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        extra = {"image_token": "<image>"}
    positions = config["text_config"]["max_position_embeddings"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        padding_side="left",
        model_max_length=positions,
        extra_special_tokens=extra,
        **named,
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


def save_processor(config: dict[str, Any], folder: Path) -> None:
    """Tokenizer, image processor and chat template, of the model's own classes and settings."""
    from transformers import GenerationConfig

    tokenizer = build_tokenizer(config)
    template = chat_template(config["model_type"])
    if config["model_type"] == "qwen2_5_vl":
        _save_qwen_processor(config, tokenizer, template, folder)
    else:
        _llava_processor(config, tokenizer, template).save_pretrained(folder)
    generation = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)


def _llava_processor(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = config["vision_config"]["image_size"]
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "num_additional_image_tokens": 1,
        "chat_template": template,
    }
    if config["model_type"] == "llava":
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**size), **settings)
    images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=config["image_grid_pinpoints"])
    return LlavaNextProcessor(image_processor=images, **settings)


def _save_qwen_processor(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str, folder: Path
) -> None:
    """The files as they are published; transformers builds a Qwen processor only where torchvision is installed."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = config["vision_config"]
    images = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        size={"shortest_edge": 3136, "longest_edge": 12845056},  # pixels, as published
    )
    images.save_pretrained(folder)
    document = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    document |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
