"""Image sizes from the command line to the answer: profiles, plans for each, the profile that a picture gets."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export import cli
from btp_export.drawing.kept_tokens import draw_kept
from btp_export.exporting import Options, make_profiles
from btp_export.measuring.verify import verify_profiles
from btp_export.model.open_model import open_model
from btp_export.model.pictures import fitted
from btp_export.planning.plan_files import plan_for
from btp_export.planning.study import fitted_samples
from btp_export.running.runtime import load
from calibrate.data.samples import Choice, folder_samples
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle, write_manifest, write_plan
from graphs.records.errors import InputError
from graphs.records.match_plan import plan_for_profile, spec_at
from graphs.records.plan import PruningPlan, rescale
from tests.btp_export.families import parity
from tests.btp_export.families.test_llava_next import make_next

PROMPT = "what color is the circle ?"
SQUARE, WIDE = "b1-48x48-t16-n8", "b1-40x72-t16-n8"


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_next(demo_checkpoint, tmp_path_factory.mktemp("sizes") / "tiny-next")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of two sizes, exported by the command with a plan file made for the second; and that file."""
    folder = tmp_path_factory.mktemp("sizes")
    file = folder / "plan.json"
    assert cli.main(["plan", "btp-paper", "--model", str(checkpoint), "--image-size", "40x72", "--out", str(file)]) == 0
    arguments = ["export", "--model", str(checkpoint), "--plan", str(file), "--out", str(folder / "bundle")]
    arguments += ["--image-size", "48x48", "--image-size", "40x72", "--text-tokens", "16", "--max-new-tokens", "8"]
    assert cli.main(arguments) == 0
    return folder / "bundle", file


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, str]:
    """Files of pictures that fit the square profile, the wide one, and none."""
    collected = {"square": (48, 48), "large": (61, 61), "wide": (40, 72), "tall": (72, 20)}
    for name, size in collected.items():
        parity.picture(*size, seed=len(name)).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in collected}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()


def test_each_size_has_its_graphs_and_plan_and_the_weights_are_shared(exported: tuple[Path, Path]) -> None:
    bundle = Bundle.open(exported[0], check="full")
    assert [profile.name for profile in bundle.manifest.profiles] == [SQUARE, WIDE]
    assert list(bundle.manifest.profile_plans) == [WIDE]
    assert bundle.manifest.profile_plans[WIDE].file == f"plans/{WIDE}.json"
    given = PruningPlan.load(exported[1])
    assert bundle.plan_for(WIDE) == given, "made for this size: taken as it is"
    assert (
        bundle.plan_for() == bundle.plan == rescale(given, image_tokens=192, grid=(12, 12), blocks=((6, 6), (12, 13)))
    )
    assert bundle.graph("vision", SQUARE).outputs[0].shape == (1, 192, 64)
    assert bundle.graph("vision", WIDE).outputs[0].shape == (1, 114, 64)
    stages = [stage for stage in bundle.plan_for(WIDE).stages if stage.keep]
    for number, stage in enumerate(stages):
        indices = {tensor.name: tensor.shape for tensor in bundle.graph(f"select_{number}", WIDE).outputs}["indices"]
        assert indices == (1, stage.keep)
    weights = {path.name for path in bundle.weights.iterdir()}
    assert weights == {"model.safetensors", "btp-vision.safetensors", "btp-rope.safetensors"}


def test_a_rescaled_plan_is_said(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--model", str(checkpoint), "--plan", "fastv", "--out", str(tmp_path / "bundle")]
    arguments += ["--image-size", "48x48", "--image-size", "40x72", "--text-tokens", "16", "--max-new-tokens", "8"]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0
    assert f"profile {WIDE}: the plan for 192 image tokens was rescaled to 114" in err
    document = json.loads(out)
    assert document["profiles"] == [SQUARE, WIDE]
    assert document["plan"]["blocks"] == [[6, 6], [12, 13]]


def test_run_takes_the_profile_that_fits(
    exported: tuple[Path, Path], pictures: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, profile in (("square", SQUARE), ("large", SQUARE), ("wide", WIDE)):
        code, out, _ = run(capsys, "run", str(exported[0]), "--image", pictures[name], "--prompt", PROMPT, "--json")
        assert code == 0
        document, model = json.loads(out), load(exported[0], profile=profile, threads=1)
        assert document["token_ids"] == list(model.generate(pictures[name], PROMPT)[0].token_ids)
        assert document["tokens_kept"] == [stage.keep for stage in model.plan.stages]


def test_a_picture_is_scaled_once_and_stands_wherever_it_is_asked_about(exported: tuple[Path, Path]) -> None:
    model = load(exported[0], profile=WIDE, threads=1)
    fit, tall = parity.picture(40, 72, seed=1), parity.picture(72, 20, seed=2)
    pictures, scaled = fitted([tall, fit, tall, tall.copy()], model.spec, model.profile)
    assert [picture.size for picture in pictures] == [(72, 40)] * 4 and scaled == 3
    assert pictures[1] is fit and pictures[0] is pictures[2] is not pictures[3]
    answers = model.generate([tall, fit, tall], [PROMPT, PROMPT, "where is the ring?"], resize=True)
    for answer, picture, prompt in ((answers[1], fit, PROMPT), (answers[2], pictures[3], "where is the ring?")):
        assert answer.token_ids == load(exported[0], profile=WIDE, threads=1).generate(picture, prompt)[0].token_ids


def test_a_turned_picture_is_counted_upright(checkpoint: Path, tmp_path: Path) -> None:
    """Stored 72 x 40 and shown 40 x 72: `calibrate` and `eval` scale nothing for the profile of 40 x 72."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        parity.picture(72, 40, seed=number).save(tmp_path / f"{number}.jpg", exif=exif)
    model = open_model(str(checkpoint))
    result = folder_samples(tmp_path, Choice(count=4, seed=0))
    resized = {}
    for size in ((40, 72), (72, 40)):
        (profile,) = make_profiles(model, Options(image_sizes=(size,), text_tokens=16, new_tokens=8))
        _, resized[size] = fitted_samples(result.samples, model.spec, profile)
    assert resized == {(40, 72): 0, (72, 40): 4}


def test_a_picture_that_fits_nowhere(
    exported: tuple[Path, Path], pictures: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ["--prompt", PROMPT]
    code, out, err = run(capsys, "run", str(exported[0]), "--image", pictures["tall"], *question)
    assert (code, out) == (2, "")
    assert "72 x 20 pixels (height x width) becomes 6 x 6 + 18 x 7 image tokens" in err
    assert "6 x 6 + 12 x 13 from 48 x 48; or 6 x 6 + 6 x 13 from 40 x 72" in err
    assert "--resize" in err and "--image-size 72x24" in err, "the pinpoint, which becomes the same tokens"
    code, _, err = run(capsys, "run", str(exported[0]), "--image", pictures["wide"], *question, "--profile", SQUARE)
    assert code == 2
    assert "6 x 6 + 6 x 13" in err and "40 x 72;" not in err
    both = ["--image", pictures["square"], "--image", pictures["wide"]]
    code, _, err = run(capsys, "run", str(exported[0]), *both, *question)
    assert (code, "different profiles" in err) == (2, True)
    show = tmp_path / "kept.png"
    code, out, _ = run(
        capsys, "run", str(exported[0]), "--image", pictures["tall"], *question, "--resize", "--show", str(show)
    )
    assert code == 0
    assert show.is_file()


def test_resizing_is_to_the_profile_s_size(exported: tuple[Path, Path]) -> None:
    model = load(exported[0], profile=WIDE, threads=1)
    picture = parity.picture(200, 90)
    with pytest.raises(InputError, match="200 x 90 pixels"):
        model.generate(picture, PROMPT)
    resized = model.generate(picture, PROMPT, resize=True)[0]
    by_hand = model.generate(picture.resize((72, 40), 3), PROMPT)[0]
    assert resized.token_ids == by_hand.token_ids
    fits = parity.picture(80, 144)
    pixels = [model.encode([one], [PROMPT]).pixel_values for one in (fits, fits.resize((72, 40), 3))]
    assert not np.array_equal(*pixels)
    assert model.generate(fits, PROMPT, resize=True)[0].token_ids == model.generate(fits, PROMPT)[0].token_ids


def test_verify_looks_at_every_profile(exported: tuple[Path, Path]) -> None:
    result = verify_profiles(Bundle.open(exported[0]), samples=1, threads=1)
    assert result.passed, result.failures
    assert result.profiles == (SQUARE, WIDE)
    assert {graph.profile for graph in result.graphs} == {SQUARE, WIDE}
    assert result.kept_agreement == (1.0,) * len(Bundle.open(exported[0]).plan.stages)
    one = verify_profiles(Bundle.open(exported[0]), samples=1, threads=1, profile=WIDE)
    assert one.profile == WIDE
    assert one.profiles == (WIDE,)


def test_bench_and_eval_use_the_profile_s_plan(exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", str(exported[0]), "--rounds", "1", "--threads", "1", "--json", "--profile"]
    sizes = [json.loads(run(capsys, *bench, name)[1])["cache_bytes"]["pruned"] for name in (SQUARE, WIDE)]
    assert sizes[0] > sizes[1]
    arguments = ["eval", str(exported[0]), "--samples", "2", "--threads", "1", "--json", "--plans", "btp,fastv,"]
    code, out, _ = run(capsys, *arguments[:-1], f"btp,fastv,{exported[1]}")
    assert code == 0
    document = json.loads(out)
    assert document["image_size"] == [48, 48]
    assert 0 <= document["resized"] <= 2
    own, preset, file = document["rows"]
    assert own["average_tokens"] == file["average_tokens"]
    assert preset["average_tokens"] == pytest.approx(own["average_tokens"], abs=1)


def test_calibration_at_a_size_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "plan.json"
    arguments = ["calibrate", "--model", str(checkpoint), "--samples", "4", "--out", str(out)]
    assert run(capsys, *arguments, "--image-size", "40x72")[0] == 0
    plan = PruningPlan.load(out)
    assert (plan.image_tokens, plan.grid, plan.blocks) == (114, (6, 12), ((6, 6), (6, 13)))
    assert plan.calibration["source"]["image_size"] == [40, 72]
    assert plan.calibration["source"]["resized"] == 4, "the scenes are square"


def test_plans_for_sizes(checkpoint: Path, capsys: pytest.CaptureFixture[str], exported: tuple[Path, Path]) -> None:
    arguments = ["plan", "fastv", "--model", str(checkpoint), "--json"]
    own = json.loads(run(capsys, *arguments)[1])["plan"]
    wide = json.loads(run(capsys, *arguments, "--image-size", "40x72")[1])["plan"]
    assert (own["image_tokens"], wide["image_tokens"]) == (192, 114)
    assert (own["stages"][0]["keep"], wide["stages"][0]["keep"]) == (96, 57)
    arguments[1] = str(exported[1])
    file = json.loads(run(capsys, *arguments, "--image-size", "48x48")[1])["plan"]
    assert file["calibration"]["rescaled_from"]["image_tokens"] == 114


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "fastv", "--model", "CHECKPOINT", "--image-size", "48"], "--image-size 48"),
        (["plan", "fastv", "--model", "CHECKPOINT", "--image-size", "0x48"], "--image-size 0x48"),
        (["plan", "fastv", "--model", "CHECKPOINT", "--image-size", "1x200"], "nothing of it is left"),
        (["plan", "fastv", "--model", "demo", "--image-size", "48x48"], "the only size of demo"),
        (["plan", "plan.json", "--image-size", "48x48"], "without a model"),
        (["export", "--model", "CHECKPOINT", "--image-size", "48x48", "--image-size", "60x60"], "same profile twice"),
        (["export", "--model", "CHECKPOINT", "--max-new-tokens", "300"], "positions"),
        (["export", "--model", "demo", "--image-size", "48x48"], "the only size of demo"),
        (["--model", "CHECKPOINT", "--image-size", "48by48"], "--image-size 48by48"),
    ],
)
def test_sizes_that_cannot_be(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = ["--plan", "none", "--out", "made"] if "plan" not in arguments[:1] else []
    code, out, err = run(capsys, *(str(checkpoint) if word == "CHECKPOINT" else word for word in arguments), *options)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_image_sizes_and_profiles_combine(checkpoint: Path) -> None:
    """A profile that names its image keeps it; the others are made at every size."""
    model = open_model(str(checkpoint))
    options = Options(image_sizes=((48, 48), (40, 72)), profiles=("batch=2", "text=8,image=24x48"))
    assert [profile.name for profile in make_profiles(model, options)] == [
        "b2-48x48-t64-n128", "b2-40x72-t64-n128", "b1-24x48-t8-n128",
    ]  # fmt: skip


# Bundles with several plans


def test_deriving_brings_a_plan_to_every_profile(exported: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(exported[0])
    plan = plan_for("pyramiddrop", spec_at(bundle.spec, bundle.profile()))
    derived = derive(bundle, plan, tmp_path / "derived")
    assert derived.plan == plan
    assert derived.plan_for(WIDE) == plan_for_profile(plan, bundle.profile(WIDE))
    back = derive(derived, bundle.plan, tmp_path / "back")
    assert back.plan_for(WIDE).stages == bundle.plan_for(WIDE).stages
    again = derive(bundle, bundle.plan, tmp_path / "again")
    assert (again.root / "manifest.json").read_bytes() == (bundle.root / "manifest.json").read_bytes()


def test_damaged_plans_of_profiles(exported: tuple[Path, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    bundle = Bundle.open(root)
    fields: dict[str, Any] = {
        name: getattr(bundle.manifest, name)
        for name in type(bundle.manifest).model_fields
        if name not in ("format", "manifest_sha256")
    }
    other = write_plan(root, bundle.plan, f"plans/{WIDE}.json")
    write_manifest(root, **(fields | {"profile_plans": {WIDE: other}}))
    with pytest.raises(InputError, match=rf"plans/{WIDE}.json is for 192 image tokens on 12 x 12"):
        Bundle.open(root)
    document = json.loads((root / "manifest.json").read_text())
    document["profile_plans"]["elsewhere"] = document["profile_plans"].pop(WIDE)
    (root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="names elsewhere, which is no profile"):
        Bundle.open(root)
    write_manifest(root, **fields)
    (root / "plans" / f"{WIDE}.json").unlink()
    with pytest.raises(InputError, match=rf"plans/{WIDE}.json is missing"):
        Bundle.open(root)


def test_show_draws_what_the_model_saw(
    exported: tuple[Path, Path],
    pictures: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture scaled with --resize is drawn scaled: its tokens lie on that one."""
    drawn: list[Image.Image] = []

    def draw(picture: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        drawn.append(picture)
        return draw_kept(picture, *arguments, **options)

    monkeypatch.setattr("btp_export.drawing.kept_tokens.draw_kept", draw)
    question = ["run", str(exported[0]), "--prompt", PROMPT]
    for name, more, size in (("tall", ["--resize", "--profile", SQUARE], (48, 48)), ("large", [], (61, 61))):
        shown = str(tmp_path / f"{name}-shown.png")
        code, _, said = run(capsys, *question, "--image", pictures[name], "--show", shown, *more)
        assert code == 0, said
        assert drawn.pop().size == size


def test_a_picture_for_no_graph_is_refused_before_anything_is_loaded(
    exported: tuple[Path, Path], pictures: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("btp_export.running.runtime.load", None)
    for more in ([], ["--profile", SQUARE]):
        code, _, said = run(capsys, "run", str(exported[0]), "--prompt", PROMPT, "--image", pictures["tall"], *more)
        assert code == 2 and "run with --resize" in said
