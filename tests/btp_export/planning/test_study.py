"""`btp-export calibrate` as a user calls it: cache, sources, budgets, front, search, switches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export import cli
from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.study import calibration_samples, model_inputs
from graphs.records.plan import PruningPlan

Run = Any


@pytest.fixture()
def run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run(*options)` -> exit code, standard output, standard error, with an empty cache.

    There are 12 pictures of noise, of which 4 are used unless `--samples` says otherwise, with answers of four tokens.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((48, 48), Image.Resampling.BICUBIC).save(images / f"{number}.png")

    def call(*options: str, source: str | None = str(images)) -> tuple[int, str, str]:
        chosen = ["--images", source] if source else []
        chosen += [*([] if "--samples" in options else ["--samples", "4"]), "--answer-tokens", "4"]
        code = cli.main(["calibrate", "--model", str(tiny_checkpoint), *chosen, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_right_answers_of_drawn_pictures_are_expected(tiny_checkpoint: Path) -> None:
    """The model's end behind each, as its own answer would have."""
    model = open_model(str(tiny_checkpoint))
    profile, prompter = default_profile(model), Prompter(model.source.folder, model.spec)
    chosen = calibration_samples(CalibrationSettings(samples=3), prompter, None, profile.image_size)
    samples, _ = fitted_samples(chosen.samples, model.spec, profile)
    known = [*samples[:2], replace(samples[2], answer=None)]
    expected = [sample.expected for sample in model_inputs(model, prompter, profile, known, None)]
    assert expected[2] == () and [prompter.decode(ids) for ids in expected[:2]] == [s.answer for s in samples[:2]]
    assert all(len(ids) > 1 and ids[-1] == model.spec.eos_token_ids[0] for ids in expected[:2])


def test_statistics_are_reused_and_it_is_said(run: Run, tmp_path: Path) -> None:
    bound = ("--drop-bound", "0.1")  # few candidates, on which the statistics do not depend
    first = run(*bound, "--out", str(tmp_path / "first.json"))
    again = run(*bound, "--out", str(tmp_path / "again.json"))
    fresh = run(*bound, "--no-cache", "--out", str(tmp_path / "fresh.json"))
    assert [done[0] for done in (first, again, fresh)] == [0, 0, 0]
    reused = ["reused from the cache" in done[2] for done in (first, again, fresh)]
    assert reused == [False, True, False]
    plans = {(tmp_path / f"{name}.json").read_bytes() for name in ("first", "again", "fresh")}
    assert len(plans) == 1, "the cache never shows in the plan"
    (entry,) = (tmp_path / "cache" / "btp-export" / "statistics").iterdir()
    entry.write_bytes(entry.read_bytes()[:500])
    code, _, said = run(*bound, "--out", str(tmp_path / "mended.json"))
    assert code == 0 and "damaged" in said and (tmp_path / "mended.json").read_bytes() in plans
    assert "reused from the cache" in run(*bound)[2], "and the entry was replaced"
    assert "reused" not in run(*bound, "--tau", "0.5")[2], "other settings are measured"
    assert "reused" not in run(*bound, "--samples", "5")[2], "other pictures are measured"


def test_the_console_shows_layers_and_their_spread(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    header = next(line for line in out.splitlines() if "changed" in line)
    assert header.split() == ["layer", "changed", "±16", "±64", "±256", "attention", "KL", "dropped", "±64", "keep"]
    assert sum(f"{size:>3} pictures: stages first placed at" in out for size in (16, 64, 256)) == 3
    assert all(len(line) <= 80 for line in out.splitlines() if "pictures:" not in line)


def test_a_share_of_the_latency(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--latency-share", "0.7", "--json")
    record = json.loads(out)["plan"]["calibration"]
    assert code == 0 and record["requested_share"] == 0.7 and 0.55 < record["cost"]["share"] <= 0.7
    assert record["cost"]["unit"] == "operations" and record["requested_compression"] is None
    (tmp_path / "bench.json").write_text("{}")
    code, out, err = run("--latency-share", "0.7", "--latency-from", str(tmp_path / "bench.json"))
    assert (code, out) == (2, "") and "no prefill times" in err


def test_a_front_is_a_folder_of_plans(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "front"
    code, out, _ = run("--pareto", "--budgets", "0.5,0.7", "--out", str(folder), "--json")
    assert code == 0
    document = json.loads(out)
    assert sorted(path.name for path in folder.iterdir()) == ["btp-0.500.json", "btp-0.700.json", "front.json"]
    assert json.loads((folder / "front.json").read_text())["rows"] == document["rows"]
    for row in document["rows"]:
        plan = PruningPlan.load(folder / row["file"])
        assert (
            plan.compression == pytest.approx(row["compression"]) and row["compression"] >= row["requested_compression"]
        )
        assert 0 < row["cost_share"] < 1 and row["divergence"] >= 0
    assert run("--pareto", "--budgets", "0.6", "--out", str(folder))[0] == 2, "only with --force"
    (folder / "mine.txt").write_text("a note")
    code, out, _ = run("--pareto", "--budgets", "0.6", "--out", str(folder), "--force")
    assert code == 0 and "compression" in out
    assert sorted(path.name for path in folder.iterdir()) == ["btp-0.600.json", "front.json", "mine.txt"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("a note")
    assert run("--pareto", "--out", str(other), "--force")[0] == 2
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".*"))


def test_the_search_is_recorded_and_shown(run: Run, tmp_path: Path) -> None:
    """A bound on dropping all leaves balanced stages alone; a plan of another kind is not searched, and says so."""
    code, out, _ = run("--samples", "12", "--tune", "--drop-bound", "0.1", "--out", str(tmp_path / "plan.json"))
    assert code == 0 and "searched counts and balance" in out
    record = PruningPlan.load(tmp_path / "plan.json").calibration["tuning"]
    assert (record["samples"], record["held_out"]) == (8, 4) and record["cost"]["tuned"] <= record["cost"]["default"]
    assert ("used: " in out) == record["taken"] and ("the default is kept" in out) == (not record["taken"])
    code, out, err = run("--tune", "--samples", "6")
    assert (code, out) == (2, "") and "--tune with 6 samples" in err
    code, out, _ = run("--samples", "12", "--tune", "--json")
    record = json.loads(out)["plan"]["calibration"]
    searched = record["candidates"][record["chosen"]]["method"] == "stages"
    assert code == 0 and ("searched" in record["tuning"]) == searched
    assert searched or (not record["tuning"]["taken"] and "of another kind" in record["tuning"]["reason"])


def test_switches_are_in_the_plan(run: Run) -> None:
    code, out, _ = run(
        "--importance", "similar-text", "--spatial-metric", "manhattan", "--no-rebalance", "--no-spatial",
        "--stages", "1,3,5", "--balance", "0.3,0.8", "--drop-bound", "0.5", "--compression", "0.6", "--json",
    )  # fmt: skip
    assert code == 0
    plan = json.loads(out)["plan"]
    assert (plan["importance"], plan["spatial_metric"]) == ("similar-text", "manhattan")
    assert [stage["layer"] for stage in plan["stages"]] == [1, 3, 5] and plan["stages"][0]["seeds"] == 0
    assert plan["calibration"]["switches"] == {
        "rebalance": False, "spatial": False, "balance": [0.3, 0.8], "stages": [1, 3, 5],
    }  # fmt: skip
    assert plan["calibration"]["drop_bounds"] == [0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compression", "0.7", "--latency-share", "0.4"], "both --compression and --latency-share"),
        (["--latency-share", "1.2"], "--latency-share 1.2"),
        (["--latency-share", "0.01"], "the least found is"),
        (["--latency-from", "/nowhere/bench.json"], "cannot read /nowhere/bench.json"),
        (["--stages", "3,2"], "rising layers from 1 to 5"),
        (["--stages", "2,x"], "--stages 2,x"),
        (["--balance", "0.4,1.4"], "numbers from 0 to 1"),
        (["--stages", "1,2,4", "--balance", "0.4"], "--balance 0.4 for 2 stages"),
        (["--drop-bound", "0"], "--drop-bound 0"),
        (["--budgets", "0.5"], "--budgets without --pareto"),
        (["--pareto", "--tune"], "--pareto with --tune"),
        (["--pareto", "--budgets", "0.5,0.5"], "different compressions"),
        (["--pareto", "--budgets", "0.95", "--no-spatial"], "leaves less than one of 6 layers"),
        (["--tune", "--samples", "12", "--keep", "20,0", "--balance", "1.0"], "--keep and --balance"),
        (["--importance", "random"], "not one of"),
    ],
)
def test_what_cannot_be_is_one_clear_error(options: list[str], words: str, run: Run) -> None:
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert words in err.replace("\n", " ")


def test_switches_of_a_plan_that_is_there(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "plan.json", tmp_path / "other.json"
    assert run("--out", str(file), "--compression", "0.6")[0] == 0
    code = cli.main(["plan", str(file), "--no-rebalance", "--importance", "mean-text", "--out", str(other), "--json"])
    capsys.readouterr()
    plan = PruningPlan.load(other)
    assert code == 0 and plan.importance == "mean-text"
    assert all(stage.pool == stage.attention_quota for stage in plan.stages)
    assert plan.calibration["switched"] == {"rebalance": False, "importance": "mean-text"}
    assert plan.average_tokens == PruningPlan.load(file).average_tokens
    assert cli.main(["plan", str(file), "--balance", "0.1"]) == 2


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_every_family_is_calibrated_at_the_size_that_is_asked_for(
    family: str, demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, size = tmp_path / "model", "24x48" if family == "llava_next" else "56x112"
    folder.mkdir()
    if family == "llava_next":
        from tests.btp_export.families.test_llava_next import make_next

        make_next(demo_checkpoint, folder)
    else:
        from tests.btp_export.families.qwen import make_qwen

        make_qwen(folder)
    options = ["--image-size", size, "--samples", "12", "--answer-tokens", "4", "--compression", "0.5", "--tune"]
    code = cli.main(["calibrate", "--model", str(folder), *options, "--no-cache", "--json"])
    result = json.loads(capsys.readouterr().out)
    plan, source = result["plan"], result["plan"]["calibration"]["source"]
    assert code == 0 and result["compression"] >= 0.5
    assert source["image_size"] == [int(side) for side in size.split("x")] and source["resized"] == 12
    rows, columns = plan["grid"]
    assert columns == 2 * rows
    blocks = plan.get("blocks") or [[rows, columns]]
    assert plan["image_tokens"] == sum(down * right for down, right in blocks)
    assert (len(blocks) == 2) == (family == "llava_next")
