"""A bundle as a Ray Serve application: one replica a GPU, as many as there is work for.

    serve run btp_export.serving:ray_app bundle=my-bundle replicas=2
    serve.run(btp_export.serving.ray_app(bundle="my-bundle", replicas=2))

`Front` takes the requests (limits, key, OpenAI's form) and `Replica` holds a bundle with its own queue, worker and
process for pictures, as `btp-export serve` has them. A replica that ends takes no request with it whose answer has not
begun: another gets it. Every machine reads the bundle at the same path.
"""

import contextlib
import inspect
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from btp_export.serving.app import make_app
from btp_export.serving.gathering import Event
from btp_export.serving.limits import Limits
from btp_export.serving.refusals import Refusal, full
from btp_export.serving.schemas import ChatRequest
from btp_export.serving.service import Service, Serving, describe
from graphs.files.bundle import Bundle
from graphs.records.record import Record
from graphs.records.stored_weights import Activations

KEY_VARIABLE = "BTP_EXPORT_API_KEY"
TRIES = 5  # replicas that may end under one request


class RayOptions(Record):
    """What an application is made of; on the command line of `serve run` as key=value.

    surge: how many more replicas there may be while a new bundle takes over, in percent of them, at least one; with 0 a
    replica ends before the one that replaces it begins.
    replicas: how many, or at least how many where max_replicas says that there may be more. gpus, cpus: of each
    replica; without, one GPU where the bundle runs on one, and one CPU. The others are options of `btp-export serve`.
    """

    bundle: Path
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    name: str | None = None
    profile: str | None = None
    max_wait: float = Field(default=5.0, ge=0)
    queue: int = Field(default=64, ge=1)
    timeout: float = Field(default=120.0, ge=1)
    resize: bool = False
    device: str = "cpu"
    target: str | None = None
    threads: int | None = None
    activations: Activations = "int8"
    cuda_graphs: bool = True
    surge: int = Field(default=25, ge=0, le=100)
    cpus: float = 1.0
    gpus: float | None = None


def ray_app(options: Mapping[str, Any] | RayOptions | None = None, /, **named: Any) -> serve.Application:
    """The application for `serve.run`; the options are those of RayOptions, by name or in one mapping.

    The API key is what BTP_EXPORT_API_KEY holds here. Raises InputError for a bundle that cannot be opened, and
    pydantic's ValidationError for options that are none.
    """
    given = options if isinstance(options, RayOptions) else RayOptions.model_validate({**(options or {}), **named})
    bundle = Bundle.open(given.bundle)
    serving = Serving(
        name=given.name or bundle.manifest.model.name,
        profiles=() if given.profile is None else (given.profile,),
        wait=given.max_wait / 1000,
        resize=given.resize,
        target=given.target,
        device=given.device,
        threads=given.threads,
        activations=given.activations,
        cuda_graphs=given.cuda_graphs,
        limits=Limits(seconds=given.timeout, queue=given.queue),
    )
    most = given.max_replicas or given.replicas
    batch = max(profile.batch for profile in bundle.manifest.profiles)
    on_gpu = given.target is not None or given.device.startswith("cuda")
    replica = serve.deployment(Replica).options(
        max_ongoing_requests=batch + given.queue,
        max_queued_requests=most * given.queue,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": on_gpu if given.gpus is None else given.gpus},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=given.timeout,
        max_surge_percent=given.surge,
        **_scale(given, batch),
    )
    place = os.path.abspath(given.bundle)
    # The digest is an argument, so that another bundle at the same path is another version, and is rolled out.
    held = replica.bind(place, bundle.manifest.manifest_sha256, serving)
    places = most * (batch + given.queue)
    front = serve.deployment(serve.ingress()(Front)).options(
        max_ongoing_requests=places + 16,  # so that one more is refused here, in OpenAI's form
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,
        graceful_shutdown_timeout_s=given.timeout,
    )
    return front.bind(
        held, serving.name, describe(bundle, serving), serving.limits, places, os.environ.get(KEY_VARIABLE)
    )


# `serve run` calls builders of exactly one parameter.
ray_app.__dict__["__signature__"] = inspect.Signature(
    [inspect.Parameter("options", inspect.Parameter.POSITIONAL_ONLY, annotation=dict[str, str])]
)


def _scale(given: RayOptions, batch: int) -> dict[str, Any]:
    """A fixed number of replicas, or as many as the requests under way fill batches."""
    if given.max_replicas is None:
        return {"num_replicas": given.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": given.replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": 2 * batch,  # one batch that runs, and one that gathers
        }
    }


class Replica:
    """One bundle on one device."""

    def __init__(self, bundle: str, digest: str | None, serving: Serving) -> None:
        self._service = Service(Bundle.open(Path(bundle)), serving)
        self._started = False

    async def check_health(self) -> None:
        """Called before the first request and then every few seconds. Raises RuntimeError where no answers come."""
        if not self._started:
            await self._service.start()
            self._started = True
        trouble = self._service.trouble()
        if trouble is not None:
            raise RuntimeError(trouble)

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The answer's events; a refusal is the last of them."""
        try:
            async with contextlib.aclosing(self._service.answer(request)) as events:
                async for event in events:
                    yield event
        except Refusal as refusal:
            yield refusal

    async def process_id(self) -> int:
        """Of this replica."""
        return os.getpid()


class Front:
    """Takes the requests: an application whose service are the replicas."""

    def __init__(
        self, held: Any, name: str, description: dict[str, Any], limits: Limits, places: int, api_key: str | None
    ) -> None:
        self._held, self._places, self._api_key = held, places, api_key
        self.name, self.description, self.limits = name, description, limits
        self._under_way = 0

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self, api_key=self._api_key)

    @property
    def numbers(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Numbers for /metrics; those of the replicas are Ray's own."""
        return {"under_way": ("Requests that are not answered yet.", lambda: float(self._under_way))}

    def trouble(self) -> str | None:
        """Ray replaces replicas that do not answer, so there is none to tell of."""
        return None

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests under way. Raises Refusal if there is none."""
        if self._under_way >= self._places:
            raise full(1)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The answer of one of the replicas. Raises Refusal."""
        for _ in range(TRIES):
            said = False
            held = list[Event]()
            try:
                async with contextlib.aclosing(self._asked(request)) as events:
                    async for event in events:
                        if isinstance(event, Refusal):
                            raise event
                        if request.stream:
                            said = True
                            yield event
                        else:
                            held.append(event)  # nothing is out of hand before all of it is there
                for event in held:
                    yield event
                return
            except BackPressureError as error:
                raise full(1) from error
            except (RayActorError, DeploymentUnavailableError) as error:
                if said:
                    raise Refusal("the answer broke off", 503, "server_error", retry_after=1) from error
        raise Refusal("no replica answers", 503, "server_error", retry_after=5)

    async def _asked(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """One try; a caller that goes away ends it in the replica too."""
        events = self._held.options(stream=True).answer.remote(request)
        whole = False
        try:
            async for event in events:
                yield event
            whole = True
        finally:
            if not whole:
                with contextlib.suppress(RayServeException, RayActorError):
                    events.cancel()
