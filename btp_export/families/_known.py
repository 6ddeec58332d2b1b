"""What a family says of its published models: their names, and what their checkpoints look like without the weights.

Everything here is data. `btp_export/model/open_model.py` finds models by these names, `btp_export/dummy/` writes
checkpoints in these shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class KnownModel:
    """A published model: its name on the command line, its repository on the hub, the numbers of its config.json."""

    name: str
    repository: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class DummyProcessor:
    """Tokenizer, chat template and processor of a family's dummy checkpoints.

    special: special tokens at the ids they have in the published tokenizer.
    named: which of them are unk_token, bos_token, eos_token and pad_token; one with a bos_token begins every text.
    extra: what else the processor calls them, such as image_token.
    opening: Jinja text before the first message, as many tokens long as the published template's.
    start, image, end, answer: Jinja expressions for the begin of a message, its picture, its end, and what comes before
    the answer.
    save: writes tokenizer and processor files, given config.json, tokenizer, chat template and folder.
    """

    special: Mapping[str, int]
    named: Mapping[str, str]
    extra: Mapping[str, str]
    opening: str
    start: str
    image: str
    end: str
    answer: str
    save: Callable[[Mapping[str, Any], "PreTrainedTokenizerFast", str, Path], None]
