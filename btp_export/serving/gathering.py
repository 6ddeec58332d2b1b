"""The queue: requests wait here until a batch of their profile is full, or the first of them has waited long enough."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from btp_export.model.prompting import Encoded
from btp_export.serving.questions import Settings
from btp_export.serving.refusals import Refusal, full


@dataclass(frozen=True)
class Piece:
    """The next text of an answer."""

    text: str


@dataclass(frozen=True)
class KeptStage:
    """The image tokens that a stage kept: indices into all V, and the picture's grid row by row, 1 where it is kept."""

    layer: int
    tokens: tuple[int, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    reason: OpenAI's word for why it ended. prompt_tokens: of the unpruned prompt, image_tokens of them the picture's;
    tokens_kept: image tokens that each stage kept. batch: how many requests shared it, same_pictures: whether its
    pictures were those of the batch before. kept: if it was asked for.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    tokens_kept: tuple[int, ...]
    average_tokens: float
    profile: str
    batch: int
    same_pictures: bool
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    kept: tuple[KeptStage, ...] | None = None


Event = Piece | Finish | Refusal


@dataclass(eq=False)
class Job:
    """A request that can be run.

    send: takes the events of its answer, in order; the last is a Finish or a Refusal. gone: nobody waits any more.
    """

    profile: str
    encoded: Encoded
    settings: Settings
    room: int
    send: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False


class Gathering:
    """Jobs by profile, for one thread that takes batches and any number that put jobs in.

    Args:
        batches: the batch of each profile.
        wait: seconds that the first job of a batch waits for others at most.
        most: how many jobs may wait.
    """

    def __init__(self, batches: Mapping[str, int], *, wait: float, most: int) -> None:
        self._batches, self._wait, self._most = batches, wait, most
        self._queues: dict[str, list[Job]] = {profile: [] for profile in batches}
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return self._count()

    def put(self, job: Job, retry_after: int = 1) -> None:
        """Let a job wait. Raises Refusal if too many do, or if no batches are taken any more."""
        with self._changed:
            if self._closed:
                raise Refusal("the server is shutting down", 503, "server_error", retry_after=retry_after)
            if self._count() >= self._most:
                raise full(retry_after)
            self._queues[job.profile].append(job)
            self._changed.notify()  # the one thread that takes batches

    def drop(self, job: Job) -> None:
        """Nobody waits for it any more: its place is free, and where it runs already its answer ends."""
        with self._changed:
            job.gone = True
            if job in self._queues[job.profile]:
                self._queues[job.profile].remove(job)

    def take(self) -> list[Job]:
        """The next batch: at least one job, all of one profile; none once it is closed and empty."""
        with self._changed:
            while True:
                ready = self._ready()
                if ready is not None:
                    queue = self._queues[ready]
                    jobs, queue[:] = queue[: self._batches[ready]], queue[self._batches[ready] :]
                    return jobs
                if self._closed:
                    return []
                # Until the first job has waited long enough; a job that comes meanwhile may fill a batch and wakes us.
                oldest = [queue[0].arrived for queue in self._queues.values() if queue]
                self._changed.wait(min(oldest) + self._wait - time.monotonic() if oldest else None)

    def hurry(self) -> None:
        """From now on nobody waits for others."""
        with self._changed:
            self._wait = 0.0
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more jobs; those that wait are still run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ready(self) -> str | None:
        """The profile whose batch is full or has waited long enough, the one with the oldest job among several."""
        over = time.monotonic() - self._wait
        ready = [
            (queue[0].arrived, profile)
            for profile, queue in self._queues.items()
            if queue and (self._closed or len(queue) >= self._batches[profile] or queue[0].arrived <= over)
        ]
        return min(ready)[1] if ready else None

    def _count(self) -> int:
        return sum(map(len, self._queues.values()))
