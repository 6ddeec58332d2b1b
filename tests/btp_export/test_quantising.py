"""`--weights int4`: packed, resumed, verified; what later layers saw is what earlier ones became."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.model.open_model import Model, open_model
from btp_export.model.prompting import Prompter
from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.choose_plan import choose_plan
from btp_export.planning.study import calibration_samples, model_inputs
from btp_export.quantised.packed_folder import PackedWriter
from btp_export.quantising import check_weights, quantise_model, with_answers
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.cache_folder import cache_folder
from graphs.files.packed_weights import packed_linear, read_tensor
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile
from tests.btp_export.families.qwen import make_qwen
from tests.packed import pack_folder

SETTINGS = CalibrationSettings(samples=3)
Setup = tuple[Model, PruningPlan, ShapeProfile]


@pytest.fixture(scope="module")
def setup(tiny_checkpoint: Path) -> Setup:
    model = open_model(str(tiny_checkpoint))
    profile = default_profile(model)
    return model, choose_plan(model, "fastv", replace(SETTINGS, compression=0.5), profile=profile), profile


@pytest.fixture(scope="module")
def made(setup: Setup) -> dict[str, Model]:
    model, plan, profile = setup
    return {
        method: quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile, method=method)
        for method in ("awq", "rtn")
    }


def held_out(setup: Setup) -> list[ReferenceInput]:
    """Pictures that nothing was searched on, through the model's own tower."""
    model, _, profile = setup
    prompter = Prompter(model.source.folder, model.spec)
    chosen = calibration_samples(replace(SETTINGS, samples=6, seed=99), prompter, None, profile.image_size)
    samples, _ = fitted_samples(chosen.samples, model.spec, profile)
    return model_inputs(model, prompter, profile, samples, None)


def noise(setup: Setup) -> list[ReferenceInput]:
    """Image features as no picture gives them."""
    model = setup[0]
    words = [word for word in (5, 9, 11, 4, 7) if word != model.spec.image_token_id]
    ids = torch.tensor([words[0], *[model.spec.image_token_id] * model.spec.vision.image_tokens, *words[1:]])
    return [
        ReferenceInput(ids, torch.randn(model.spec.vision.image_tokens, 64, generator=torch.Generator().manual_seed(1)))
    ]


def logits(model: Model, plan: PruningPlan, inputs: list[ReferenceInput]) -> np.ndarray:
    return np.stack([run.logits[0] for run in StreamedReference(model.checkpoint).run(inputs, plan)])


def test_answers_that_are_known_follow_their_prompts(setup: Setup) -> None:
    model, _, profile = setup
    prompter = Prompter(model.source.folder, model.spec)
    chosen = calibration_samples(SETTINGS, prompter, None, profile.image_size)
    answers = ["green square", None, "red"]
    samples = [replace(sample, answer=answer) for sample, answer in zip(chosen.samples, answers, strict=True)]
    prompts = model_inputs(model, prompter, profile, samples, None)
    shown = with_answers(prompts, samples, prompter, 1)
    own = AutoTokenizer.from_pretrained(model.source.folder)
    wanted = [own(answer or "", add_special_tokens=False).input_ids[:1] for answer in answers]
    assert [list(one.new_tokens) for one in shown] == wanted and len(wanted[0]) == len(wanted[2]) == 1
    assert all(one.input_ids is prompt.input_ids for one, prompt in zip(shown, prompts, strict=True))


def test_every_matrix_is_in_four_bits_and_nothing_else_is(made: dict[str, Model], setup: Setup) -> None:
    for method, model in made.items():
        record = model.checkpoint.quantization
        assert record is not None
        assert (record.method, record.groups) == (method, {32: 42})
        assert model.spec == setup[0].spec
        assert model.source.origin == setup[0].source.origin
        assert open_model(str(model.source.folder)).checkpoint.quantization == record
        for layer in range(6):
            linear = packed_linear(model.checkpoint, f"language_model.layers.{layer}.mlp.down_proj")
            assert linear is not None
            assert (linear.n, linear.k, linear.group, linear.input_scale) == (64, 96, 32, None)
        same = [name for name in setup[0].checkpoint.tensors if ".layers." not in name or "vision" in name]
        for name in same:
            np.testing.assert_array_equal(model.checkpoint[name].read(), setup[0].checkpoint[name].read())


def test_the_search_is_nearer_than_rounding_on_other_pictures_and_no_further_on_noise(
    made: dict[str, Model], setup: Setup
) -> None:
    plain, plan, _ = setup
    errors: dict[str, list[float]] = {"awq": [], "rtn": []}
    for inputs in (held_out(setup), noise(setup)):
        full = logits(plain, plan, inputs)
        for name, model in made.items():
            errors[name].append(np.linalg.norm(logits(model, plan, inputs) - full) / np.linalg.norm(full))
    assert 0.001 < errors["awq"][0] < 0.85 * errors["rtn"][0] < 0.5
    assert errors["awq"][1] < 1.1 * errors["rtn"][1] < 0.6


def test_the_second_time_nothing_is_done(made: dict[str, Model], setup: Setup) -> None:
    model, plan, profile = setup

    def report(done: int, total: int, text: str = "") -> None:
        raise AssertionError("no work")

    again = quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile, report=report)
    assert again.source.folder == made["awq"].source.folder
    other = quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile, method="rtn", report=report)
    assert other.source.folder == made["rtn"].source.folder


def test_an_interrupted_search_goes_on_to_the_same_bytes(
    made: dict[str, Model],
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plan, profile = setup
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    searched: list[int] = []

    def stop(done: int, total: int, text: str = "") -> None:
        if text == "searching four-bit weights" and done == 3:
            raise KeyboardInterrupt

    def count(done: int, total: int, text: str = "") -> None:
        if text == "searching four-bit weights":
            searched.append(done)

    with pytest.raises(KeyboardInterrupt):
        quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile, report=stop)
    [partial] = (tmp_path / "btp-export" / "packed").glob(".*.partial")
    assert sorted(path.name for path in partial.glob("layer-*")) == [f"layer-{n:05d}.safetensors" for n in range(3)]
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("layer-*")}
    resumed = quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile, report=count)
    folder = resumed.source.folder
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert not partial.exists()
    assert not (folder / "work").exists()
    for path in made["awq"].source.folder.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_plan_decides_what_the_weights_are_made_for(made: dict[str, Model], setup: Setup) -> None:
    model, plan, profile = setup
    unpruned = choose_plan(model, "none", SETTINGS, profile=profile)
    other = quantise_model(model, unpruned, SETTINGS, "int4-g32", profile=profile)
    after = f"language_model.layers.{plan.stages[0].layer}.mlp.down_proj.weight"
    assert (read_tensor(other.checkpoint, after) != read_tensor(made["awq"].checkpoint, after)).any()


def test_heads_that_share_values_and_their_biases(tmp_path: Path) -> None:
    """Qwen2.5-VL: what is divided out of v's rows, biases included, is multiplied into o's columns of every head."""
    make_qwen(tmp_path / "model")
    model = open_model(str(tmp_path / "model"))
    profile = default_profile(model, (140, 112))
    plan = choose_plan(model, "none", SETTINGS, profile=profile)
    built = quantise_model(model, plan, SETTINGS, "int4-g32", profile=profile)
    bias = "language_model.layers.0.self_attn.v_proj.bias"
    rows = read_tensor(built.checkpoint, bias) / model.checkpoint[bias].read().astype(np.float32)
    assert built.checkpoint[bias].dtype == "F32"
    assert np.ptp(rows) > 0.01, "something was divided out"
    columns = np.repeat(rows.reshape(2, 1, -1), 2, axis=1).reshape(-1)
    for name, undone in (("v_proj", 1 / rows[:, None]), ("o_proj", columns[None])):
        weight = f"language_model.layers.0.self_attn.{name}.weight"
        exact, got = model.checkpoint[weight].read().astype(np.float32), read_tensor(built.checkpoint, weight)
        if name == "v_proj":  # its columns are those of the norm
            norm = "language_model.layers.0.input_layernorm.weight"
            got = (
                got
                * built.checkpoint[norm].read().astype(np.float32)
                / model.checkpoint[norm].read().astype(np.float32)
            )
        assert np.linalg.norm(got * undone - exact) < 0.2 * np.linalg.norm(exact)


@pytest.fixture
def nothing_written() -> Iterator[None]:
    before = sorted(cache_folder().rglob("*"))
    yield
    assert sorted(cache_folder().rglob("*")) == before


@pytest.mark.usefixtures("nothing_written")
def test_what_cannot_be_quantised_is_refused(setup: Setup, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, plan, profile = setup
    with pytest.raises(InputError, match=r"--weights int4: group is 128 and K is 64") as error:
        quantise_model(model, plan, SETTINGS, "int4", profile=profile)
    assert error.value.do == "--weights int4-g32"
    pack_folder(tiny_checkpoint, tmp_path / "packed", group=32)
    packed = open_model(str(tmp_path / "packed"))
    with pytest.raises(InputError, match=r"packed has four-bit weights already \(rtn, tests\)"):
        check_weights(packed, "int4-g32")
    check_weights(packed, "model")
    unknown: Any = "int3"
    with pytest.raises(InputError, match="--weights int3"):
        check_weights(model, unknown)


def test_a_layer_takes_the_names_of_its_source(made: dict[str, Model], setup: Setup) -> None:
    """transformers' names, not ours: the folder stays one that others read."""
    stored = {ref.stored_name for ref in made["rtn"].checkpoint.tensors.values()}
    expected = {ref.stored_name for name, ref in setup[0].checkpoint.tensors.items() if name.endswith("norm.weight")}
    assert expected <= stored
    refs = PackedWriter(made["rtn"].source.folder, setup[0].checkpoint).read(0)
    assert "self_attn.q_proj.qweight" in refs
