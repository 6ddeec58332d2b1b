"""Every kind of file that the project reads, nearly right: it is read, or refused by one clear error. Nothing else.

`make fuzz` tries new inputs for about an hour; what it finds is printed with the input, and belongs here as an example.
"""

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from btp_export.dummy.checkpoints import read_marker
from btp_export.model.open_model import open_model
from btp_export.planning import latency, plan_folder
from btp_export.profiling import sources
from btp_export.profiling.roofline import product_flops
from calibrate.data.samples import Choice, jsonl_pictures, jsonl_samples, read_prompts
from calibrate.measure.statistics import TOP_SHARES, Statistics
from calibrate.measure.statistics_cache import StatisticsCache, key_of
from calibrate.reference.pass_checkpoints import PassCheckpoints
from engines.runners.onnxruntime import OrtLoader
from engines.tensorrt import trtexec
from engines.tensorrt.records import EnginesRecord
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import missing_shards, open_checkpoint, open_tensors
from graphs.files.onnx_file import read_graph, read_model
from graphs.files.pictures import open_picture
from graphs.files.resume import Work
from graphs.records.errors import LONGEST, BtpError
from graphs.records.plan import PruningPlan
from tests.btp_export.planning.test_latency import profile_document
from tests.engines.tensorrt import trtexec_files
from tests.fuzz.mutations import FUZZ, damaged, documents
from tests.plans import PLAN


def refused(read: Callable[[], object]) -> BtpError | None:
    """Read it; gives the refusal, None if it was taken. Anything else that is raised fails the test."""
    try:
        read()
    except BtpError as error:
        lines = error.lines()
        assert len(lines) <= 3 and all(len(line) <= LONGEST + 10 for line in lines)
        assert error.got and (error.wanted or error.do)
        return error
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all inputs: each is written over the last."""
    return tmp_path_factory.mktemp("fuzz")


# -- documents that are read by themselves ---------------------------------------------------------------------------

INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
DUMMY = {"format": "btp-dummy/1", "note": "n", "model": "m", "seed": 0, "layers": 2, "all_layers": 2}
LINE = {"image": "a.png", "prompt": "what is it?", "answer": "red", "kind": "colour"}
ENGINES = {
    "format": "btp-engines/1", "target": "h100", "flavour": "tensorrt", "tensorrt": "10.16",
    "compute_capability": "9.0", "opset": 23, "precision": "float16", "weights": "baked",
    "assemble": "segments", "notes": ["n"], "plugins": {"form": "none", "sha256": None}, "bundle_sha256": "0" * 64,
    "graphs": [{
        "name": "prefill_0", "profile": "b1", "onnx": {"file": "graphs/a.onnx", "size": 1, "sha256": "0" * 64},
        "inputs": [{"name": "hidden", "dtype": "float16", "shape": [1, 8, 4]}], "outputs": [], "layers": [0, 2],
        "weight_inputs": [], "custom_nodes": 0, "samples": {}, "engine": None,
        "estimate": dict.fromkeys(
            ["weight_bytes", "engine_bytes", "activation_bytes", "io_bytes", "build_peak_bytes"], 1),
    }],
}  # fmt: skip
TIMES = json.loads(trtexec_files.times([1.5, 2.5]))
LAYERS = [{"count": 2}, {"name": "a", "timeMs": 1.0, "averageMs": 0.5, "medianMs": 0.5, "percentage": 100.0}]

READERS: dict[str, tuple[str, Any, Callable[[Path], object]]] = {
    "plan": ("plan.json", json.loads(PLAN.to_json()), PruningPlan.load),
    "profile": ("p.json", profile_document(), latency.read_latency),
    "engines": ("engines.json", ENGINES, lambda path: EnginesRecord.load(path.parent)),
    "times": ("a.times.json", TIMES, trtexec.read_times),
    "layers": ("a.profile.json", LAYERS, trtexec.read_layers),
    "index": ("model.safetensors.index.json", INDEX, lambda path: missing_shards(path.parent)),
    "dummy": ("btp-dummy.json", DUMMY, lambda path: read_marker(path.parent)),
    "front": ("front.json", {"format": "btp-front/1", "rows": [{"file": "btp-0.5.json"}]},
              lambda path: plan_folder._is_front(path.parent) and plan_folder._files_of(path.parent)),
    "samples": ("data.jsonl", LINE, lambda path: jsonl_samples(path)),
    "pictures": ("data.jsonl", LINE, lambda path: jsonl_pictures(path, Choice(count=1, seed=0))),
    "prompts": ("prompts.txt", LINE, read_prompts),
    "system": ("system.txt", {"nvpmodel": "MAXN"}, sources.read_system),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@FUZZ
@given(data=st.data())
def test_a_document(reader: str, folder: Path, data: st.DataObject) -> None:
    name, base, read = READERS[reader]
    content = data.draw(documents(base) | damaged(json.dumps(base).encode()))
    place = folder / reader
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    refused(lambda: read(place / name))


# -- bundles and checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any, folder: Path) -> Path:
    copy = folder / "bundle"
    shutil.copytree(tiny_bundle(PLAN).root, copy)
    return copy


@FUZZ
@given(data=st.data())
def test_a_manifest(bundle: Path, data: st.DataObject) -> None:
    """Without the digest, so that the checks behind it are reached; and one that is not signed opens or is refused."""
    path = bundle / "manifest.json"
    kept = path.read_bytes()
    document = {key: value for key, value in json.loads(kept).items() if key != "manifest_sha256"}
    try:
        path.write_bytes(data.draw(documents(document)))
        refused(lambda: Bundle.open(bundle))
        path.write_bytes(data.draw(damaged(kept)))
        assert path.read_bytes() == kept or refused(lambda: Bundle.open(bundle)), "a damaged manifest was opened"
    finally:
        path.write_bytes(kept)


SETTINGS = ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
            "chat_template.jinja"]  # fmt: skip


@FUZZ
@given(data=st.data())
def test_the_files_of_a_model(demo_checkpoint: Path, folder: Path, data: st.DataObject) -> None:
    model = folder / "model"
    if not model.exists():
        shutil.copytree(demo_checkpoint, model)
    name = data.draw(st.sampled_from([name for name in SETTINGS if (model / name).is_file()]))
    kept = (model / name).read_bytes()
    changed = documents(json.loads(kept)) if name.endswith(".json") else damaged(kept)
    try:
        (model / name).write_bytes(data.draw(changed))
        refused(lambda: open_model(str(model)))
    finally:
        (model / name).write_bytes(kept)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
    "b": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [64, 128]},
}


@FUZZ
@given(data=st.data())
def test_safetensors(folder: Path, data: st.DataObject) -> None:
    """What is taken can be read to the last byte, and the format's own library takes it too."""
    import safetensors

    place = folder / "tensors"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text("{}")
    header = data.draw(documents(HEADER))
    content = struct.pack("<Q", len(header)) + header + bytes(128)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    (place / "model.safetensors").write_bytes(content)
    if refused(lambda: open_checkpoint(place)) is None:
        for ref in open_tensors(place / "model.safetensors").values():
            assert ref.read().nbytes == ref.nbytes
        safetensors.deserialize(content)


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Any) -> list[bytes]:
    return [path.read_bytes() for path in sorted((tiny_bundle(PLAN).root / "graphs").glob("*.onnx"))]


@FUZZ
@given(data=st.data())
def test_a_graph(graphs: list[bytes], folder: Path, data: st.DataObject) -> None:
    path = folder / "graph.onnx"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(graphs)))))
    for read in (read_graph, read_model, product_flops):
        refused(lambda read=read: read(path))


@FUZZ
@given(data=st.data())
def test_a_graph_in_onnxruntime(folder: Path, data: st.DataObject) -> None:
    """A small one, whose fields are changed one by one: shapes, types, names, operators."""
    values = [onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in ("x", "y")]
    weight = onnx.helper.make_tensor("w", 1, [2, 2], [1.0] * 4)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight]))
    model.ir_version = 9
    path = folder / "small.onnx"
    path.write_bytes(data.draw(damaged(model.SerializeToString())))
    loader = OrtLoader(custom_ops=None, threads=1, log_severity=4)
    refused(lambda: loader(path).run({"x": np.ones((2, 2), np.float32)}))


# -- pictures, caches ------------------------------------------------------------------------------------------------


def _pictures() -> list[bytes]:
    base = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8))
    files = []
    for kind, mode, options in [
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {}), ("GIF", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "F", {}), ("BMP", "RGB", {}), ("PPM", "RGB", {}), ("ICO", "RGBA", {}), ("EPS", "RGB", {}),
    ]:  # fmt: skip
        stream = io.BytesIO()
        base.convert(mode).save(stream, kind, **options)
        files.append(stream.getvalue())
    return files


PICTURES = _pictures()


@FUZZ
@given(content=st.sampled_from(PICTURES).flatmap(damaged))
def test_a_picture(folder: Path, content: bytes) -> None:
    path = folder / "picture.png"
    path.write_bytes(content)
    if refused(lambda: open_picture(path)) is None:
        assert open_picture(path).mode == "RGB"


def _statistics() -> Statistics:
    samples, layers = 3, 4
    return Statistics(
        taus=(0.9, 0.93),
        counts=np.ones((samples, layers, 2), np.int64),
        attention=np.ones((samples, layers)),
        top_shares=np.ones((samples, layers, len(TOP_SHARES))),
        divergence=np.ones((2, layers)),
        agreement=np.ones((2, layers), bool),
        logits=np.ones((6, 7), np.float32),
        answers=np.ones(6, np.int64),
        lengths=np.full(samples, 2),
    )


@FUZZ
@given(data=st.data())
def test_cached_statistics(folder: Path, data: st.DataObject) -> None:
    """Changed ones are not used: they are measured again, which is said."""
    said: list[str] = []
    cache, key = StatisticsCache(folder / "statistics", said.append), key_of({"x": 1})
    cache.put(key, _statistics())
    path = folder / "statistics" / f"{key}.npz"
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    result = cache.get(key)
    assert result is None or all(
        np.array_equal(getattr(result, name), getattr(_statistics(), name)) for name in ("counts", "logits", "lengths")
    )
    assert len(said) == 1


RUN = {
    "hidden": "t0", "cos": "t0", "sin": "t0", "kept": "t0", "query": None, "key": None, "stages": [], "segments": [],
    "open_segment": None, "embedded": None,
}  # fmt: skip


@FUZZ
@given(data=st.data())
def test_a_checkpoint_of_interrupted_work(folder: Path, data: st.DataObject) -> None:
    import torch

    class Run:
        pass

    shutil.rmtree(folder / "work", ignore_errors=True)
    said: list[str] = []
    work = Work(folder / "work", said.append, interval=0.0)
    steps = work.sequence("pass")
    steps.save(3, {"t0": np.ones((2, 3), np.float32)}, {"runs": [RUN], "observers": []})
    path = data.draw(st.sampled_from(sorted((folder / "work" / "pass").iterdir())))
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_bytes(data.draw(documents(json.loads(path.read_bytes()))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    before = steps.latest()
    done = PassCheckpoints(work, "pass", [], torch.device("cpu")).restore([Run()])
    assert done in (0, 3) and (before is not None or done == 0) and said
