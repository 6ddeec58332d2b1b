"""A bundle with four-bit weights is verified like any other: against transformers with the numbers of its codes."""

from pathlib import Path
from typing import Any

import pytest

from btp_export.exporting import Options, export_bundle
from btp_export.measuring.bench import measure
from btp_export.measuring.verify import verify_bundle
from btp_export.model.open_model import open_model
from btp_export.running.memory_fit import Streaming
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
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


def test_which_rows_ran_is_said(packed: Bundle) -> None:
    for rows in ("int8", "float32"):
        assert measure(packed, threads=1, rounds=1, warm_up=0, activations=rows).activations == rows


def test_a_derived_bundle_keeps_its_weights_packed(packed: Bundle, tmp_path: Path) -> None:
    derived = derive(packed, PLAN.without_stages(), tmp_path / "derived")
    assert derived.manifest.quantization == packed.manifest.quantization is not None
    assert b"BtpLinear" in (derived.root / derived.graph("decode").file).read_bytes()
