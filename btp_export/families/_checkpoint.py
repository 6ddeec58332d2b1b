"""What the families read of a checkpoint beside decoder and tower: settings, stop tokens, where the image stands."""

from pathlib import Path
from typing import Any

from pydantic import Field

from btp_export.families._decoder import decoder_spec
from btp_export.families._generation import end_tokens, generation_settings, read_generation_file
from btp_export.families._keys import refuse_unknown_keys
from graphs import dtypes
from graphs.files.checkpoint import Checkpoint
from graphs.files.packed_weights import packed_linear
from graphs.records.errors import InputError
from graphs.records.record import Record, read_record
from graphs.records.spec import ModelSpec, VisionSpec

SETTINGS_FILE = "btp.json"


class Settings(Record):
    """btp.json of a checkpoint folder: what the toolkit wants to know and transformers' files have no place for."""

    change_threshold: float | None = Field(default=None, gt=-1, lt=1)
    prefix_tokens: int | None = Field(default=None, ge=0)


def model_spec(
    checkpoint: Checkpoint,
    *,
    model_type: str,
    name: str,
    vision: VisionSpec,
    image_token_id: int,
    unused: frozenset[str] = frozenset(),
) -> ModelSpec:
    """The model as data; reads config.json, generation_config.json, btp.json and the tokenizer's chat template.

    `unused` are settings that published files have and that say nothing about the computation. Raises InputError for
    what the graphs cannot express.
    """
    decoder = decoder_spec(checkpoint)
    refuse_unknown_keys(checkpoint, unused)
    settings = _settings(checkpoint.folder)
    ends = end_tokens(checkpoint)
    first = "language_model.layers.0.self_attn.q_proj"
    packed = packed_linear(checkpoint, first)
    stored = checkpoint[f"{first}.weight"].dtype if packed is None else packed.scales.dtype
    extra: dict[str, Any] = {} if settings.change_threshold is None else {"change_threshold": settings.change_threshold}
    prefix = settings.prefix_tokens
    return ModelSpec(
        model_type=model_type,
        name=name,
        decoder=decoder,
        vision=vision,
        prefix_tokens=count_prefix_tokens(checkpoint.folder, image_token_id) if prefix is None else prefix,
        image_token_id=image_token_id,
        eos_token_ids=ends,
        pad_token_id=_pad_token(checkpoint, ends),
        weight_dtype=dtypes.BY_SAFETENSORS[stored].precision,
        generation=generation_settings(checkpoint),
        **extra,
    )


def count_prefix_tokens(folder: Path, image_token_id: int, *, system: str | None = None) -> int:
    """P: tokens of the chat template before the first image token, by the checkpoint's own processor.

    With `system` the conversation begins with that message. Raises InputError if there are no processor files, no chat
    template, or no image placeholder in it.
    """
    from btp_export.families._chat import conversation_text
    from btp_export.families._describe import checkpoint_processor

    processor = checkpoint_processor(folder)
    ids = processor.ids(conversation_text(processor, "?", system=system), 1)
    if image_token_id not in ids:
        raise InputError(
            f"the chat template of {folder} puts no image token {image_token_id} in a prompt with a picture",
            wanted="a template that places it",
            do="use the processor files of the same model",
        )
    return ids.index(image_token_id)


def _pad_token(checkpoint: Checkpoint, ends: tuple[int, ...]) -> int:
    """generation_config.json's, config.json's, its text_config's, or an end token."""
    config = checkpoint.config
    sources = [read_generation_file(checkpoint) or {}, config, config.get("text_config") or {}]
    named = (source.get("pad_token_id") for source in sources)
    return next((pad for pad in named if pad is not None and pad >= 0), ends[0] if ends else 0)


def _settings(folder: Path) -> Settings:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return Settings()
    return read_record(Settings, path, noun="settings file")
