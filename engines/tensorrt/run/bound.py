"""An engine's execution context, and the engine over fixed addresses.

Not yet run on a GPU; see engines/tensorrt/run/runner.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.runners import cuda
from engines.runners.interface import Buffer
from engines.tensorrt.records import EnginesRecord
from engines.tensorrt.run.session import Session, explain
from graphs.records.errors import BtpError


class Context:
    """An engine's execution context, and whose addresses it has."""

    def __init__(self, engine: Any, path: Path, record: EnginesRecord, session: Session) -> None:
        self.path, self.record, self.session = path, record, session
        self._scratch_bytes = int(engine.device_memory_size_v2)
        with self.session.stream.lock:
            self.session.scratch.reserve(self._scratch_bytes)
        self._context = engine.create_execution_context(
            self.session.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise self.explain("open")
        self._state: tuple[object, int] | None = None
        self._changes = 0

    def use(self, owner: object, buffers: Mapping[str, Buffer]) -> int:
        """Set the addresses of `owner`'s buffers and of the scratch memory; how often they have changed so far."""
        scratch = self.session.scratch
        state = (owner, scratch.pointer)
        if self._state == state:
            return self._changes
        for name, buffer in buffers.items():
            if not self._context.set_tensor_address(name, buffer.pointer):
                raise self.explain("bind")
        if self._scratch_bytes:
            self._context.set_device_memory(scratch.pointer, scratch.size)
        self._state = state
        self._changes += 1
        return self._changes

    def enqueue(self) -> None:
        """Put the engine on the stream."""
        self.session.log.clear()
        if not self._context.execute_async_v3(self.session.stream.handle):
            raise self.explain("run")

    def explain(self, doing: str) -> BtpError:
        """The error that TensorRT's log tells of."""
        return explain(self.session.log.errors, self.path, doing, self.record)


class TrtBound:
    """An engine over fixed addresses. `graph`: its name."""

    def __init__(self, graph: str, context: Context, buffers: Mapping[str, Buffer]) -> None:
        self.graph, self._context = graph, context
        self._buffers = dict(buffers)  # kept so that the memory lives as long as its addresses are bound
        self._owner = object()  # stands for this binding in the context, which must not keep it alive

    def __call__(self) -> None:
        session = self._context.session
        cuda.use_device(session.device)
        with session.stream.lock:
            self.attach()
            self.enqueue()
        session.stream.finish()

    def attach(self) -> int:
        """Give the engine these addresses if it has others; a number that changes whenever an address of it does."""
        return self._context.use(self._owner, self._buffers)

    def enqueue(self) -> None:
        """Put the engine, which has these addresses, on the stream."""
        self._context.enqueue()
