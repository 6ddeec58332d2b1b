"""Text from token ids as they come, in pieces that never have to be taken back."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from btp_export.preprocess.tokens import Tokens

OnText = Callable[[int, str], None]
"""(number of the sample, text that is certain by now)"""

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# transformers' clean_up_tokenization takes spaces away by ten replacements one after another (" ." -> ".", " n't" ->
# "n't", ...). What comes later changes at most the characters that their patterns reach back, 19 in all.
CLEAN_UP_REACH = 19


class Detokeniser:
    """Gives text piece by piece; the pieces together are the text of all ids, without special tokens.

    A piece is held back while its end may still change: an unfinished UTF-8 character (it decodes to the replacement
    character), a run of single-byte tokens, which a byte-fallback tokenizer decodes only as a whole, and the last
    characters where the tokenizer takes spaces before punctuation away.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._reach = CLEAN_UP_REACH if tokens.clean_up else 0
        self._ids: list[int] = []
        self._given = ""
        self._byte_run = False

    def add(self, token_id: int) -> str:
        """Take one more id; returns the text that is certain now, maybe empty."""
        self._ids.append(token_id)
        token = self._tokens.token(token_id)
        is_byte = token is not None and BYTE_TOKEN.fullmatch(token) is not None
        # Within a run, bytes may still join over tokens that have no text: special ones, whether or not the tokenizer
        # lists them in `all_special_ids`.
        self._byte_run = is_byte or (self._byte_run and self._tokens.text([token_id]) == "")
        if self._byte_run:
            return ""
        text = self._tokens.text(self._ids)
        return self._give(text[: len(text) - self._reach].rstrip(REPLACEMENT) if len(text) > self._reach else "")

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._tokens.text(self._ids))

    @property
    def text(self) -> str:
        """Everything given so far."""
        return self._given

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):  # a text that was cut shorter than before: its rest comes later
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


@dataclass
class TextPieces:
    """One sample's text while its tokens come."""

    sample: int
    detokeniser: Detokeniser
    on_text: OnText | None

    def add(self, token_id: int, is_last: bool) -> None:
        """Take a token, and say the text that is certain by now."""
        piece = self.detokeniser.add(token_id)
        if is_last:
            piece += self.detokeniser.finish()
        if piece and self.on_text is not None:
            self.on_text(self.sample, piece)
