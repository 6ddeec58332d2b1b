"""A model's processor as preprocess.json describes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from btp_export.preprocess.pixels import Pixels, pixel_values
from btp_export.preprocess.template import render
from btp_export.preprocess.tokens import Tokens
from graphs.records.errors import InputError
from graphs.records.preprocess import PREPROCESS, Preprocess
from graphs.records.reading import read_file
from graphs.records.record import parse_record

MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Processor:
    """From pictures and texts to what the model takes. `folder` is where its files are, for messages."""

    steps: Preprocess
    tokens: Tokens
    folder: Path

    @property
    def image_token(self) -> str:
        """What stands for a picture in a text, and for each of its tokens once it is expanded."""
        return self.steps.text.image_token

    @property
    def begin_token(self) -> str | None:
        """What begins every text, for tokenizers that have it."""
        return self.steps.text.special.get("bos_token")

    def pixels(self, picture: Image.Image) -> Pixels:
        """Of one RGB picture, see `pixel_values`."""
        return pixel_values(picture, self.steps.picture)

    def ids(self, text: str, image_tokens: int) -> list[int]:
        """Token ids of a whole text, each placeholder in it expanded to so many image tokens.

        A begin token is put before a text that does not begin with it, where the tokenizer does that.
        """
        begin = self.begin_token
        expanded = text.replace(self.image_token, self.image_token * image_tokens)
        return self.tokens.ids(expanded, add_special=not (begin and text.startswith(begin)))

    def rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The messages in the chat template. Raises what `template.render` does, InputError without a template."""
        template = self.steps.text.template
        if not template:
            raise InputError(
                f"{self.folder} has no chat template",
                wanted="chat_template.jinja, or a template in tokenizer_config.json",
                do=f"add it, or give the whole text with {self.image_token} in it and --raw-prompt",
            )
        return render(template, messages, self.steps.text.special)


def read_processor(folder: Path) -> Processor:
    """The processor of a bundle's folder with preprocess.json. Raises InputError for files that are damaged."""
    path, noun = folder / PREPROCESS, "description of the processor"
    text = read_file(path, noun=noun, do="export the bundle again", most=MOST_BYTES)
    steps = parse_record(Preprocess, text, source=path, noun=noun)
    return Processor(steps, Tokens.open(folder / steps.text.tokenizer, steps.text), folder)
