"""A 7B's graphs are built from headers: fast, in little memory, without a byte of weights."""

import resource
import time

from benchmarks.graph_building import published_plan, sparse_checkpoint
from btp_export.families import family_for
from graphs.building.decoder_graphs import build_decoder_graphs, serialize
from graphs.files.checkpoint import open_checkpoint


def resident_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_7b_builds_from_headers_alone(tmp_path):
    sparse_checkpoint(tmp_path, 32)
    family = family_for({"model_type": "llava"})
    checkpoint = open_checkpoint(tmp_path, family.renames)
    assert sum(ref.nbytes for ref in checkpoint.tensors.values()) > 13e9
    spec = family.spec(checkpoint, "sparse 7B")
    assert (spec.decoder.head_dim, spec.vision.grid, spec.weight_dtype) == (128, (24, 24), "float16")
    profile = family.profile(spec, batch=1, image_size=None, text_tokens=64, new_tokens=128)
    before, start = resident_mib(), time.perf_counter()
    graphs = build_decoder_graphs(spec, checkpoint, published_plan(32), profile, precision="float16")
    size = sum(len(serialize(graph)) for graph in graphs)
    assert time.perf_counter() - start < 5
    assert resident_mib() - before < 500
    assert size < 4e6
    shards = {name for graph in graphs for name in shards_of(graph)}
    assert shards == {"weights/model-00001-of-00002.safetensors", "weights/model-00002-of-00002.safetensors"}
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 1e6  # still sparse


def shards_of(graph):
    tensors = [value.const_value for value in graph.model.graph.initializers.values()]
    return {str(tensor.location) for tensor in tensors if hasattr(tensor, "location")}
