"""Text from token ids as they come, in pieces that never have to be taken back."""

import re
from typing import Any

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokeniser:
    """Gives text piece by piece; the pieces together are `tokenizer.decode` of all ids without special tokens.

    A piece is held back while its end may still change: an unfinished UTF-8 character (it decodes to the replacement
    character), and a run of single-byte tokens, which a byte-fallback tokenizer decodes only as a whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._given = ""

    def add(self, token_id: int) -> str:
        """Take one more id; returns the text that is certain now, maybe empty."""
        self._ids.append(token_id)
        text = self._decode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        # A special token has no text and does not end a run of bytes either.
        if token_id in self._special or (isinstance(token, str) and BYTE_TOKEN.fullmatch(token)):
            return ""
        return self._give(text.rstrip(REPLACEMENT))

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._decode())

    @property
    def text(self) -> str:
        """Everything given so far."""
        return self._given

    def _decode(self) -> str:
        # Cleaning up spaces would change text that was already given ("do n" -> "don't").
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):  # cannot happen for the decoders above; never take text back
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece
