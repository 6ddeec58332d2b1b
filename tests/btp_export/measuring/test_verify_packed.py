"""A bundle with four-bit weights is verified like any other: against transformers with the numbers of its codes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btp_export.exporting import Options, export_bundle
from btp_export.measuring import rounding
from btp_export.measuring.bench import measure, random_samples
from btp_export.measuring.verify import verify_bundle
from btp_export.model.open_model import open_model
from btp_export.running.memory_fit import Streaming
from btp_export.running.runtime import BundleModel
from engines.native.libraries import multiplies
from engines.runners.on_cpu.linear import INT8, LINEAR, for_cpu
from engines.runners.onnxruntime import OrtLoader
from engines.verify.gates import GATES, compare
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.files.onnx_file import read_graph
from graphs.records.errors import CheckError
from tests.conftest import make_tiny
from tests.engines.native import builds
from tests.packed import pack_folder
from tests.plans import PLAN


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packed")
    pack_folder(tiny_checkpoint, folder / "model", input_scales=True)
    return export_bundle(
        open_model(str(folder / "model")), PLAN, folder / "bundle", Options(text_tokens=16, new_tokens=12)
    )


@pytest.mark.parametrize("streaming", [None, Streaming(above=0, part_bytes=1)])
def test_it_holds_the_gates_of_float32(packed: Bundle, streaming: Streaming | None) -> None:
    result = verify_bundle(packed, samples=2, tokens=4, threads=1, streaming=streaming)
    assert result.passed, result.failures
    assert result.streamed == (streaming is not None)
    assert result.activations == "float32"
    assert (result.int8_rows is None) == result.streamed
    if result.int8_rows is not None:
        assert 0.95 < result.int8_rows.logits_cosine < 0.9999999, "near, and not the same"
    assert min(float(graph.cosine or 0) for graph in result.graphs) > 0.99999


def test_answers_that_int8_rows_do_not_give_are_a_failure(packed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` takes int8 rows: its error sends the user to verify, where it must not be the last word."""

    def refuse(*args: Any, **settings: Any) -> None:
        raise CheckError("the largest of the model's logits is nan", do="btp-export verify")

    monkeypatch.setattr(rounding, "compare_rows", refuse)
    result = verify_bundle(packed, samples=1, tokens=2, threads=1)
    assert not result.passed and result.tokens_equal and len(result.graphs) > 5
    said = "the free run with int8 rows could not be made: the largest of the model's logits is nan"
    assert result.failures == (said,) and result.int8_rows is None


def test_which_rows_ran_is_said(packed: Bundle) -> None:
    for rows in ("int8", "float32"):
        assert measure(packed, threads=1, rounds=1, warm_up=0, activations=rows).activations == rows


def test_a_derived_bundle_keeps_its_weights_packed(packed: Bundle, tmp_path: Path) -> None:
    derived = derive(packed, PLAN.without_stages(), tmp_path / "derived")
    assert derived.manifest.quantization == packed.manifest.quantization is not None
    assert b"BtpLinear" in (derived.root / derived.graph("decode").file).read_bytes()


@pytest.fixture(scope="module")
def halves(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle of a float16 checkpoint whose rows are long enough for codes to be multiplied as they are stored."""
    folder = tmp_path_factory.mktemp("halves")
    make_tiny(demo_checkpoint, folder / "model", hidden_size=128, intermediate_size=128, head_dim=32)
    file = folder / "model" / "model.safetensors"
    save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)
    pack_folder(folder / "model", folder / "packed", group=32)
    options = Options(text_tokens=16, new_tokens=12, precision="float16")
    return export_bundle(open_model(str(folder / "packed")), PLAN, folder / "bundle", options)


def test_a_float16_bundle_holds_its_gates(halves: Bundle) -> None:
    result = verify_bundle(halves, samples=2, tokens=4, threads=1)
    assert result.passed, result.failures
    assert result.int8_rows is not None
    assert 0.95 < result.int8_rows.logits_cosine < 0.9999999, "near, as in float32: a kept token may be another one"


@pytest.mark.skipif(not multiplies(builds.ort_library()), reason="this processor has no AVX512-VNNI")
def test_stored_codes_of_a_float16_bundle_give_what_packed_ones_do(halves: Bundle) -> None:
    graph = read_graph(halves.root / halves.graph("decode").file)
    before = [node.op_type for node in graph.graph.node].count(LINEAR)
    for_cpu(graph, int8=True)
    assert [node.op_type for node in graph.graph.node].count(INT8) == before == 7 * 6
    found = []
    for library in (builds.ort_library(), None):
        model = BundleModel(halves, OrtLoader(threads=1, accuracy_level=4, custom_ops=library))
        encoded = random_samples(model)
        prefill = model.prefill(encoded)
        logits = [np.asarray(prefill.logits), *(model.decode_step(prefill, [token]) for token in (5, 9))]
        found.append(np.concatenate(logits))
    cosine, ratio, _ = compare(found[1], found[0])
    assert cosine >= GATES["float16"].cosine
    assert abs(ratio - 1) <= GATES["float16"].norm
