"""How a checkpoint wants text to be generated, read as transformers' `from_pretrained` reads it."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError
from graphs.records.generation import GenerationSettings
from graphs.records.reading import read_object

GENERATION_FILE = "generation_config.json"
FOLLOWED = tuple(name for name in GenerationSettings.model_fields if name != "not_followed")
TOKEN_LISTS = ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")

# Settings that change `generate`'s tokens and are not followed, and what of them changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "watermarking_config": (),
    "stop_strings": ("", []),
    "max_time": (),
    "token_healing": (False,),
    "constraints": ([],),
    "force_words_ids": ([],),
}
# These only say how tokens are drawn, so they matter where the checkpoint asks for that.
DRAWN: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
LONGEST = 40  # characters of a value that is shown


def end_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end an answer. None where the checkpoint names none: `generate` goes on to its limit then too."""
    ends = _document(checkpoint).get("eos_token_id")
    return tuple(token for token in _token_ids(ends, "eos_token_id", checkpoint) if token >= 0)


def generation_settings(checkpoint: Checkpoint) -> GenerationSettings:
    """The settings that change tokens. Raises InputError for values that are none."""
    document = _document(checkpoint)
    fields = {name: document[name] for name in FOLLOWED if document.get(name) is not None}
    for name in TOKEN_LISTS:
        if name in fields:
            fields[name] = _token_ids(fields[name], name, checkpoint)
    if "min_new_tokens" in fields:  # `generate` takes it in place of min_length
        fields.pop("min_length", None)
    try:
        return GenerationSettings(**fields, not_followed=_not_followed(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise _unusable(checkpoint, f"{name} {document[name]!r}", first["msg"]) from error


def read_generation_file(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """generation_config.json, None if there is none."""
    path = checkpoint.folder / GENERATION_FILE
    if not path.is_file():
        return None
    return read_object(path, noun="model's own file", do="restore it")


def _document(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The file; config.json plays no part then. Without it config.json, and what only its text part has."""
    document = read_generation_file(checkpoint)
    if document is not None:
        return document
    own = {name: value for name, value in checkpoint.config.items() if value is not None}
    return {**(checkpoint.config.get("text_config") or {}), **own}


def _not_followed(document: Mapping[str, Any]) -> tuple[str, ...]:
    looked_at = NEUTRAL | (DRAWN if document.get("do_sample") else {})
    return tuple(
        _shown(name, document[name])
        for name, neutral in looked_at.items()
        if document.get(name) is not None and document[name] not in neutral
    )


def _shown(name: str, value: Any) -> str:
    text = json.dumps(value)
    return f"{name}={text}" if len(text) <= LONGEST else name


def _token_ids(value: Any, name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """One id, several, or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise _unusable(checkpoint, f"{name} {value!r}", "token ids are whole numbers")
    return tuple(ids)


def _unusable(checkpoint: Checkpoint, got: str, reason: str) -> InputError:
    return InputError(
        f"{checkpoint.folder} asks for generation with {got}: {reason}",
        wanted=f"settings that transformers takes in {GENERATION_FILE}",
        do="correct or remove it",
    )
