"""Nodes that are faster on a CPU than those of the files, put in while a session is prepared; needs onnx.

`causal_attention` over whole sequences (prefill), by btp_ort or by ONNX Runtime's own node; by that node alone
`cached_attention` of a new token over caches (decode). By btp_ort: `selection` from rows in place of their similarity,
`around_selection` for scores by attention and what moves kept rows, `decoder_rows` for all of a layer with small
weights but its attention, `layers_at_once` for both where attention is its own, `linear` with weights of 4 and of 16
bits as they are stored, `float_weights` with those of float32. Where segments are one operator each, `joining` makes
one graph of a prefill's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from engines.runners.interface import Link
from engines.runners.on_cpu import (
    around_selection,
    cached_attention,
    causal_attention,
    decoder_rows,
    float_weights,
    joining,
    layers_at_once,
    linear,
    selection,
)
from engines.runners.on_cpu.layers_at_once import Room
from graphs import names
from graphs.files.onnx_file import read_graph, refusing_graph

__all__ = ["AS_STORED", "Native", "Replaced", "for_cpu", "joined", "may_have"]

AS_STORED: Final = frozenset({linear.INT8, linear.HALF, float_weights.FLOAT})  # how they read weights, in every run


@dataclass(frozen=True)
class Native:
    """What btp_ort does in a session.

    selections: choose from rows, score by attention, move kept rows. halves: multiply few rows with weights of float16.
    int8: multiply rows, rounded to int8, with four-bit weights. rows: take rows through all of a layer with small
    weights but its attention. floats: multiply with weights of float32. attention: attend over whole sequences.
    """

    selections: bool = False
    halves: bool = False
    int8: bool = False
    rows: bool = False
    floats: bool = False
    attention: bool = False


@dataclass(frozen=True)
class Replaced:
    """What the new nodes want of whoever binds a session.

    in_place: new outputs, with the input that each has to be the memory of. room: new inputs, with what they say.
    """

    in_place: dict[str, str] = field(default_factory=dict)
    room: dict[str, Room] = field(default_factory=dict)


def may_have(serialized: bytes, native: Native) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    attention = causal_attention.may_have(serialized) or cached_attention.may_have(serialized)
    selections = native.selections and (selection.may_have(serialized) or around_selection.may_have(serialized))
    rows = native.rows and decoder_rows.may_have(serialized)
    products = linear.may_have(serialized, halves=native.halves, int8=native.int8)
    return attention or selections or rows or products or (native.floats and float_weights.may_have(serialized))


def for_cpu(model: onnx.ModelProto, native: Native) -> Replaced:
    """Replace what can be."""
    if native.selections:
        selection.for_cpu(model)
        around_selection.for_cpu(model)
    causal_attention.for_cpu(model, native=native.attention)
    in_place, room = cached_attention.for_cpu(model), dict[str, Room]()
    if native.rows:  # it gives what attention's new nodes read, and takes products that are left to others else
        decoder_rows.for_cpu(model)
        room = layers_at_once.for_cpu(model)
    if native.halves or native.int8:
        linear.for_cpu(model, halves=native.halves, int8=native.int8)
    if native.floats:
        float_weights.for_cpu(model)
    return Replaced(in_place, room)


def joined(links: Sequence[Link], native: Native) -> tuple[onnx.ModelProto, Replaced] | None:
    """The graphs of a prefill as one, with everything replaced; None where segments are not one operator each.

    Raises InputError for a graph that is damaged.
    """
    models: dict[str, onnx.ModelProto] = {}
    replaced: dict[str, Replaced] = {}
    segments = [link for link in links if names.parse_graph(link.name).kind == "prefill"]
    for link in [*segments, *(link for link in links if link not in segments)]:  # first those that decide
        model = read_graph(link.path)
        with refusing_graph(link.path):
            replaced[link.name], models[link.name] = for_cpu(model, native), model
            if link in segments and not joining.is_one_operator(model):
                return None
    if len({link.path.parent for link in links}) > 1:  # beside which their weights lie
        return None
    whole = joining.join(links, models, {name: nodes.room for name, nodes in replaced.items()})
    return None if whole is None else (whole[0], Replaced(room=whole[1]))
