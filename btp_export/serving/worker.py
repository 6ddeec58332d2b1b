"""The thread that runs the models: a batch at a time, each row with settings, stop texts and an end of its own."""

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from btp_export.console import note
from btp_export.drawing.kept_tokens import kept_mask
from btp_export.model.prompting import Encoded
from btp_export.running.detokenise import Detokeniser
from btp_export.running.generation import answers_for
from btp_export.running.runtime import BundleModel, Prefill
from btp_export.serving.gathering import Finish, Gathering, Job, KeptStage, Piece
from btp_export.serving.refusals import Refusal, defect, refused
from btp_export.serving.stops import Until
from graphs.records.errors import CheckError, InputError

Given = TypeVar("Given")


class Worker:
    """Takes batches from a queue and answers them. `models` has one for each profile."""

    def __init__(self, models: Mapping[str, BundleModel], gathering: Gathering) -> None:
        self._models, self._gathering = models, gathering
        self._thread = threading.Thread(target=self._work, name="btp-export worker", daemon=True)
        self._busy_since: float | None = None
        self.seconds_per_batch = 0.0  # of late

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for the end, which comes once the queue is closed and empty."""
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether batches are taken."""
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """How long the batch runs already that runs now."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _work(self) -> None:
        while jobs := self._gathering.take():
            start = self._busy_since = time.monotonic()
            self._answer(jobs)
            self._busy_since = None
            took = time.monotonic() - start
            # Of the last few batches: Retry-After follows a change of load, and one long answer does not decide it.
            self.seconds_per_batch = 0.8 * self.seconds_per_batch + 0.2 * took if self.seconds_per_batch else took

    def _answer(self, jobs: Sequence[Job]) -> None:
        """All of them; where a batch fails as a whole before anything was said, each by itself."""
        waiting = [job for job in jobs if not job.gone]
        if not waiting:
            return
        model, start = self._models[waiting[0].profile], time.monotonic()
        try:
            prefill = model.prefill(Encoded.joined([job.encoded for job in waiting]), same_pictures=True)
        except Exception as error:
            if len(waiting) == 1:
                waiting[0].send(_refusal(error))
            else:
                for job in waiting:
                    self._answer([job])
            return
        rows = [Row(job, model, prefill, place, start) for place, job in enumerate(waiting)]
        try:
            model.complete(prefill, [row.answer for row in rows])
        except Exception as error:
            for row in rows:
                row.fail(error)


class Row:
    """One job in its batch, from its first logits on.

    Everything that can go wrong with it alone, does: choosing a token and making text of it end this row only.
    """

    def __init__(self, job: Job, model: BundleModel, prefill: Prefill, place: int, start: float) -> None:
        self._job, self._model, self._prefill, self._place = job, model, prefill, place
        self._text, self._until = Detokeniser(model.prompter.tokens), Until(job.settings.stops)
        self._start, self._chosen = start, time.monotonic()
        self._done = False
        ids = job.encoded.input_ids
        [self.answer] = answers_for(model.spec, ids, room=job.room, chosen_by=job.settings.sampling)
        choose = self.answer.choose
        # A row that has ended still needs some token in its place of the batch; nobody reads what follows it.
        self.answer.choose = lambda new, logits: self._alone(lambda: choose(new, logits)) or 0
        self.answer.on_token = lambda token, is_last: self._alone(lambda: self._take(token, is_last))

    def fail(self, error: Exception) -> None:
        """End this row with an error, unless it is done."""
        self.answer.stopped = True
        if not self._done:
            self._done = True
            self._job.send(_refusal(error))

    def _alone(self, step: Callable[[], Given]) -> Given | None:
        """What the step gives, None where the row ends instead."""
        if self._job.gone:
            self.answer.stopped = True
            return None
        try:
            return step()
        except Exception as error:
            self.fail(error)
            return None

    def _take(self, token: int, is_last: bool) -> None:
        piece = self._until.add(self._text.add(token))
        if is_last and not self._until.found:
            piece += self._until.add(self._text.finish())
            piece += self._until.finish()
        if piece:
            self._job.send(Piece(piece))
        if is_last or self._until.found:
            self._finish(token)

    def _finish(self, token: int) -> None:
        self.answer.stopped = self._done = True
        job, model = self._job, self._model
        finish = Finish(
            reason="stop" if self._until.found or token in self.answer.ends else "length",
            prompt_tokens=job.encoded.lengths[0],
            completion_tokens=len(self.answer.ids),
            image_tokens=job.encoded.image_tokens,
            tokens_kept=tuple(stage.keep for stage in model.plan.stages),
            average_tokens=model.plan.average_tokens,
            profile=job.profile,
            batch=len(self._prefill.logits),
            same_pictures=self._prefill.vision_ms is None and not model.chain.is_whole,
            queue_seconds=self._start - job.arrived,
            prefill_seconds=self._chosen - self._start,
            decode_seconds=time.monotonic() - self._chosen,
        )
        job.send(replace(finish, kept=self._kept()) if job.settings.include_kept else finish)

    def _kept(self) -> tuple[KeptStage, ...]:
        plan = self._model.plan
        kept = [indices[self._place].tolist() for indices in self._prefill.kept]
        return tuple(
            KeptStage(stage.layer, tuple(tokens), _cells(kept_mask(plan.grid, tokens, plan.blocks)))
            for stage, tokens in zip(plan.stages, kept, strict=True)
        )


def _cells(mask: np.ndarray) -> tuple[str, ...]:
    return tuple("".join("1" if cell else "0" for cell in row) for row in mask)


def _refusal(error: Exception) -> Refusal:
    """What the caller is told; the reason of a defect goes to the log."""
    if isinstance(error, InputError):
        return refused(error)
    if isinstance(error, CheckError):
        note(f"error: {error.got}")
        return Refusal(error.got, 500, "server_error")
    note("error: " + "".join(traceback.format_exception(error)))
    return defect()
