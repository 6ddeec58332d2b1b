"""Texts to token ids and back, by the tokenizers library."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tokenizers import Tokenizer

from graphs.records.preprocess import TextSteps
from graphs.records.reading import read_file
from graphs.records.refusing import refusing

MOST_BYTES = 512 * 2**20

# What transformers' clean_up_tokenization takes out, one after another.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Tokens:
    """A tokenizer, with the settings that its own file has no place for."""

    def __init__(self, tokenizer: Tokenizer, *, split_special: bool = False, clean_up: bool = False) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = split_special
        self._tokenizer, self.clean_up = tokenizer, clean_up

    @staticmethod
    def open(path: Path, steps: TextSteps) -> "Tokens":
        """Read the tokenizer's file. Raises InputError if it is missing or damaged."""
        content = read_file(path, noun="tokenizer as exported", do="restore it", most=MOST_BYTES)
        with refusing(f"{path} is no readable tokenizer", wanted="the file as exported", do="restore it"):
            tokenizer = Tokenizer.from_buffer(content)
        return Tokens(tokenizer, split_special=steps.split_special, clean_up=steps.clean_up)

    def ids(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; with `add_special` those around it too, such as a begin token."""
        with _refusing():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def token(self, number: int) -> str | None:
        """The token of an id as the vocabulary has it."""
        with _refusing():
            token: str | None = self._tokenizer.id_to_token(number)
        return token

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        with _refusing():
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if self.clean_up:
            for spaced, plain in CLEAN_UP:
                text = text.replace(spaced, plain)
        return text


def _refusing() -> AbstractContextManager[None]:
    """For calls of the tokenizer: what it raises over our texts comes from its file."""
    return refusing("the tokenizer fails", wanted="the model's own tokenizer", do="restore its files")
