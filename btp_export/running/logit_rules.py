"""What a checkpoint's generation settings do to the logits of the next token, as transformers' `generate` does it.

transformers' logits processors, without torch, one sample at a time, in the order in which `generate` applies them.
Everything is computed in float32, so that ties and roundings are the same.
"""

from collections.abc import Callable, Sequence
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
        self._settings, self._room = settings, room
        self._prompt = np.asarray(prompt, np.int64)
        self._in_prompt = np.unique(self._prompt)  # few, however many tokens an image has
        self._context, self._seen = _Grown(self._prompt, room), _Distinct(self._in_prompt, room)
        self._ends = np.array(list(ends), np.int64)
        # As in `generate`, an end token by itself is no bad word.
        self._bad_words = [
            np.array(word) for word in settings.bad_words_ids if len(word) > 1 or (word and word[0] not in self._ends)
        ]
        self._suppressed = np.array(settings.suppress_tokens, np.int64)
        self._suppressed_first = np.array(settings.begin_suppress_tokens, np.int64)
        self._forced = list(settings.forced_eos_token_id)
        self._neutral = not settings.change_logits

    def __call__(self, new: Sequence[int], logits: Vector) -> Vector:
        """Logits [vocab] of the token after the `new` ones, as the next token is chosen from them."""
        return logits if self._neutral else self._applied(new, logits.astype(np.float32), [])

    def choose(self, new: Sequence[int], logits: Vector, chosen: Callable[[Vector], int]) -> int:
        """What `chosen` takes of the logits [vocab] under the rules.

        Rules change few of the many logits, so they are changed where they are while it chooses, and put back.
        """
        if self._neutral or logits.dtype != np.float32 or not logits.flags.writeable:
            return chosen(self(new, logits))
        former: list[tuple[Any, Vector]] = []
        try:
            return chosen(self._applied(new, logits, former))
        finally:
            for ids, values in reversed(former):
                logits[ids] = values

    def _applied(self, new: Sequence[int], logits: Vector, former: list[tuple[Any, Vector]]) -> Vector:
        """The logits, changed in place. What stood there goes to `former` in the order of the changes."""
        settings, length = self._settings, len(self._prompt) + len(new)
        scores = _Scores(logits, former)
        scores.penalise(self._in_prompt, 1 / settings.encoder_repetition_penalty)
        if settings.repetition_penalty != 1.0:
            scores.penalise(self._seen.with_new(new), settings.repetition_penalty)
        if self._bad_words or settings.no_repeat_ngram_size or settings.encoder_no_repeat_ngram_size:
            self._ban_by_context(scores, self._context.with_new(new))
        if length < settings.min_length or len(new) < settings.min_new_tokens:
            scores.ban(self._ends)
        if self._forced and len(new) == self._room - 1:
            scores.ban_all()
            scores.put(self._forced, np.float32(0), logits[self._forced])
        scores.ban(self._suppressed)
        if not new:
            scores.ban(self._suppressed_first)
        return logits

    def _ban_by_context(self, scores: "_Scores", context: Vector) -> None:
        """Ban tokens that would repeat an n-gram, and those that would complete bad words."""
        scores.ban(_followers(context, context, self._settings.no_repeat_ngram_size))
        scores.ban(_followers(self._prompt, context, self._settings.encoder_no_repeat_ngram_size))
        for word in self._bad_words:
            if _ends_with(context, word[:-1]):
                scores.ban(word[-1:])


class _Scores:
    """Logits [vocab] that are changed in place, and what stood there before each change."""

    def __init__(self, logits: Vector, former: list[tuple[Any, Vector]]) -> None:
        self._logits, self._former = logits, former

    def put(self, ids: Any, values: Any, former: Vector) -> None:
        """Change the logits of ids, which may be named more than once with the same value, from the `former` ones."""
        self._former.append((ids, former))
        self._logits[ids] = values

    def penalise(self, ids: Vector, penalty: float) -> None:
        """Make tokens less likely (penalty > 1), each once however often it is named."""
        if penalty == 1.0:
            return
        seen, score = self._of(ids)
        changed = score / penalty
        np.multiply(score, penalty, out=changed, where=score < 0)
        self.put(seen, changed, score)

    def ban(self, ids: Vector) -> None:
        if len(ids):
            there, score = self._of(ids)
            self.put(there, NEVER, score)

    def ban_all(self) -> None:
        self.put(slice(None), NEVER, self._logits.copy())

    def _of(self, ids: Vector) -> tuple[Vector, Vector]:
        """Those of the ids that have a logit, nearly always all, and the logits."""
        try:
            return ids, self._logits[ids]
        except IndexError:
            ids = ids[ids < len(self._logits)]
            return ids, self._logits[ids]


class _Grown:
    """An array of ids and new tokens behind them: of an answer that grows, only what came since is written."""

    def __init__(self, ids: Vector, room: int) -> None:
        self._ids = np.concatenate([ids, np.zeros(room, np.int64)])
        self._first, self._new = len(ids), list[int]()

    def with_new(self, new: Sequence[int]) -> Vector:
        """The ids and `new`, as long as the next call."""
        there = len(self._new)
        if list(new[:there]) != self._new:  # another answer
            there = 0
        if self._first + len(new) > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(len(new), np.int64)])
        self._ids[self._first + there : self._first + len(new)] = new[there:]
        self._new[there:] = new[there:]
        return self._ids[: self._first + len(new)]


class _Distinct:
    """Different ids, and behind them new tokens that are not among them, each where it came first: of an answer that
    grows, only what came since is looked at.
    """

    def __init__(self, ids: Vector, room: int) -> None:
        self._ids, self._grown = frozenset(ids.tolist()), _Grown(ids, room)
        self._new, self._others = list[int](), dict[int, None]()

    def with_new(self, new: Sequence[int]) -> Vector:
        """The ids and those of `new`, as long as the next call."""
        there = len(self._new)
        if list(new[:there]) != self._new:  # another answer
            self._others, there = {}, 0
        self._others.update((token, None) for token in new[there:] if token not in self._ids)
        self._new[there:] = new[there:]
        return self._grown.with_new(list(self._others))


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
