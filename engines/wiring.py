"""What has to fit where graphs meet: tensors by their names, what flows from graph to graph, what a selection chose."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from operator import lt
from pathlib import Path

from engines.runners.interface import Array, Buffer, Link, Runner
from graphs import names
from graphs.records.errors import CheckError, InputError
from graphs.records.plan import Segment


def check_indices(stage: int, indices: Array, *, keep: int, tokens: int) -> None:
    """Raise CheckError unless a stage kept `keep` of so many tokens, each once and in order: indices [B,keep]."""
    # Of so few numbers lists are faster than arrays.
    for kept in indices.tolist():
        if len(kept) != keep or kept[0] < 0 or kept[-1] >= tokens or not all(map(lt, kept, kept[1:])):
            raise CheckError(
                f"stage {stage} kept the wrong tokens: {len(kept)} indices from {min(kept)} to {max(kept)}",
                wanted=f"{keep} distinct indices below {tokens} in rising order",
                do="export the bundle again; with a plugin, report it as a defect",
            )


class Tensors(dict[str, Buffer]):
    """A graph's tensors by name; asking for one that is not there says that the graph does not fit."""

    def __init__(self, graph: str) -> None:
        super().__init__()
        self._graph = graph

    def __missing__(self, tensor: str) -> Buffer:
        raise not_the_plan(self._graph, tensor)


def pick(name: str, runner: Runner, flow: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """The buffers that the graph asks for."""
    missing = runner.inputs.keys() - flow.keys()
    if missing:
        raise not_the_plan(name, sorted(missing)[0])
    return {part: flow[part] for part in runner.inputs}


def not_the_plan(graph: str, tensor: str) -> InputError:
    """The error for a graph without a tensor that the plan asks for, or with one of another size."""
    return InputError(
        f"graph {graph} does not fit the plan at {tensor}", wanted="graphs exported for this plan", do="export it again"
    )


def links(segments: Sequence[Segment], path: Callable[[str], Path]) -> list[Link]:
    """The graphs behind the vision graph in their order, and what flows between them. path: of a graph's file."""
    found = []
    for segment, following in zip_longest(segments, segments[1:]):
        if segment.stage is not None:
            stage = names.select(segment.stage)
            stream = {names.after(part): part for part in names.STREAM}
            found.append(Link(stage, path(stage), stream, shown=[names.after("last")], ends=True))
        name, key = names.prefill(segment.index), names.key(segment.stop - 1)
        onward = {names.after("hidden"): "hidden"}
        if following is not None and following.image_tokens:  # whose stage may look at them
            onward |= {key: "key", "query": "query"}
        found.append(Link(name, path(name), onward, shown=[key]))
    return [*found, Link(names.HEAD, path(names.HEAD))]


def behind(link: Link, flow: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """What flows on behind a graph with these outputs; `flow` came to it."""
    given = {into: outputs[output] for output, into in link.gives.items()}
    return given if link.ends else {**flow, **given}
