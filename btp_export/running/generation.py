"""The loop that generates tokens. There is no other: `run`, `eval`, `bench`, `verify` and lmms-eval all use this one.

Where logits come from is the caller's: the caches of a runtime, or graphs that are opened one part at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from btp_export.running import sampling
from btp_export.running.logit_rules import LogitRules
from btp_export.running.sampling import Sampling
from graphs.records.spec import ModelSpec

Array = np.ndarray[Any, np.dtype[Any]]
Choose = Callable[[Sequence[int], Array], int]  # tokens so far, logits [vocab] of the next one -> its id
Decode = Callable[[Sequence[int]], Array]  # the latest token of each of n samples -> logits [n, vocab]


@dataclass
class Answer:
    """One sample's tokens while they come.

    ends: tokens that end it, kept as its last. room: at most so many tokens.
    on_token: called after each token with its id and whether it was the last.
    stopped: set it to end the answer before that; nothing more is chosen.
    """

    choose: Choose
    ends: frozenset[int]
    room: int
    on_token: Callable[[int, bool], None] | None = None
    ids: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self.stopped or len(self.ids) >= self.room or (bool(self.ids) and self.ids[-1] in self.ends)

    def take(self, token: int) -> None:
        """Append a token, unless the answer is done."""
        if self.done:
            return
        self.ids.append(token)
        if self.on_token is not None:
            self.on_token(token, self.done)

    def without_end(self) -> list[int]:
        """The tokens, the end token left out."""
        ended = bool(self.ids) and self.ids[-1] in self.ends
        return self.ids[:-1] if ended else self.ids


def answers_for(
    spec: ModelSpec,
    prompts: Iterable[Sequence[int] | Array],
    *,
    room: int,
    chosen_by: Sampling = sampling.GREEDY,
    first: int = 0,
    endless: bool = False,
) -> list[Answer]:
    """An answer for each prompt (token ids, image tokens included), by the checkpoint's generation settings.

    `first` is the number of the first sample: sample n draws from its own generator, seeded with (seed, n). `endless`
    answers take no notice of end tokens.
    """
    ends = frozenset[int]() if endless else frozenset(spec.eos_token_ids)
    return [
        Answer(
            chooser(
                LogitRules(spec.generation, spec.eos_token_ids, prompt, room),
                chosen_by,
                np.random.default_rng((chosen_by.seed, number)),
            ),
            ends,
            room,
        )
        for number, prompt in enumerate(prompts, first)
    ]


def chooser(rules: LogitRules, chosen_by: Sampling, generator: np.random.Generator) -> Choose:
    """Choosing one sample's tokens: by `chosen_by`, with draws from `generator`, of logits under the rules."""
    return lambda new, logits: rules.choose(new, logits, lambda scores: chosen_by.choose(scores, generator))


def generate(answers: Sequence[Answer], logits: Array, decode: Decode) -> None:
    """Grow all answers until each is done, from `logits` [n, vocab] of their next tokens.

    An answer that is done earlier goes on getting its last token decoded (token 0 if it has none), which nobody looks
    at: batches are of one size.
    """
    while True:
        for answer, row in zip(answers, logits, strict=True):
            if not answer.done:
                answer.take(answer.choose(answer.ids, row))  # does nothing if choosing stopped the answer
        if all(answer.done for answer in answers):
            return
        logits = decode([answer.ids[-1] if answer.ids else 0 for answer in answers])
