"""What a checkpoint's generation settings do to the logits of the next token, as transformers' `generate` does it.

transformers' logits processors, without torch, one sample at a time, in the order in which `generate` applies them.
Everything is computed in float32, so that ties and roundings are the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphs.records.generation import GenerationSettings

Vector = np.ndarray[Any, np.dtype[Any]]
NEVER = np.float32(-np.inf)


class LogitRules:
    """The rules for one sample.

    Args:
        settings: the checkpoint's.
        ends: its end tokens.
        prompt: token ids of the whole prompt, image tokens included, as `generate` gets them: penalties count them too.
        room: how many tokens may be generated; a forced end token stands at the last of them.
    """

    def __init__(
        self, settings: GenerationSettings, ends: Sequence[int], prompt: Sequence[int] | Vector, room: int
    ) -> None:
        self._settings, self._ends, self._room = settings, list(ends), room
        self._prompt = np.asarray(prompt, np.int64)
        self._in_prompt = np.unique(self._prompt)  # few, however many tokens an image has
        # As in `generate`, an end token by itself is no bad word.
        self._bad_words = [
            np.array(word) for word in settings.bad_words_ids if len(word) > 1 or (word and word[0] not in self._ends)
        ]
        self._neutral = not settings.change_logits

    def __call__(self, new: Sequence[int], logits: Vector) -> Vector:
        """Logits [vocab] of the token after the `new` ones, as the next token is chosen from them."""
        if self._neutral:
            return logits
        settings = self._settings
        scores = logits.astype(np.float32)
        context = np.concatenate([self._prompt, np.asarray(new, np.int64)])
        seen = np.concatenate([self._in_prompt, np.asarray(new, np.int64)])
        _penalise(scores, self._in_prompt, 1 / settings.encoder_repetition_penalty)
        _penalise(scores, seen, settings.repetition_penalty)
        _ban(scores, _followers(context, context, settings.no_repeat_ngram_size))
        _ban(scores, _followers(self._prompt, context, settings.encoder_no_repeat_ngram_size))
        for word in self._bad_words:
            if _ends_with(context, word[:-1]):
                _ban(scores, word[-1:])
        if len(context) < settings.min_length or len(new) < settings.min_new_tokens:
            _ban(scores, np.array(self._ends, np.int64))
        if settings.forced_eos_token_id and len(new) == self._room - 1:
            scores[:] = NEVER
            scores[list(settings.forced_eos_token_id)] = 0
        _ban(scores, np.array(settings.suppress_tokens, np.int64))
        if not new:
            _ban(scores, np.array(settings.begin_suppress_tokens, np.int64))
        return scores


def _penalise(scores: Vector, ids: Vector, penalty: float) -> None:
    """Make tokens that occurred less likely (penalty > 1), each once however often it occurred."""
    if penalty == 1.0:
        return
    seen = np.unique(ids[ids < len(scores)])
    score = scores[seen]
    scores[seen] = np.where(score < 0, score * penalty, score / penalty)


def _ban(scores: Vector, ids: Vector) -> None:
    scores[ids[ids < len(scores)]] = NEVER


def _followers(text: Vector, context: Vector, size: int) -> Vector:
    """The tokens that would complete an n-gram of `text` after the last size - 1 tokens of `context`."""
    if size == 0 or len(context) < size or len(text) < size:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(text, size)
    matches = (windows[:, :-1] == context[len(context) + 1 - size :]).all(axis=1)
    return np.asarray(windows[matches, -1])


def _ends_with(context: Vector, start: Vector) -> bool:
    """Whether the context ends with `start`; it does with nothing."""
    return len(start) <= len(context) and bool((context[len(context) - len(start) :] == start).all())
