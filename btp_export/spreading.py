"""Work on many samples spread over a Ray cluster, the results in order as one process would have made them.

Every machine needs this package, and what is read (bundles, checkpoints) at the same path.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from btp_export.extras import SERVE, naming
from graphs.records.errors import InputError, UnavailableError

Result = TypeVar("Result")
PART = 16  # samples of a part, whatever the cluster: a run that goes on may have another
ANSWERS_WITHIN = 10.0  # seconds, of a cluster's address; Ray itself tries for a quarter of an hour


class Cluster:
    """A Ray cluster that is connected."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    @property
    def cores(self) -> int:
        """Of all machines together."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def results(
        self, function: Callable[..., Result], parts: Sequence[tuple[Any, ...]], *, cpus: int = 1
    ) -> Iterator[tuple[int, Result]]:
        """(number of the part, function(*part)) of each, as they are done.

        `function` is one of a module. A part whose machine goes away is done again elsewhere. Raises what it raises.
        """
        remote = self._ray.remote(function).options(num_cpus=cpus, max_retries=3)
        numbers = {remote.remote(*part): number for number, part in enumerate(parts)}
        waiting = list(numbers)
        try:
            while waiting:
                [done], waiting = self._ray.wait(waiting, num_returns=1)
                yield numbers[done], self._result(done)
        finally:
            if self._ray.is_initialized():  # one that is gone has nothing to cancel, and asking starts another
                for reference in waiting:
                    self._ray.cancel(reference)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise UnavailableError(
                f"the Ray cluster lost a part of the work: {_first_line(error)}",
                wanted="machines that stay",
                do="run it again: what is done is kept",
            ) from error

    def share(self, value: Any) -> Any:
        """The value as an argument of many parts: it is sent to each machine once."""
        return self._ray.put(value)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """The cluster at an address: "auto", "host:6379", "ray://host:10001", or "local" for one of this machine's own.

    None for no address. Raises UnavailableError if Ray is not installed or nothing answers there.
    """
    if address is None:
        yield None
        return
    if not address.strip():
        raise InputError("--ray without an address", wanted="auto, local or host:port", do="--ray auto")
    with naming(SERVE):
        import ray
    own = not ray.is_initialized()
    if own:
        try:
            _require_answer(address)
            with _own_signals():
                ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
        except (ConnectionError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise UnavailableError(
                f"no Ray cluster at {address}: {_first_line(error)}",
                wanted="the address of one that runs",
                do="ray start --head starts one; --ray local uses this machine",
            ) from error
    try:
        yield Cluster(ray)
    finally:
        if own:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OSError if the address is host:port, or ray://host:port, and nothing listens there."""
    host, _, port = address.strip().removeprefix("ray://").rpartition(":")
    if host and port.isascii() and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """SIGTERM goes on to mean what it meant: Ray would end the process with an exit code of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    """Ray's errors go on with its logs."""
    return (str(error).splitlines() or [type(error).__name__])[0]
