"""The graphs of a prefill as one, for a decoder whose segments are one operator each (`layers_at_once`); needs onnx.

Where a prefill takes some milliseconds, what lies between its graphs is a part of them: a session's end and the next
one's start, and Python. All shapes are static, so graphs that follow one another are joined while sessions are
prepared, in memory: what one gives and the next one reads is a tensor inside. Files stay as they are, and so do
results, to the last bit.

    select_0, prefill_0, select_1, prefill_1, head -> one graph of their inputs, with outputs `<graph>.<output>`

Each segment says when its operator began and ended, in place of the times of graphs that run by themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from engines.runners.interface import Link
from engines.runners.on_cpu.around_selection import SCORES
from engines.runners.on_cpu.layers_at_once import LAYERS, TIMES, Room
from graphs import names
from graphs.ops.domain import DOMAIN


def is_one_operator(model: ModelProto) -> bool:
    """Whether all layers of a segment, its nodes replaced by what is faster here, are one operator."""
    return [node.op_type for node in model.graph.node].count(LAYERS) == 1


def join(
    links: Sequence[Link], models: Mapping[str, ModelProto], rooms: Mapping[str, Mapping[str, Room]]
) -> tuple[ModelProto, dict[str, Room]] | None:
    """The graphs of `links`, prepared for a session each, as one, and what its new inputs are about.

    rooms: of each model, what `layers_at_once` gives. None where they do not fit together: who opens them one by one
    finds out what is wrong.
    """
    whole = _Whole()
    for link in links:
        if not whole.add(link, models[link.name], rooms[link.name]):
            return None
    return whole.model(), whole.room


@dataclass
class _Whole:
    """What has been joined so far. flow: for what the next graphs read, who gives it."""

    graph: onnx.GraphProto = field(default_factory=onnx.GraphProto)
    room: dict[str, Room] = field(default_factory=dict)
    ir_version: int = 0
    _flow: dict[str, str] = field(default_factory=dict)
    _types: dict[str, bytes] = field(default_factory=dict)
    _open: bool = True  # whether what nothing gives is an input of the whole
    _opsets: dict[str, int] = field(default_factory=dict)
    _functions: dict[tuple[str, str], onnx.FunctionProto] = field(default_factory=dict)

    def model(self) -> ModelProto:
        """All of it."""
        self.graph.name = "prefill"
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        functions = list(self._functions.values())
        return helper.make_model(self.graph, opset_imports=opsets, functions=functions, ir_version=self.ir_version)

    def add(self, link: Link, model: ModelProto, room: Mapping[str, Room]) -> bool:
        """Join one more graph; False where it does not fit."""
        if not self._same_operators(model) or any(_has_graphs(node) for node in model.graph.node):
            return False
        sources = self._sources(link, model, room)
        if sources is None:
            return False
        _show_times(model)
        for node in model.graph.node:
            node.name = link.own(node.name or node.output[0])
            for tensors in (node.input, node.output):
                tensors[:] = [name and sources.get(name, link.own(name)) for name in tensors]
        for value in (*model.graph.output, *model.graph.value_info, *model.graph.initializer):
            value.name = link.own(value.name)
        for new, about in room.items():
            self.room[link.own(new)] = Room([link.own(name) for name in about.outputs], about.tokens)
        self.graph.node.extend(model.graph.node)
        self.graph.initializer.extend(model.graph.initializer)
        self.graph.value_info.extend(model.graph.value_info)
        self._give(link, model.graph.output)
        return True

    def _sources(self, link: Link, model: ModelProto, room: Mapping[str, Room]) -> dict[str, str] | None:
        """Who gives each input of a graph; None where nobody does, or gives one of another type or shape."""
        sources: dict[str, str] = {}
        for value in model.graph.input:
            kind = value.type.SerializeToString(deterministic=True)
            source = None if value.name in room else self._flow.get(value.name)
            if source is None and not (self._open or value.name in room):
                return None
            if source is None:
                source = link.own(value.name) if value.name in room else value.name
                self.graph.input.append(helper.make_value_info(source, value.type))
                self._types[source] = kind
                self._flow |= {} if value.name in room else {value.name: source}
            if self._types[source] != kind:
                return None
            readers = {node.op_type for node in model.graph.node if value.name in node.input}
            sources[value.name] = source if readers == {SCORES} else self._valid(source)
        return sources

    def _valid(self, name: str) -> str:
        """The tensor itself, or of one that lies in a cache the rows that are written."""
        tokens = {output: about.tokens for about in self.room.values() for output in about.outputs}.get(name)
        if tokens is None:
            return name
        valid = f"{name}.valid"
        bounds = {f"{valid}.{place}": place for place in (0, tokens, 2)}  # from, to, axis
        self.graph.initializer.extend(numpy_helper.from_array(np.array([n]), part) for part, n in bounds.items())
        self.graph.node.append(helper.make_node("Slice", [name, *bounds], [valid]))
        return valid

    def _give(self, link: Link, outputs: Sequence[ValueInfoProto]) -> None:
        """Let what a graph gives flow on, and the rest, and what is shown as well, be outputs of the whole."""
        given = {link.own(output): into for output, into in link.gives.items()}
        self._open = self._open and not link.ends
        self._flow = {} if link.ends else self._flow
        shown = {link.own(name) for name in link.shown}
        for value in outputs:
            if value.name in given:
                self._flow[given[value.name]] = value.name
                self._types[value.name] = _static(value, self.room).SerializeToString(deterministic=True)
            known = self.graph.value_info if value.name in given and value.name not in shown else self.graph.output
            known.append(value)

    def _same_operators(self, model: ModelProto) -> bool:
        """Whether a graph means by each operator what the others do; notes its own. Bodies of ours are not needed."""
        self.ir_version = max(self.ir_version, model.ir_version)
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        functions = {(body.domain, body.name): body for body in model.functions if body.domain != DOMAIN}
        same = all(self._opsets.setdefault(domain, version) == version for domain, version in opsets.items())
        return same and all(self._functions.setdefault(key, body) == body for key, body in functions.items())


def _show_times(model: ModelProto) -> None:
    """Let a segment's operator say when it began and ended."""
    for node in model.graph.node:
        if node.op_type == LAYERS:
            node.output[TIMES] = names.TIMES
            model.graph.output.append(helper.make_tensor_value_info(names.TIMES, TensorProto.INT64, [2]))


def _static(value: ValueInfoProto, room: Mapping[str, Room]) -> onnx.TypeProto:
    """The type of an output, with the rows that are written where its buffer may have more."""
    kind = onnx.TypeProto()
    kind.CopyFrom(value.type)
    for about in room.values():
        if value.name in about.outputs:
            kind.tensor_type.shape.dim[2].dim_value = about.tokens
    return kind


def _has_graphs(node: onnx.NodeProto) -> bool:
    return any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute)
