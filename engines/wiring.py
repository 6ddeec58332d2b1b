"""What has to fit where graphs meet: tensors by their names, and what a selection chose."""

from collections.abc import Mapping

from engines.runners.interface import Array, Buffer, Runner
from graphs.records.errors import CheckError, InputError


def check_indices(stage: int, indices: Array, *, keep: int, tokens: int) -> None:
    """Raise CheckError unless a stage kept `keep` of so many tokens, each once and in order: indices [B,keep]."""
    rising = indices.shape[1:] == (keep,) and bool((indices[:, 1:] > indices[:, :-1]).all())
    if not rising or min(indices[:, 0].tolist()) < 0 or max(indices[:, -1].tolist()) >= tokens:
        raise CheckError(
            f"stage {stage} kept the wrong tokens: {indices.shape[1]} indices from {indices.min()} to {indices.max()}",
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
