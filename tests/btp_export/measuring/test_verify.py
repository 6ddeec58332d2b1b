"""`verify` on whole bundles."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export import cli
from btp_export.measuring.verify import verify_bundle
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from tests.plans import PLAN


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


def test_a_bundle_that_computes_something_else_fails(
    tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole by its hashes, but with position tables of another model."""
    from graphs.files.atomic import record
    from graphs.files.bundle_checks import digest_of
    from graphs.files.checkpoint import open_tensors

    root = copied(tiny_bundle(PLAN), tmp_path)
    rope = root / "graphs" / "weights" / "btp-rope.safetensors"
    table = open_tensors(rope)["sin"]
    rows = np.memmap(rope, np.float32, "r+", offset=table.offset, shape=table.shape)
    rows *= -1  # turns the other way round
    rows.flush()
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["weights"]:
        if entry["file"].endswith(rope.name):
            entry["sha256"] = record(root, entry["file"]).sha256
    text = json.dumps(manifest, indent=1) + "\n"
    (root / "manifest.json").write_text(text.replace(manifest["manifest_sha256"], digest_of(text.encode())))
    assert cli.main(["verify", str(root), "--samples", "3", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["passed"] and not document["tokens_equal"]
    assert all(1 - graph["cosine"] < 1e-9 for graph in document["graphs"]), "the graphs themselves are right"


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
