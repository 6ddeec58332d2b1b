"""Plans by name and file, and the commands `plan` and `calibrate`."""

import json
from pathlib import Path

import pytest

from btp_export import cli
from btp_export.model.open_model import open_model
from btp_export.planning.calibration_settings import CalibrationSettings, check_settings, parse_keep
from btp_export.planning.plan_files import plan_for
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_list_names_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--list", "--json")
    names = [entry["name"] for entry in json.loads(out)["presets"]]
    assert code == 0
    assert names == [
        "none", "btp-paper", "btp-paper-corrected", "fastv", "pyramiddrop", "divprune", "scope",
        "visionzip-select", "vtw", "random", "dart", "btp",
    ]  # fmt: skip


def test_plan_writes_a_file_that_it_shows_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = run(
        capsys, "plan", "pyramiddrop", "--model", "demo", "--compression", "0.7", "--out", str(file), "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert document["compression"] == pytest.approx(0.7, abs=0.005) and len(document["tokens_per_layer"]) == 12
    assert PruningPlan.load(file).model_dump(mode="json") == document["plan"]
    code, out, _ = run(capsys, "plan", str(file), "--model", "demo", "--json")
    assert code == 0 and json.loads(out)["plan"] == document["plan"]
    code, out, _ = run(capsys, "plan", str(file))
    assert code == 0 and "image tokens on average" in out


def test_only_plan_files_are_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, letter = tmp_path / "plan.json", tmp_path / "letter.txt"
    letter.write_text("dear all")
    arguments = ("plan", "vtw", "--model", "demo", "--out")
    assert run(capsys, *arguments, str(file))[0] == 0
    assert run(capsys, *arguments, str(file))[0] == 2
    assert run(capsys, *arguments, str(file), "--force")[0] == 0
    assert run(capsys, *arguments, str(letter), "--force")[0] == 2 and letter.read_text() == "dear all"
    assert run(capsys, *arguments, str(tmp_path))[0] == 2
    assert run(capsys, *arguments, str(tmp_path / "no" / "plan.json"))[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "plan.json"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("plan",), "no plan named"),
        (("plan", "fastw", "--model", "demo"), "no preset or plan file"),
        (("plan", "fastv"), "without a model"),
        (("plan", "btp", "--model", "demo"), "calibrate"),
        (("plan", "fastv", "--model", "demo", "--compression", "1.2"), "compression 1.2"),
        (("plan", "fastv", "--model", "demo", "--compression", "0.95"), "cannot come down"),
        (("calibrate", "--model", "demo", "--keep", "1,x"), "--keep 1,x"),
        (("calibrate", "--model", "demo", "--keep", "10,20"), "falling"),
        (("calibrate", "--model", "demo", "--keep", "10,2", "--compression", "0.7"), "one of them"),
        (("calibrate", "--model", "demo", "--compression", "0.95", "--no-spatial"), "less than one of 12 layers"),
        (("calibrate", "--model", "demo", "--compression", "0.999"), "less than one image token"),
        (("calibrate", "--model", "demo", "--mix", "pages=1"), "--mix with pages at 96 x 96 pixels"),
        (("calibrate", "--model", "demo", "--mix", "scenes=0.7"), "adds up to 0.7"),
        (("calibrate", "--model", "demo", "--mix", "scenes=1", "--images", "."), "--mix with --images"),
        (("calibrate", "--model", "demo", "--weights", "int4"), "--weights int4 without --target"),
        (("calibrate", "--model", "demo", "--kind-bound", "0"), "--kind-bound 0"),
        (("calibrate", "--model", "demo", "--tau", "1.5"), "--tau 1.5"),
        (("calibrate", "--model", "demo", "--samples", "0"), "--samples 0"),
        (("calibrate", "--model", "demo", "--images", "/nowhere"), "/nowhere is not there"),
        (("calibrate", "--model", "demo", "--prompts", "/nowhere"), "--prompts without --images"),
        (("calibrate", "--model", "demo", "--out", "/nowhere/plan.json"), "/nowhere does not exist"),
        (("calibrate", "--model", "demo", "--out", "/proc/plan.json"), "cannot write in /proc"),
        (("plan", "fastv", "--model", "demo", "--out", "/proc/plan.json"), "cannot write in /proc"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert words in err and len(err.strip().splitlines()) <= 3


def test_a_plan_for_another_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tiny, demo = open_model(str(tiny_checkpoint)).spec, open_model("demo").spec
    file = tmp_path / "plan.json"
    file.write_text(plan_for("fastv", tiny).to_json())
    assert plan_for(str(file), tiny).num_layers == 6
    with pytest.raises(InputError, match="llava with 6 layers and 36 image tokens on 6 x 6"):
        plan_for(str(file), demo)


def test_calibrate_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: list
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("what colour is the star?\nwhere is the ring?\n")
    code, out, err = run(
        capsys, "calibrate", "--model", str(tiny_checkpoint), "--images", str(images),
        "--prompts", str(tmp_path / "prompts.txt"), "--compression", "0.6", "--out", str(tmp_path / "p.json"), "--json",
    )  # fmt: skip
    assert code == 0
    assert "broken.png" in err
    result = json.loads(out)
    plan = PruningPlan.load(tmp_path / "p.json")
    assert plan.compression == result["compression"] >= 0.6
    source = plan.calibration["source"]
    assert (source["pictures"], source["skipped"], source["prompts"]) == ("pictures of a folder", ["broken.png"], 2)
    assert plan.calibration["samples"] == 4
    assert str(tmp_path) not in plan.to_json()


def test_keep_is_parsed() -> None:
    assert parse_keep("288,144, 48,0") == (288, 144, 48, 0)
    with pytest.raises(InputError):
        parse_keep("")
    check_settings(CalibrationSettings(keep=(5, 0)))
