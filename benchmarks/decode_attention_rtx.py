"""What TensorRT for RTX makes of the forms that a decode step's attention can have: its layers, without a GPU.

    python -m benchmarks.decode_attention_rtx [--target 8.9] [--new-tokens 125] [--kv-heads 32] [--write]

Builds the decode graph of two layers of LLaVA-1.5-7B's shapes in float16, its matrices as inputs, once for each form,
and reads the layers from TensorRT's log. Counted are all layers, those with inputs or outputs, those that only move
data, and the megabytes of tensors as large as a cache that layers read or write. Where a layer updates a cache in place
both sides are counted although nothing but a row moves. `--write` keeps the table in
benchmarks/results/decode_attention.md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import graph_building
from btp_export.families import family_for
from engines.tensorrt import installed
from engines.tensorrt.build.layer_checks import LayerDetail, logged_layers, moves_only
from engines.tensorrt.prepare.attention import sum_over_caches
from graphs import names
from graphs.building import attention, decoder
from graphs.building.attention import BOOL, FLOAT, cached_attention, minus_infinity, positions, softmax
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.graph_builder import GraphBuilder, dims
from graphs.files.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results" / "decode_attention.md"
LAYERS = 2
SMALL = 100_000  # elements: what is larger becomes an input

Pair = tuple[ir.Value, ir.Value]


@dataclass
class Parts:
    """What a form is made of: query [B,H,1,D], new rows [B,K,1,D], caches [B,K,cap,D], `valid` [B,1,1,cap]."""

    b: GraphBuilder
    query: ir.Value
    new: Pair
    past: Pair
    valid: ir.Value
    length: ir.Value

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, K, g, cap, D."""
        (batch, heads, _, size), (_, kv_heads, capacity, _) = dims(self.query), dims(self.past[0])
        return batch, kv_heads, heads // kv_heads, capacity, size

    def grouped(self) -> ir.Value:
        """The query, scaled, [B,K,g,D]."""
        batch, kv_heads, group, _, size = self.sizes
        scaled = self.b.scaled(self.query, size**-0.5, "query_scaled")
        return self.b.reshape(scaled, (batch, kv_heads, group, size), "query_grouped")

    def turned(self, value: ir.Value, name: str) -> ir.Value:
        """With its last two axes swapped."""
        return self.b.transpose(value, (0, 1, 3, 2), name)

    def up_to(self) -> ir.Value:
        """[B,1,1,cap]: the rows before `length`, and the one at it."""
        batch, _, _, capacity, _ = self.sizes
        at = self.b.reshape(self.length, (batch, 1, 1, 1), "length_column")
        rows = self.b.reshape(positions(self.b, capacity), (1, 1, 1, capacity), "rows_across")
        return self.b.binary("LessOrEqual", rows, at, "seen", BOOL)

    def operator(self, key: ir.Value, value: ir.Value, seen: ir.Value, name: str = "context") -> ir.Value:
        """The operator Attention."""
        shape, scale = dims(self.query), self.sizes[-1] ** -0.5
        return self.b.op("Attention", [self.query, key, value, seen], name, shape=shape, scale=scale)

    def primitives(self, key: ir.Value, value: ir.Value, seen: ir.Value) -> ir.Value:
        """The same in primitives."""
        b = self.b
        scores = b.matmul(self.grouped(), self.turned(key, "keys_turned"), "all_scores")
        weights = softmax(b, b.where(seen, scores, minus_infinity(b, b.dtype), "masked"), "weights")
        return b.reshape(b.matmul(weights, value, "all_context"), dims(self.query), "context")


def products(p: Parts) -> ir.Value:
    return cached_attention(p.b, p.query, p.new, p.past, p.valid)


def turned_scores(p: Parts) -> ir.Value:
    """K q^T: nothing but the scores is turned."""
    b, (_, _, _, capacity, _) = p.b, p.sizes
    query = p.grouped()
    scores = p.turned(b.matmul(p.past[0], p.turned(query, "query_turned"), "past_scores_down"), "past_scores")
    masked = b.where(p.valid, scores, minus_infinity(b, b.dtype), "masked")
    new = b.matmul(query, p.turned(p.new[0], "new_key_turned"), "new_scores")
    weights = softmax(b, b.concat([masked, new], 3, "scores"), "weights")
    past = b.matmul(b.slice(weights, 3, 0, capacity, "past_weights"), p.past[1], "past_context")
    last = b.mul(b.slice(weights, 3, capacity, capacity + 1, "new_weights"), p.new[1], "new_context")
    return b.reshape(b.add(past, last, "context_grouped"), dims(p.query), "context")


def _joined(p: Parts) -> tuple[ir.Value, ir.Value, ir.Value]:
    one = p.b.constant("constant.true", np.ones((p.sizes[0], 1, 1, 1), bool))
    key, value = (p.b.concat([old, new], 2, name) for old, new, name in zip(p.past, p.new, "kv", strict=True))
    return key, value, p.b.concat([p.valid, one], 3, "seen")


def joined(p: Parts) -> ir.Value:
    return p.primitives(*_joined(p))


def joined_operator(p: Parts) -> ir.Value:
    return p.operator(*_joined(p))


def put_in(p: Parts) -> ir.Value:
    """The new row in place of the cache's row at `length`."""
    batch, _, _, capacity, _ = p.sizes
    rows = p.b.reshape(positions(p.b, capacity), (1, 1, capacity, 1), "rows_down")
    here = p.b.binary("Equal", rows, p.b.reshape(p.length, (batch, 1, 1, 1), "at"), "here", BOOL)
    key, value = (p.b.where(here, new, old, name) for old, new, name in zip(p.past, p.new, "kv", strict=True))
    return p.operator(key, value, p.up_to())


def by_logarithm(p: Parts) -> ir.Value:
    """Attention over the cache alone, and the new token's share by the logarithm of the sum, which reads keys again."""
    b, (batch, kv_heads, group, capacity, size) = p.b, p.sizes
    attended = p.operator(*p.past, p.valid, "attended")
    context = b.reshape(attended, (batch, kv_heads, group, size), "past_context")
    query = b.reshape(b.cast(p.grouped(), FLOAT, "query_wide"), (batch, kv_heads, group, 1, size), "query_across")

    def scores(key: ir.Value, rows: int, name: str) -> ir.Value:
        keys = b.reshape(b.cast(key, FLOAT, f"{name}_keys"), (batch, kv_heads, 1, rows, size), f"{name}_across")
        terms, shape = b.mul(query, keys, f"{name}_terms"), (batch, kv_heads, group, rows)
        return b.op("ReduceSum", [terms, b.integers(4)], name, shape=shape, dtype=FLOAT, keepdims=0)

    def share(one: ir.Value, other: ir.Value, name: str) -> ir.Value:
        difference = b.binary("Sub", one, other, f"{name}_difference", FLOAT)
        return b.cast(b.unary("Sigmoid", difference, f"{name}_wide"), b.dtype, name)

    masked = b.where(p.valid, scores(p.past[0], capacity, "past_scores"), minus_infinity(b, FLOAT), "masked")
    shape = (batch, kv_heads, group, 1)
    total = b.op("ReduceLogSumExp", [masked, b.integers(3)], "logarithm", shape=shape, dtype=FLOAT, keepdims=1)
    new = scores(p.new[0], 1, "new_scores")
    past_part = b.mul(context, share(total, new, "past_share"), "past_part")
    both = b.add(past_part, b.mul(p.new[1], share(new, total, "new_share"), "new_part"), "context_grouped")
    return b.reshape(both, dims(p.query), "context")


UPDATED: list[ir.Value] = []


def in_place(p: Parts) -> ir.Value:
    """TensorScatter of opset 24: the caches are outputs too, bound to the same addresses."""
    at = p.b.cast(p.length, ir.DataType.INT64, "at")
    key, value = (
        p.b.op("TensorScatter", [old, new, at], name, shape=dims(old), axis=-2)
        for old, new, name in zip(p.past, p.new, "kv", strict=True)
    )
    UPDATED.extend([key, value])
    return p.operator(key, value, p.up_to())


Form = Callable[[Parts], ir.Value]
FORMS: dict[str, Form] = {
    "products, the bundle's form": products,
    "products, scores turned in place of keys": turned_scores,
    "new rows joined to the caches, attention in primitives": joined,
    "joined, the operator Attention": joined_operator,
    "new row put in by Where, Attention": put_in,
    "Attention over the cache, joined by the sum's logarithm": by_logarithm,
    "TensorScatter in place, Attention (opset 24)": in_place,
    "sums of products": products,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="8.9", help="compute capability")
    parser.add_argument("--new-tokens", type=int, default=125, help="125: 800 cache rows")
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    library = installed.load("rtx")
    lines = ["| form | layers | with tensors | moving | MB |", "|---|---|---|---|---|"]
    for name, form in FORMS.items():
        model = decode_graph(form, options.new_tokens, options.kv_heads)
        if name == "sums of products":
            sum_over_caches(model)
        layers = build(library.module, model, options.target)
        lines.append(f"| {name} | {row(layers, options.kv_heads)} |")
    print("\n".join(lines))
    if options.write:
        RESULTS.write_text(page(lines, library.version, options), encoding="utf-8")


def page(lines: list[str], version: str, options: argparse.Namespace) -> str:
    """The page of results."""
    rows = f"{options.new_tokens + 675} cache rows, {options.kv_heads} key heads"
    return f"""# Decode attention in TensorRT for RTX

`python -m benchmarks.decode_attention_rtx --write`, {date.today()}: TensorRT for RTX {version}, compute capability
{options.target}, {rows}. The script's first lines say what is counted. What was chosen and why:
[decode attention](../../docs/decisions/decode-attention.md).

{chr(10).join(lines)}
"""


def decode_graph(form: Form, new_tokens: int, kv_heads: int) -> ir.Model:
    """The decode graph with that form, matrices as inputs."""
    lengths: dict[int, ir.Value] = {}
    mask, width = attention.cache_mask, graph_building.HIDDEN // 32 * kv_heads

    def kept_mask(b: GraphBuilder, length: ir.Value, capacity: int, name: str) -> ir.Value:
        valid = mask(b, length, capacity, name)
        lengths[id(valid)] = length
        return valid

    def formed(b: GraphBuilder, query: ir.Value, new: Pair, past: Pair, valid: ir.Value) -> ir.Value:
        return form(Parts(b, query, new, past, valid, lengths[id(valid)]))

    UPDATED.clear()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph_building.sparse_checkpoint(folder, LAYERS, kv_width=width)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_key_value_heads"] = kv_heads
        (folder / "config.json").write_text(json.dumps(config))
        family = family_for({"model_type": "llava"})
        checkpoint = open_checkpoint(folder, family.renames)
        spec = family.spec(checkpoint, "two layers")
        profile = family.profile(spec, batch=1, image_size=None, text_tokens=64, new_tokens=new_tokens)
        plan = graph_building.published_plan(LAYERS)  # whose stages begin behind these layers
        decoder.cache_mask, decoder.cached_attention = kept_mask, formed
        try:
            built = build_decoder_graphs(spec, checkpoint, plan, profile, opset=23, precision="float16")
        finally:
            decoder.cache_mask, decoder.cached_attention = mask, cached_attention
    model = next(graph.model for graph in built if graph.name == names.DECODE)
    _without_data(model)
    for number, value in enumerate(UPDATED):
        value.name = f"updated_{number}"
        model.graph.outputs.append(value)
        model.graph.opset_imports[""] = 24
    return model


def _without_data(model: ir.Model) -> None:
    """Large matrices become inputs, small ones ones: no layer depends on what is in them."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.size > SMALL:
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(np.ones(tuple(tensor.shape), tensor.dtype.numpy()), name=name)


def build(trt: Any, model: ir.Model, capability: str) -> list[LayerDetail]:
    """The layers of the engine, as TensorRT logs them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.serde.serialize_model(model).SerializeToString()):
        raise SystemExit("\n".join(str(parser.get_error(number).desc()) for number in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit("no engine: " + "\n".join(log.lines[-5:]))
    return logged_layers("\n".join(log.lines))


def row(layers: list[LayerDetail], kv_heads: int) -> str:
    """The counts of one form."""
    large = kv_heads * 675 * 128 * 2  # bytes of a cache without new tokens
    tensors = [tensor for layer in layers for tensor in (*layer.inputs, *layer.outputs)]
    sizes = [tensor.nbytes or 0 for tensor in tensors if not tensor.name.endswith(".weight")]
    moved = sum(size for size in sizes if size >= large)
    real = sum(bool(layer.inputs or layer.outputs) for layer in layers)
    return f"{len(layers)} | {real} | {sum(map(moves_only, layers))} | {moved / 1e6:.1f}"


if __name__ == "__main__":
    main()
