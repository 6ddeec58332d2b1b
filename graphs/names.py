"""Names of a profile's graphs and of their numbered tensors, made and taken apart (all: graphs/interfaces.md).

The rest of the project writes none of these names itself: it calls a function to make one and reads a parsed one.

    prefill(2) == "prefill_2"           parse_graph("prefill_2") == GraphName("prefill", 2)
    past_key(7) == "past_key_7"         parse_tensor("past_key_7") == TensorName("past_key", 7)
    decode_graph == DECODE              parse_tensor("logits") == TensorName("logits")
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from graphs.records.plan import PruningPlan, Segment

VISION: Final = "vision"
HEAD: Final = "head"
DECODE: Final = "decode"
WHOLE: Final = "prefill"  # vision, segments, stages and head in one graph: `--assemble whole`

GraphKind = Literal["vision", "prefill", "select", "head", "decode", "whole"]
GRAPH_KINDS: Final[tuple[GraphKind, ...]] = get_args(GraphKind)

CLASS_ATTENTION: Final = "class_attention"  # of the tower, for plans that score by it: from `vision` to `select_0`
STREAM: Final = ("hidden", "cos", "sin", "last")  # what flows from graph to graph, inputs of a segment and of a stage
TIMES: Final = "times"  # of a segment where graphs are joined: when it began and ended
NUMBERED: Final = ("past_key", "past_value", "key", "value", "length", "indices", "last")

_ALONE: Final[dict[str, GraphKind]] = {VISION: "vision", HEAD: "head", DECODE: "decode", WHOLE: "whole"}
_PREFILL: Final = "prefill"
_SELECT: Final = "select"
_NUMBERED_NAME = re.compile(r"(?P<role>.+)_(?P<number>0|[1-9]\d*)")
_CUT = re.compile(r"layer_\d+\.output|embedded")


@dataclass(frozen=True)
class GraphName:
    """A graph by its kind; `number` is the segment of a prefill and the stage of a selection, else None."""

    kind: GraphKind
    number: int | None = None

    @property
    def at(self) -> int:
        """The number of a graph that has one."""
        assert self.number is not None, f"{self.kind} has no number"
        return self.number


@dataclass(frozen=True)
class TensorName:
    """A tensor by its role. `number` is the layer of key, value, past_key and past_value, the segment of length and
    last, the stage of indices; None for a tensor that a graph has once (a stage's own `last` and `indices` too).
    """

    role: str
    number: int | None = None

    @property
    def at(self) -> int:
        """The number of a tensor that has one."""
        assert self.number is not None, f"{self.role} has no number"
        return self.number

    @property
    def name(self) -> str:
        """The name itself."""
        return self.role if self.number is None else f"{self.role}_{self.number}"

    @property
    def is_cache(self) -> bool:
        """Whether it holds keys or values of one layer, of the past or new ones."""
        return self.number is not None and self.role in ("past_key", "past_value", "key", "value")


# -- graphs ----------------------------------------------------------------------------------------------------------


def prefill(segment: int) -> str:
    """The graph of a segment's layers."""
    return f"{_PREFILL}_{segment}"


def select(stage: int) -> str:
    """The graph of a pruning stage."""
    return f"{_SELECT}_{stage}"


def segment_graphs(segment: Segment) -> list[str]:
    """The stage before a segment, if there is one, and the segment."""
    stage = [] if segment.stage is None else [select(segment.stage)]
    return [*stage, prefill(segment.index)]


def prefill_graphs(plan: PruningPlan, *, whole: bool = False) -> list[str]:
    """The graphs from pictures to the first token's logits, in the order in which they run."""
    if whole:
        return [WHOLE]
    return [VISION, *(name for segment in plan.segments() for name in segment_graphs(segment)), HEAD]


def parse_graph(name: str) -> GraphName:
    """The parts of a graph's name. Raises ValueError for a name that no graph has."""
    if name in _ALONE:
        return GraphName(_ALONE[name])
    match = _NUMBERED_NAME.fullmatch(name)
    if match is None or match["role"] not in (_PREFILL, _SELECT):
        raise ValueError(f"no graph is called {name!r}")
    return GraphName(_PREFILL if match["role"] == _PREFILL else _SELECT, int(match["number"]))


# -- tensors ---------------------------------------------------------------------------------------------------------


def key(layer: int) -> str:
    """A layer's keys: of all tokens after a prefill, of the new one after a decode step."""
    return f"key_{layer}"


def value(layer: int) -> str:
    """A layer's values, as its keys."""
    return f"value_{layer}"


def cache_rows(layer: int) -> tuple[str, str]:
    """A layer's keys and values."""
    return key(layer), value(layer)


def past_key(layer: int) -> str:
    """A layer's key cache, input of the decode graph."""
    return past(key(layer))


def past_value(layer: int) -> str:
    """A layer's value cache, input of the decode graph."""
    return past(value(layer))


def past(rows: str) -> str:
    """The cache that `key(layer)` or `value(layer)` rows go into."""
    return f"past_{rows}"


def length(segment: int) -> str:
    """Valid rows of a segment's caches, input of the decode graph."""
    return f"length_{segment}"


def indices(stage: int) -> str:
    """The tokens that a stage keeps, output of a whole prefill."""
    return f"indices_{stage}"


def last(segment: int) -> str:
    """Where a segment has its last real token, output of a whole prefill."""
    return f"last_{segment}"


def after(tensor: str) -> str:
    """What a graph makes of the stream's `tensor`: hidden -> hidden_out."""
    return f"{tensor}_out"


def parse_tensor(name: str) -> TensorName:
    """The parts of an input's or output's name; a name without a number is its own role."""
    match = _NUMBERED_NAME.fullmatch(name)
    if match is None or match["role"] not in NUMBERED:
        return TensorName(name)
    return TensorName(match["role"], int(match["number"]))


# -- names inside a graph --------------------------------------------------------------------------------------------


def layer_scope(layer: int) -> str:
    """What the names of a layer's nodes and values begin with."""
    return f"layer_{layer}"


def segment_scope(segment: int) -> str:
    """What the names around a segment's layers begin with."""
    return f"segment_{segment}"


def stage_scope(stage: int) -> str:
    """What the names of a stage's nodes and values begin with."""
    return f"stage_{stage}"


def is_cut(value_name: str) -> bool:
    """Whether a graph can be cut behind this value: a layer's output, or the embedded prompt of a whole prefill."""
    return _CUT.fullmatch(value_name) is not None
