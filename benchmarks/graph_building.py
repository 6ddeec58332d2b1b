"""Time and memory of building all decoder graphs of a 7B model from safetensors headers alone.

Makes a sparse checkpoint of LLaVA-1.5-7B's shapes (two shards, 13 GB long, a few kilobytes on disk), builds every
graph of the published plan for both operator sets, and prints seconds, extra resident memory and bytes of graphs.

    python benchmarks/graph_building.py [--layers 32]
"""

import argparse
import json
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.findings import Row, Wishes
from btp_export.families import family_for
from graphs.building.decoder_graphs import build_decoder_graphs, serialize
from graphs.files.checkpoint import open_checkpoint
from graphs.records.plan import PruningPlan, Stage

HIDDEN, MLP, VOCAB = 4096, 11008, 32064


def decoder_shapes(layers: int, kv_width: int = HIDDEN) -> dict[str, list[int]]:
    """Stored name -> shape of a Vicuna-7B decoder in the transformers 4 layout; `kv_width`: of keys and values."""
    shapes = {"language_model.model.embed_tokens.weight": [VOCAB, HIDDEN], "language_model.model.norm.weight": [HIDDEN]}
    for layer in range(layers):
        start = f"language_model.model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{x}_proj.weight": [HIDDEN, HIDDEN] for x in "qo"}
        shapes |= {f"{start}.self_attn.{x}_proj.weight": [kv_width, HIDDEN] for x in "kv"}
        shapes |= {f"{start}.mlp.{x}_proj.weight": [MLP, HIDDEN] for x in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": [HIDDEN, MLP]}
        shapes |= {f"{start}.{x}_layernorm.weight": [HIDDEN] for x in ("input", "post_attention")}
    return shapes | {"language_model.lm_head.weight": [VOCAB, HIDDEN]}


def sparse_checkpoint(folder: Path, layers: int, kv_width: int = HIDDEN) -> None:
    """A checkpoint of float16 zeros that take no space on disk."""
    shapes = list(decoder_shapes(layers, kv_width).items())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        position, header = 0, {}
        for tensor, shape in part:
            size = 2
            for length in shape:
                size *= length
            header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
            weight_map[tensor] = name
            position += size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text_config = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": VOCAB, "rms_norm_eps": 1e-5}
    text_config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text_config}))
    (folder / "btp.json").write_text('{"prefix_tokens": 35}')


def published_plan(layers: int) -> PruningPlan:
    """The released LLaVA-1.5-7B stages, as far as the layers reach."""
    stages = (
        Stage(layer=3, keep=288, attention_quota=86, pool=318, boundary=288, diversity_quota=86, seeds=144),
        Stage(layer=6, keep=144, attention_quota=129, pool=194, boundary=144, diversity_quota=14),
        Stage(layer=14, keep=48, attention_quota=48, pool=57, boundary=48),
        Stage(layer=22, keep=0),
    )
    kept = tuple(stage for stage in stages if stage.layer < layers)
    return PruningPlan(model_type="llava", num_layers=layers, image_tokens=576, grid=(24, 24), stages=kept)


def resident_mib() -> float:
    """Highest resident memory of this process so far, in MiB (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Built:
    """All graphs of one opset. Times in seconds, sizes in bytes, memory in MiB; `nodes`: of decoder layers."""

    opset: int
    graphs: int
    weights: int
    built: float
    serialised: float
    size: int
    nodes: int
    resident: float


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """Seconds for all graphs of a 7B; `quick`: of four layers."""
    layers = 4 if wishes.quick else 32
    for one in measured(layers):
        detail = f"{one.graphs} graphs, {one.nodes / layers:.1f} nodes a layer, {one.resident:.0f} MiB more resident"
        yield Row(
            f"{layers} layers, opset {one.opset}: built and serialised", one.built + one.serialised, "s", detail=detail
        )


def measured(layers: int) -> Iterator[Built]:
    """Build the graphs for both operator sets."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sparse_checkpoint(folder, layers)
        family = family_for({"model_type": "llava"})
        checkpoint = open_checkpoint(folder, family.renames)
        spec = family.spec(checkpoint, "sparse 7B")
        profile = family.profile(spec, batch=1, image_size=None, text_tokens=64, new_tokens=128)
        weights = sum(ref.nbytes for ref in checkpoint.tensors.values())
        for opset in (23, 18):
            before, start = resident_mib(), time.perf_counter()
            graphs = build_decoder_graphs(
                spec, checkpoint, published_plan(layers), profile, opset=opset, precision="float16"
            )
            built = time.perf_counter() - start
            size = sum(len(serialize(graph)) for graph in graphs)
            nodes = sum(len(graph.model.graph) for graph in graphs if graph.layers)
            serialised, resident = time.perf_counter() - start - built, resident_mib() - before
            yield Built(opset, len(graphs), weights, built, serialised, size, nodes, resident)


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    for one in measured(layers):
        print(
            f"{layers} layers, {one.weights / 1e9:.1f} GB of weights, opset {one.opset}: {one.graphs} graphs, built in "
            f"{one.built:.2f} s, serialised in {one.serialised:.2f} s, {one.size / 1e6:.2f} MB, "
            f"{one.nodes / layers:.1f} nodes a layer, {one.resident:.0f} MiB more resident"
        )


if __name__ == "__main__":
    main()
