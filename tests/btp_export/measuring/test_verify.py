"""`verify` on whole bundles."""

import dataclasses
import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export import cli
from btp_export.measuring.verify import verify_bundle
from btp_export.running.memory_fit import Streaming
from engines.verify.gates import GATES
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from tests.plans import PLAN, tiny_plan


@pytest.mark.parametrize(
    ("plan", "options"),
    [(None, {}), (PLAN, {}), (PLAN, {"batch": 2}), (PLAN, {"assemble": "whole"})],
    ids=["unpruned", "pruned", "batch", "whole"],
)
def test_bundles_of_all_kinds_are_verified(plan: PruningPlan | None, options: dict[str, Any], tiny_bundle: Any) -> None:
    result = verify_bundle(tiny_bundle(plan, **options), samples=3, threads=1)
    assert result.failures == ()
    assert result.passed and result.tokens_equal
    assert result.kept_agreement == ((1.0, 1.0, 1.0) if plan else ())
    assert all(1 - graph.cosine < 1e-9 for graph in result.graphs)


def test_half_precision_is_verified(tiny_bundle: Any) -> None:
    result = verify_bundle(tiny_bundle(PLAN, precision="float16"), samples=2, threads=1)
    assert result.failures == ()
    assert result.passed
    assert any(1 - graph.cosine > 1e-9 for graph in result.graphs), "it did not run in half precision"


@pytest.mark.parametrize("assemble", ["segments", "whole"])
def test_what_begins_with_a_rounded_vision_graph_has_the_gates_of_its_type(assemble: str, tiny_bundle: Any) -> None:
    """bfloat16 on a CPU: decoder graphs compute in float32 and are held to that, free runs and whole graphs are not."""
    plan = tiny_plan(Stage(layer=0, keep=20, importance="norm", diversity="coverage", features="centred"))
    result = verify_bundle(tiny_bundle(plan, precision="bfloat16", assemble=assemble), samples=3, threads=1)
    assert result.failures == () and result.computed_in == "float32"
    whole, wide = GATES["bfloat16"], GATES["float32"]
    assert result.gates.kept_agreement == (whole if assemble == "whole" else wide).agreement
    assert result.gates.free_run_agreement == whole.agreement
    cosines = {graph.name: graph.gates.cosine for graph in result.graphs}
    assert cosines["decode"] == wide.cosine
    assert cosines.get("vision", cosines.get("prefill")) == whole.cosine


def test_the_command_prints_the_contract(tiny_bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundle(PLAN)
    assert cli.main(["verify", str(bundle.root), "--samples", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"passed", "graphs", "kept_agreement", "tokens_equal"} <= document.keys()
    names = [graph["name"] for graph in document["graphs"]]
    steps = [f"{kind}_{number}" for number in range(3) for kind in ("prefill", "select")]
    assert names == ["vision", *steps, "prefill_3", "head", "decode"]
    assert all({"name", "cosine", "norm_ratio", "max_abs"} <= graph.keys() for graph in document["graphs"])
    assert cli.main(["verify", str(bundle.root), "--samples", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("verified")


def copied(bundle: Bundle, folder: Path) -> Path:
    root = folder / "bundle"
    shutil.copytree(bundle.root, root)
    return root


def test_flipped_weights_are_bad_input(tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied(tiny_bundle(PLAN), tmp_path)
    shard = root / "graphs" / "weights" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x40
    shard.write_bytes(bytes(content))
    assert cli.main(["verify", str(root)]) == 2
    assert "model.safetensors was changed" in capsys.readouterr().err


def sealed(root: Path, file: Path) -> None:
    """Record a weight file of a bundle anew, so that it is whole by its hashes."""
    from graphs.files.atomic import record
    from graphs.files.bundle_checks import digest_of

    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["weights"]:
        if entry["file"].endswith(file.name):
            entry["sha256"] = record(root, entry["file"]).sha256
    text = json.dumps(manifest, indent=1) + "\n"
    (root / "manifest.json").write_text(text.replace(manifest["manifest_sha256"], digest_of(text.encode())))


def test_a_bundle_that_computes_something_else_fails(
    tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole by its hashes, but with position tables of another model."""
    from graphs.files.checkpoint import open_tensors

    root = copied(tiny_bundle(PLAN), tmp_path)
    rope = root / "graphs" / "weights" / "btp-rope.safetensors"
    table = open_tensors(rope)["sin"]
    rows = np.memmap(rope, np.float32, "r+", offset=table.offset, shape=table.shape)
    rows *= -1  # turns the other way round
    rows.flush()
    sealed(root, rope)
    assert cli.main(["verify", str(root), "--samples", "3", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["passed"] and not document["tokens_equal"]
    assert all(1 - graph["cosine"] < 1e-9 for graph in document["graphs"]), "the graphs themselves are right"


@pytest.fixture(scope="module")
def overflowing(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 bundle whose layer 3 has one number on the way that only float32 holds, where it counts for nothing."""
    root = copied(tiny_bundle(PLAN, precision="float16"), tmp_path_factory.mktemp("overflowing"))
    weights = Bundle.open(root).checkpoint()
    change(root, weights["language_model.layers.3.mlp.up_proj.weight"], (5, 7), 1e5)
    change(root, weights["language_model.layers.3.mlp.down_proj.weight"], (slice(None), 5), 0)
    return root


def change(root: Path, ref: Any, place: tuple[Any, ...], number: float) -> None:
    """Put a number into a stored matrix of a bundle, which stays whole by its hashes."""
    shard = root / "graphs" / "weights" / ref.shard
    weight = np.memmap(shard, np.float32, "r+", offset=ref.offset, shape=ref.shape)
    weight[place] = number
    weight.flush()
    sealed(root, shard)


@pytest.mark.parametrize("streaming", [None, Streaming(above=0, part_bytes=1)], ids=["open", "streamed"])
def test_the_graph_that_overflows_is_named(overflowing: Path, streaming: Streaming | None) -> None:
    """There is no free run then, whose error sends the user here."""
    result = verify_bundle(Bundle.open(overflowing), samples=2, threads=1, streaming=streaming)
    assert not result.passed and not result.tokens_equal and result.streamed == (streaming is not None)
    *graphs, free = result.failures
    assert [text.split(" of sample")[0] for text in graphs] == ["prefill_1: hidden_out", "decode: key_4"]
    assert all(text.endswith("has numbers that are not finite") for text in graphs)
    assert free == "the free run could not be made: the largest of the model's logits is nan"
    wrong = {graph.name for graph in result.graphs if graph.cosine is None}
    assert wrong == {"prefill_1", "decode"} and len(result.graphs) == 10
    assert result.kept_agreement == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("overflows", "streaming"),
    [(False, None), (True, None), (True, Streaming(above=0, part_bytes=1))],
    ids=["open", "overflows", "overflows streamed"],
)
def test_what_the_free_run_opened_is_closed_before_the_reference_runs(
    overflows: bool, streaming: Streaming | None, tiny_bundle: Any, overflowing: Path
) -> None:
    """Without waiting for the collector, for which large models have no room."""
    bundle = Bundle.open(overflowing) if overflows else tiny_bundle(PLAN)
    left = []

    def look(done: int, total: int, text: str = "") -> None:
        if text.startswith("reference") and not left:
            left.append(opened())

    gc.collect()
    before = opened()
    gc.disable()
    try:
        verify_bundle(bundle, samples=1, tokens=2, threads=1, streaming=streaming, report=look)
    finally:
        gc.enable()
    assert left == [before]


def opened() -> list[str]:
    """Sessions and towers that are open, by their classes."""
    kinds = [type(one).__name__ for one in gc.get_objects()]
    return sorted(kind for kind in kinds if kind in ("OrtRunner", "StreamedRunner", "ImageFeatures"))


def test_the_command_that_was_advised_answers(overflowing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, prompt = "docs/images/scene.png", "what color is the circle ?"
    assert cli.main(["run", str(overflowing), "--image", picture, "--prompt", prompt]) == 1
    assert "btp-export verify shows which graph overflows" in capsys.readouterr().err
    assert cli.main(["verify", str(overflowing), "--samples", "1", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    values = {
        graph["name"]: [graph[key] for key in ("cosine", "norm_ratio", "max_abs")] for graph in document["graphs"]
    }
    assert values["prefill_1"] == values["decode"] == [None] * 3 and None not in values["prefill_0"]
    assert cli.main(["verify", str(overflowing), "--samples", "1"]) == 1
    shown = capsys.readouterr().out
    assert "failed: prefill_1: " in shown and "failed: the free run could not be made" in shown


def test_a_report_of_it_has_its_page(overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"image": os.path.abspath("docs/images/scene.png"), "prompt": "what color is the circle ?", "answer": "red"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(asked))
    settings = ["--data", str(tmp_path / "questions.jsonl"), "--samples", "1", "--threads", "1", "--json"]
    assert cli.main(["report", str(overflowing), *settings]) == 1
    printed, said = capsys.readouterr()
    document = json.loads(printed)
    assert not document["passed"] and document["evaluation"] is None and document["pictures"] == []
    assert "not evaluated: the largest of the model's logits is nan" in said and "not drawn: the largest of" in said
    page = (overflowing / "report" / "index.html").read_text()
    assert "prefill_1: hidden_out of sample" in page and "Accuracy was not measured" in page


def test_the_whole_graph_that_overflows_is_named(tiny_bundle: Any, tmp_path: Path) -> None:
    """It is not forced: where it overflows it keeps other tokens, and its values cannot be compared."""
    root = copied(tiny_bundle(PLAN, precision="float16", assemble="whole"), tmp_path)
    change(root, Bundle.open(root).checkpoint()["language_model.layers.0.mlp.up_proj.weight"], (5, 7), 1e5)
    result = verify_bundle(Bundle.open(root), samples=1, threads=1)
    assert any(text.startswith("prefill: ") and text.endswith("not finite") for text in result.failures)
    assert result.kept_agreement[0] < 1


@pytest.mark.parametrize(
    ("part", "change"),
    [("decoder", {"rms_norm_eps": 1e-2}), ("decoder", {"num_kv_heads": 4}), ("vision", {"channels": 4})],
)
def test_a_spec_that_is_not_of_the_bundle_s_own_files_is_refused(
    tiny_bundle: Any, part: str, change: dict[str, Any]
) -> None:
    from btp_export.model.check_spec import check_spec

    bundle = tiny_bundle(PLAN)
    check_spec(bundle)
    changed = getattr(bundle.spec, part).model_copy(update=change)
    spec = bundle.spec.model_copy(update={part: changed})
    other = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"spec": spec}))
    with pytest.raises(InputError, match=f"says {part}.{next(iter(change))} "):
        check_spec(other)


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--profile", "other"]])
def test_bad_input(arguments: list[str], tiny_bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tiny_bundle(PLAN).root), *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3
