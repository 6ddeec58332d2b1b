"""Plans that score by the vision tower's class token, from export to answers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btp_export.exporting import vision_with_attention
from btp_export.measuring.evaluate import evaluate_bundle
from btp_export.measuring.verify import verify_bundle
from btp_export.planning.plan_files import plan_for
from btp_export.running.memory_fit import Streaming
from btp_export.running.runtime import load
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.match_plan import check_fits
from graphs.records.plan import PruningPlan, Stage
from tests.conftest import BundleMaker
from tests.plans import plan_of

PROMPT = "what is it ?"


def by_class_token(bundle: Bundle) -> PruningPlan:
    """Class attention before layer 0, then a stage by the decoder's own attention."""
    first = Stage(layer=0, keep=12, importance="vision-cls", attention_quota=8, pool=8, boundary=36)
    second = Stage(layer=2, keep=5, attention_quota=5, pool=6, boundary=5)
    return plan_of(bundle.spec, first, second)


@pytest.fixture(scope="module")
def derived(tiny_bundle: BundleMaker, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of a bundle that was exported without the attention."""
    bundle = tiny_bundle(batch=2)
    out = tmp_path_factory.mktemp("derived") / "bundle"
    return derive(bundle, by_class_token(bundle), out, vision=vision_with_attention)


def outputs(bundle: Bundle) -> list[str]:
    return [output.name for output in bundle.graph("vision").outputs]


def test_the_output_is_there_only_when_a_plan_asks(tiny_bundle: BundleMaker, derived: Bundle) -> None:
    assert outputs(tiny_bundle(batch=2)) == ["image_features"]
    assert outputs(derived) == ["image_features", "class_attention"]
    assert "class_attention" in [each.name for each in derived.graph("select_0").inputs]
    assert "class_attention" not in [each.name for each in derived.graph("select_1").inputs]


def test_segments_verify(derived: Bundle) -> None:
    result = verify_bundle(derived, samples=3, threads=1)
    assert result.failures == () and result.passed and result.tokens_equal
    assert all(share == 1.0 for share in result.kept_agreement)


def test_streamed_verify(derived: Bundle) -> None:
    """One part of a graph in memory at a time: the attention flows from the vision graph to the stage there too."""
    result = verify_bundle(derived, samples=2, threads=1, streaming=Streaming(above=0))
    assert result.passed and result.tokens_equal


def test_exported_whole_keeps_the_same_tokens(
    tiny_bundle: BundleMaker, derived: Bundle, pictures: list[Image.Image]
) -> None:
    whole = tiny_bundle(by_class_token(derived), batch=2, assemble="whole")
    assert verify_bundle(whole, samples=2, threads=1).passed
    wanted, got = (load(bundle, threads=1) for bundle in (derived, whole))
    encoded = wanted.encode(pictures[:2], [PROMPT] * 2)
    for one, other in zip(wanted.prefill(encoded).kept, got.prefill(encoded).kept, strict=True):
        np.testing.assert_array_equal(one, other)


def test_features_of_another_plan_do_not_stand_in_for_the_attention(
    tiny_bundle: BundleMaker, derived: Bundle, pictures: list[Image.Image]
) -> None:
    plain, scored = load(tiny_bundle(batch=2), threads=1), load(derived, threads=1)
    encoded = plain.encode(pictures[:2], [PROMPT] * 2)
    plain.prefill(encoded)
    assert scored.prefill(encoded, vision=plain.chain.vision_outputs).vision_ms is not None
    assert scored.prefill(encoded, vision=scored.chain.vision_outputs).vision_ms is None


def test_eval_takes_the_preset_on_a_bundle_without_the_output(tiny_bundle: BundleMaker) -> None:
    result = evaluate_bundle(tiny_bundle(), plans=("visionzip-select", "scope"), compression=0.7, samples=4, threads=1)
    assert [row.plan for row in result.rows] == ["visionzip-select", "scope"]
    assert len({round(row.average_tokens) for row in result.rows}) == 1


def test_refusals(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    plan = by_class_token(bundle)
    with pytest.raises(InputError, match="without the vision tower's class attention"):
        derive(bundle, plan, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for has, said in ((False, "a vision tower with a class token"), (None, "export the model again")):
        vision = bundle.spec.vision.model_copy(update={"class_token": has})
        spec = bundle.spec.model_copy(update={"vision": vision})
        with pytest.raises(InputError, match="vision-cls") as error:
            check_fits(spec, plan, bundle.profile())
        assert said in str(error.value)
        with pytest.raises(InputError, match="visionzip-select"):
            plan_for("visionzip-select", spec)
