"""A sequence of engines and copies on the session's stream: put there step by step, or replayed as one CUDA graph.

The host starts hundreds of kernels one by one, which takes longer than some of them run. Captured as a graph they are
one launch. The first run is plain, because TensorRT finishes its setup in it; the second is captured, and all further
ones are replays as long as no engine gets other addresses. What cannot be captured (an engine with a loop, for example)
runs plainly, which is said once. Nothing waits inside: each step's time is taken by events on the stream.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Final

from engines.runners import cuda
from engines.runners.cuda_stream import Event, Graph, NotCapturedError, PinnedMemory, Stream
from engines.runners.interface import Array, Buffer, Ran, Step
from engines.tensorrt.run.bound import TrtBound
from engines.tensorrt.run.session import Session
from graphs.records.progress import Note

LONGEST: Final = 160  # characters of a reason


class TrtProgram:
    """See `Program`. `replay`: whether CUDA graphs are wanted; `note` is told why there is none."""

    def __init__(
        self,
        session: Session,
        steps: Sequence[Step],
        *,
        writes: Sequence[Buffer],
        reads: Sequence[Buffer],
        replay: bool,
        note: Note,
    ) -> None:
        self._session, self._steps, self._note = session, steps, note
        self._bounds = [bound for step in steps if (bound := _bound(step)) is not None]
        pinned = PinnedMemory([*writes, *reads], device=session.device)
        self.inputs: list[Array] = pinned.arrays[: len(writes)]
        self.outputs: list[Array] = pinned.arrays[len(writes) :]
        self._copies_in = _copies(pinned, writes, 0)
        self._copies_out = _copies(pinned, reads, len(writes))
        self._buffers = [*writes, *reads]  # kept so that the memory lives as long as its addresses are used
        self._marks = _Marks(steps, session.device)
        self._replay, self._ran = replay, False
        self._addresses: list[int] = []
        self._graph: Graph | None = None

    def __call__(self, after: Callable[[], None] | None = None) -> Ran:
        stream = self._session.stream
        cuda.use_device(self._session.device)
        with stream.lock:
            addresses = [bound.attach() for bound in self._bounds]
            if addresses != self._addresses:  # what was captured has the former ones in it
                self._addresses, self._graph, self._ran = addresses, None, False
            if self._replay and self._ran and self._graph is None:
                self._graph = self._capture()
            if self._graph is not None:
                stream.launch(self._graph)
            else:
                self._enqueue()
            if after is not None:
                after()
        stream.finish()
        self._ran = True
        return self._marks.read()

    def _capture(self) -> Graph | None:
        """The program as a graph; None, said once, if it cannot be one."""
        try:
            return self._session.stream.capture(self._enqueue)
        except NotCapturedError as error:
            self._replay = False
            first, last = self._bounds[0].graph, self._bounds[-1].graph
            what = first if first == last else f"{first} to {last}"
            reason = error.got if len(error.got) <= LONGEST else error.got[:LONGEST] + " ..."
            self._note(f"no CUDA graph of {what}, engines are started one by one: {reason}")
            return None

    def _enqueue(self) -> None:
        stream = self._session.stream
        for target, source, count in self._copies_in:
            stream.copy(target, source, count)
        self._marks.begin(stream)
        for step in self._steps:
            bound = _bound(step)
            if bound is not None:
                self._marks.before(stream, step)
                bound.enqueue()
                self._marks.behind(stream, step)
            if step.copies is not None:
                step.copies()
        for target, source, count in self._copies_out:
            stream.copy(source, target, count)
        self._marks.end(stream)


class _Marks:
    """Events around the steps that have a name, and around everything; none at all if no step has one."""

    def __init__(self, steps: Sequence[Step], device: int) -> None:
        def pair() -> tuple[Event, Event]:
            return Event(device, timed=True), Event(device, timed=True)

        self._steps = {step.name: pair() for step in steps if step.name and step.graph is not None}
        self._whole = pair() if self._steps else None

    def begin(self, stream: Stream) -> None:
        if self._whole is not None:
            stream.record(self._whole[0])

    def before(self, stream: Stream, step: Step) -> None:
        if step.name:
            stream.record(self._steps[step.name][0])

    def behind(self, stream: Stream, step: Step) -> None:
        if step.name:
            stream.record(self._steps[step.name][1])

    def end(self, stream: Stream) -> None:
        if self._whole is not None:
            stream.record(self._whole[1])

    def read(self) -> Ran:
        """The times of a run that is done."""
        if self._whole is None:
            return Ran({}, 0.0)
        begin, end = self._whole
        spans = {name: (first.since(begin), last.since(begin)) for name, (first, last) in self._steps.items()}
        return Ran(spans, end.since(begin))


def _bound(step: Step) -> TrtBound | None:
    """The step's engine; a loader binds only its own."""
    assert step.graph is None or isinstance(step.graph, TrtBound), step.name
    return step.graph


def _copies(pinned: PinnedMemory, buffers: Sequence[Buffer], first: int) -> list[tuple[int, int, int]]:
    """Device address, host address and bytes of each buffer, whose array is number `first` and up."""
    return [
        (buffer.pointer, pinned.addresses[number], prod(buffer.shape) * buffer.dtype.itemsize)
        for number, buffer in enumerate(buffers, first)
    ]
