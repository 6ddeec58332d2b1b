"""All layers of a decoder with small weights over whole sequences on a CPU: one operator of btp_ort.

Where `decoder_rows` and `causal_attention` have made two nodes of a layer, threads are woken for each of them and wait
for one another at its end, which takes longer than a node of so few rows. BtpDecoderLayers takes all of them: 32 tokens
of a layer need only the tokens before them, so the threads go on to the next layer without waiting for its end.

    BtpDecoderRows, then BtpCausalAttention and BtpDecoderRows for each layer
    BtpDecoderLayers(rows, cos, sin, room, weights of all layers ...) -> rows; the last query by token and by head; when
    it began and ended, if wanted; keys and values of all layers by head

Keys and values that are outputs may be written straight into caches, which have more rows: an input that is new says
how many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.causal_attention import OWN
from engines.runners.on_cpu.decoder_rows import ROWS
from engines.runners.on_cpu.rewriting import Rewriting, needed
from graphs.ops.domain import DOMAIN

LAYERS: Final = "BtpDecoderLayers"  # graphs/ops/decoder_layers/ort_op.cc
ROOM: Final = "room."  # how an input is called that says how many rows there are
CONTEXT, FEED, PROJECT = 3, slice(4, 9), slice(9, None)  # of a node of rows: inputs
QUERY, BY_HEAD = slice(1, 4), slice(4, 7)  # and outputs
ROOM_INPUT = 3  # of the new node
TIMES, STORED = 3, 4  # of its outputs: the times, and the first of the keys and values


@dataclass(frozen=True)
class Room:
    """Outputs [B,K,S,D] whose buffers may have more rows: an int32 input says how many each of them has.

    tokens: S.
    """

    outputs: Sequence[str]
    tokens: int


def for_cpu(model: onnx.ModelProto) -> dict[str, Room]:
    """Replace what `decoder_rows` and `causal_attention` put in, where a chain of it has nothing else in it.

    Gives the inputs that are new, with what they are about.
    """
    nodes = list(model.graph.node)
    graph = _Graph(nodes, {value.name for value in model.graph.output})
    chains = [chain for place in range(len(nodes)) if (chain := graph.chain_from(place)) is not None]
    if not chains:
        return {}
    room = dict(_with_room(model, chain.node) for chain in chains if graph.only_outputs(chain.stored))
    at = {chain.places[0]: chain.node for chain in chains}
    gone = {place for chain in chains for place in chain.places}
    kept = [at.get(place, node) for place, node in enumerate(nodes) if place in at or place not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    _take_rows_as_they_are(model)
    return room


def _take_rows_as_they_are(model: onnx.ModelProto) -> None:
    """Let chains read and give [B,S,C], in which graphs have rows, without a Reshape before and behind."""
    graph, gone = Rewriting(model), list[NodeProto]()
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        before, readers = graph.producers.get(node.input[0]), graph.readers.get(node.output[0], [])
        alone = len(readers) == 1 and readers[0].op_type == "Reshape" and node.output[0] not in outputs
        if node.op_type != LAYERS or before is None or before.op_type != "Reshape" or not alone:
            continue
        (behind,) = readers[0].output
        if graph.shapes.get(before.input[0], ()) == graph.shapes.get(behind):
            node.input[0], node.output[0] = before.input[0], behind
            gone.append(readers[0])
    kept = needed([node for node in model.graph.node if node not in gone], outputs)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _with_room(model: onnx.ModelProto, node: NodeProto) -> tuple[str, Room]:
    """Let a chain's keys and values have as many rows as an input says; gives it."""
    names = node.output[STORED:]
    room, values = f"{ROOM}{names[0]}", {value.name: value for value in model.graph.output}
    node.input[ROOM_INPUT] = room
    model.graph.input.append(helper.make_tensor_value_info(room, TensorProto.INT32, [len(names)]))
    rows = [values[name].type.tensor_type.shape.dim[2] for name in names]
    tokens = rows[0].dim_value
    for place, size in enumerate(rows):
        size.dim_param = f"{room}.{place}"
    return room, Room(list(names), tokens)


@dataclass(frozen=True)
class _Chain:
    """Places of its nodes, and the node that does what they do. stored: its keys and values."""

    places: Sequence[int]
    node: NodeProto

    @property
    def stored(self) -> Sequence[str]:
        return list(self.node.output[STORED:])


@dataclass
class _Layers:
    """What has been found of a chain: weights and outputs of the new node."""

    places: list[int]
    settings: Mapping[str, Any]
    weights: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)


class _Graph:
    """The nodes of a model, and who reads what."""

    def __init__(self, nodes: Sequence[NodeProto], outputs: set[str]) -> None:
        self._nodes, self._outputs = nodes, outputs
        self._readers: dict[str, list[int]] = {}
        for place, node in enumerate(nodes):
            for name in node.input:
                self._readers.setdefault(name, []).append(place)

    def chain_from(self, place: int) -> _Chain | None:
        """The chain that begins with this node, if one does."""
        first = self._nodes[place]
        if first.op_type != ROWS or _settings(first)["feeds"]:
            return None
        found = _Layers([place], _settings(first))
        query = self._add_layer(found, first)
        while query is not None:
            node = self._nodes[found.places[-1]]
            if not _settings(node)["projects"]:
                given = [node.output[0], *query, "", *found.stored]
                settings = {name: found.settings[name] for name in ("head", "epsilon", "biased")}
                inputs = [*first.input[:CONTEXT], "", *found.weights]
                settings["layers"] = len(found.stored) // 2
                return _Chain(found.places, helper.make_node(LAYERS, inputs, given, domain=DOMAIN, **settings))
            query = self._add_layer(found, node) if query == ["", ""] else None
        return None

    def _add_layer(self, found: _Layers, node: NodeProto) -> list[str] | None:
        """Add the layer whose query, key and value a node gives, up to the node that feeds its rows.

        Gives names of the query by token and by head, "" where only attention reads it; None where the layer has
        another form.
        """
        by_token, by_head = list(node.output[QUERY]), list(node.output[BY_HEAD])
        attention = self._only(by_token[1])
        if attention is None or len(by_head) < 3 or not all(by_head[1:]):
            return None
        middle = self._nodes[attention]
        last = self._only(middle.output[0]) if middle.op_type == OWN and list(middle.input) == by_token else None
        if last is None or self._only(by_token[2]) != attention:
            return None
        feeds = self._nodes[last]
        if feeds.op_type != ROWS or feeds.input[CONTEXT] != middle.output[0] or not self._follows(found, node, feeds):
            return None
        found.places += [attention, last]
        found.weights += [*node.input[PROJECT], *feeds.input[FEED]]
        found.stored += by_head[1:]
        others = self._readers[by_token[0]] != [attention] or by_token[0] in self._outputs
        return [by_token[0] if others else "", by_head[0]]

    def only_outputs(self, names: Sequence[str]) -> bool:
        """Whether they are outputs of the graph, and read by nothing in it."""
        return all(name in self._outputs and name not in self._readers for name in names)

    def _follows(self, found: _Layers, node: NodeProto, feeds: NodeProto) -> bool:
        """Whether a node feeds the very rows that the other one projects, with the same tables and settings."""
        settings = _settings(feeds)
        first = self._nodes[found.places[0]]
        rows = node.output[0] or node.input[0]
        alone = not node.output[0] or (self._only(rows) is not None)
        same = all(settings[name] == found.settings[name] for name in ("head", "biased") if settings["projects"])
        tables = not settings["projects"] or list(feeds.input[1:CONTEXT]) == list(first.input[1:CONTEXT])
        return alone and same and tables and settings["epsilon"] == found.settings["epsilon"] and feeds.input[0] == rows

    def _only(self, name: str) -> int | None:
        """The place of the one node that reads a tensor, which is no output."""
        readers = self._readers.get(name, [])
        return readers[0] if name and len(readers) == 1 and name not in self._outputs else None


def _settings(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
