"""Sessions with btp_ort on a CPU, and the graph of a selection for them."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from engines.runners.interface import Runner
from engines.runners.onnxruntime import OrtLoader
from graphs.building.decoder import Stream
from graphs.building.graph_builder import GraphBuilder
from graphs.building.portable_bodies import embed_bodies
from graphs.building.selection import add_selection
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile
from tests.engines.native import builds


def opened(model: onnx.ModelProto, folder: Path, *, threads: int = 1, **options: Any) -> Runner:
    """A model, whose nodes are replaced as in every session."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return OrtLoader(threads=threads, **{"custom_ops": builds.ort_library()} | options)(path)


def with_selection(
    b: GraphBuilder, plan: PruningPlan, profile: ShapeProfile, stream: Stream, **rows: ir.Value | None
) -> onnx.ModelProto:
    """The graph with the plan's first stage, whose `rows` are its query and key, and all that it gives."""
    chosen = add_selection(b, plan, 0, profile, stream, **({"query": None, "key": None} | rows))
    assert chosen.indices is not None and chosen.scores is not None
    b.output(chosen.indices, "indices")
    b.output(chosen.scores, "scores")
    for name in ("hidden", "cos", "sin", "last"):
        b.output(getattr(chosen.stream, name), f"{name}_out")
    embed_bodies(b)
    return ir.to_proto(b.build().model)
