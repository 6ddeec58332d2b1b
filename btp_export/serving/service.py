"""A bundle that answers requests: pictures and prompts are prepared in another process, batches run in one thread."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from btp_export import console
from btp_export.serving.addresses import picture_bytes
from btp_export.serving.deadlines import within
from btp_export.serving.gathering import Event, Finish, Gathering, Job
from btp_export.serving.limits import Access, Limits
from btp_export.serving.preparing_client import PreparingClient
from btp_export.serving.preparing_process import Options
from btp_export.serving.questions import Settings, question_of, settings_of
from btp_export.serving.refusals import Refusal, full
from btp_export.serving.schemas import ChatRequest
from btp_export.serving.worker import Worker
from graphs.files.bundle import Bundle
from graphs.records.shapes import ShapeProfile
from graphs.records.stored_weights import Activations

if TYPE_CHECKING:
    from btp_export.running.runtime import BundleModel

Made = TypeVar("Made")


@dataclass(frozen=True)
class Serving:
    """What is served and how.

    name: the model's, as requests name it. profiles: those of the bundle that are loaded, all if none is named.
    wait: seconds that the first request of a batch waits for others. resize: pictures that fit no profile are scaled.
    target, device, threads, activations, cuda_graphs: as `btp_export.load` takes them.
    """

    name: str
    profiles: tuple[str, ...] = ()
    wait: float = 0.005
    resize: bool = False
    target: str | None = None
    device: str = "cpu"
    threads: int | None = None
    activations: Activations = "int8"
    cuda_graphs: bool = True
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)


class Service:
    """Answers requests about pictures with one bundle on one device."""

    def __init__(self, bundle: Bundle, serving: Serving) -> None:
        """Load the models. Raises InputError and UnavailableError as `btp_export.load`."""
        self._bundle, self.serving = bundle, serving
        self.profiles = served_profiles(bundle, serving)
        self._models = {profile.name: self._load(profile.name) for profile in self.profiles}
        limits = serving.limits
        self._gathering = Gathering(
            {profile.name: profile.batch for profile in self.profiles}, wait=serving.wait, most=limits.queue
        )
        self._worker = Worker(self._models, self._gathering)
        self._preparing = PreparingClient(
            Options(
                bundle=str(bundle.root),
                profiles=tuple(profile.name for profile in self.profiles),
                resize=serving.resize,
                seconds=limits.prepare_seconds,
                memory=limits.prepare_memory,
                pixels=limits.pixels,
            )
        )
        self._under_way = 0

    def _load(self, profile: str) -> "BundleModel":
        from btp_export.running.runtime import load

        chosen = self.serving
        model = load(
            self._bundle,
            profile=profile,
            threads=chosen.threads,
            device=chosen.device,
            target=chosen.target,
            activations=chosen.activations,
            cuda_graphs=chosen.cuda_graphs,
            note=console.note,
        )
        _ = model.prompter  # opened now: the first request must not wait for it, and must not be what finds it broken
        return model

    async def start(self) -> None:
        """Begin to answer. Raises BtpError if the bundle's processor cannot be used."""
        await self._preparing.start()
        self._worker.start()

    def hurry(self) -> None:
        """The end is near: requests that wait for others to fill their batch wait no longer."""
        self._gathering.hurry()

    async def stop(self, grace: float = 10.0) -> None:
        """Answer what waits, for `grace` seconds at most, and end."""
        self._gathering.close()
        await asyncio.to_thread(self._worker.join, grace)
        await self._preparing.stop()

    @property
    def name(self) -> str:
        """The model's, as requests name it."""
        return self.serving.name

    @property
    def limits(self) -> Limits:
        """The most that a request may take."""
        return self.serving.limits

    @property
    def description(self) -> dict[str, Any]:
        """What there is to know of the model."""
        return describe(self._bundle, self.serving)

    @property
    def numbers(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Numbers for /metrics that are asked for when they are read."""
        return {
            "queue": ("Requests that wait for a batch.", lambda: float(len(self._gathering))),
            "under_way": ("Requests that are not answered yet.", lambda: float(self._under_way)),
        }

    def trouble(self) -> str | None:
        """Why no answers come any more, None if they do."""
        if not self._worker.alive:
            return "the worker has ended"
        # A batch's requests have all been given up after `seconds`: what runs twice as long does not end by itself.
        if self._worker.busy_seconds > 2 * self.serving.limits.seconds:
            return f"a batch runs for {self._worker.busy_seconds:.0f} s"
        return None

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        batch = min(profile.batch for profile in self.profiles)  # the one that empties the queue slowest
        return max(1, math.ceil(self._worker.seconds_per_batch * len(self._gathering) / batch))

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that are under way. Raises Refusal if there is none."""
        # Those that wait, and those in the batch that runs.
        most = self.serving.limits.queue + max(profile.batch for profile in self.profiles)
        if self._under_way >= most:
            raise full(self.retry_after())
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The answer as it comes, a Finish at its end. Raises Refusal for a request that gets none.

        A caller that ends the iteration (or is cancelled) frees its place in the queue or the batch.
        """
        deadline = time.monotonic() + self.serving.limits.seconds
        if request.model != self.serving.name:
            raise Refusal(
                f"no model {request.model!r:.100}; wanted: {self.serving.name}",
                404,
                code="model_not_found",
                param="model",
            )
        question, settings = question_of(request), settings_of(request)
        limits, access = self.serving.limits, self.serving.access
        picture = await self._in_time(asyncio.to_thread(picture_bytes, question.picture, access, limits), deadline)
        profile, encoded = await self._in_time(self._preparing.prepare(question, picture), deadline)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(profile, encoded, settings, self._room(profile, settings), _sender(loop, events))
        self._gathering.put(job, self.retry_after())
        try:
            while True:
                event = await self._in_time(events.get(), deadline)
                if isinstance(event, Refusal):
                    raise event
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            self._gathering.drop(job)

    def _room(self, profile: str, settings: Settings) -> int:
        """Most tokens of the answer. Raises Refusal for more than the profile's caches hold."""
        room = self._models[profile].profile.new_tokens
        if settings.room is not None and settings.room > room:
            raise Refusal(
                f"max_tokens {settings.room}; wanted: 1 to {room}, the room of this model", param="max_tokens"
            )
        return settings.room or room

    async def _in_time(self, step: Awaitable[Made], deadline: float) -> Made:
        try:
            return await within(max(deadline - time.monotonic(), 0.001), step)
        except asyncio.TimeoutError as error:
            limit = self.serving.limits.seconds
            raise Refusal(f"no answer within {limit:g} s", 504, "server_error", "timeout") from error


def served_profiles(bundle: Bundle, serving: Serving) -> Sequence[ShapeProfile]:
    """The profiles that requests may use. Raises InputError for a name that is none's."""
    names = serving.profiles or tuple(profile.name for profile in bundle.manifest.profiles)
    return [bundle.profile(name) for name in dict.fromkeys(names)]


def describe(bundle: Bundle, serving: Serving) -> dict[str, Any]:
    """What there is to know of a model: what it is made of, and the pictures and texts it takes; JSON types."""
    return {
        "fingerprint": fingerprint(bundle),
        "profiles": [
            {
                "name": profile.name,
                "batch": profile.batch,
                "image_size": list(profile.image_size),
                "text_tokens": profile.text_tokens,
                "new_tokens": profile.new_tokens,
                "image_tokens": profile.image_tokens,
                "tokens_kept": [stage.keep for stage in bundle.plan_for(profile.name).stages],
            }
            for profile in served_profiles(bundle, serving)
        ],
    }


def fingerprint(bundle: Bundle) -> str:
    """Tells bundles apart that answer under the same name."""
    return f"btp-{(bundle.manifest.manifest_sha256 or bundle.manifest.plan.sha256)[:16]}"


def _sender(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]") -> Callable[[Event], None]:
    """Puts events in from another thread; those of a loop that has ended go nowhere."""

    def send(event: Event) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return send
