"""`eval` through the exported graphs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import btp_export
from btp_export import cli
from btp_export.exporting import Options, export_bundle
from btp_export.measuring import evaluate
from btp_export.measuring.evaluate import (
    ScoredEvaluation,
    check_full_weights,
    evaluate_bundle,
    evaluate_plans,
    resolve_budgets,
    resolve_plans,
)
from btp_export.model.open_model import open_model
from btp_export.results.evaluation import Evaluation
from graphs.pruning.operations import cost
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from tests.packed import pack_folder
from tests.plans import tiny_plan

PLAN = tiny_plan(Stage(layer=1, keep=12, attention_quota=6, pool=12, boundary=12), Stage(layer=4, keep=0))
PROMPTS = ["what colour is the star?", "is there a red circle?", "where is the ring?", "how many objects are there?"]


@pytest.fixture(scope="module")
def questions(tiny_bundle: Any, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file whose answers are what the unpruned model says, but for the last, which nobody says."""
    folder = tmp_path_factory.mktemp("questions")
    answers = btp_export.load(tiny_bundle(), threads=1).generate(pictures, PROMPTS, max_new_tokens=3)
    lines = []
    for number, (picture, prompt, answer) in enumerate(zip(pictures, PROMPTS, answers, strict=True)):
        picture.save(folder / f"{number}.png")
        text = "purple elephants" if number == 3 else answer.text
        kind = "even" if number % 2 else "odd"
        lines.append({"image": f"{number}.png", "prompt": prompt, "answer": text, "kind": kind})
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "q.jsonl"


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_what_the_runtime_answers(batch: int, tiny_bundle: Any, questions: Path) -> None:
    """Every answer has 3 tokens, so 3 are generated here too: the longest expected answer plus its end and one more."""
    bundle = tiny_bundle(PLAN, batch=batch)
    result = evaluate_bundle(bundle, plans=["none", "btp", "vtw"], data=questions, threads=1)
    assert result.samples == 4
    assert [row.plan for row in result.rows] == ["none", "btp", "vtw"]
    full, btp, _ = result.rows
    for row in result.rows:
        low, high = row.interval
        assert 0 <= low <= row.accuracy <= high <= 1
        assert set(row.kinds) == {"even", "odd"}
    assert full.compression == 0 and full.flops_ratio == 1
    assert btp.average_tokens == PLAN.average_tokens
    profile = bundle.profile()
    costs = [cost(bundle.spec.decoder, plan, profile).prefill for plan in (PLAN, tiny_bundle().plan)]
    assert btp.flops_ratio == pytest.approx(costs[0] / costs[1])


def test_what_four_bits_cost(
    tiny_bundle: Any, tiny_checkpoint: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """The four corners are what the two bundles answer alone; the rows stay those that were asked for."""
    answers = btp_export.load(tiny_bundle(), threads=1).generate(pictures, PROMPTS, max_new_tokens=12)
    lines = []
    for number, (picture, prompt, answer) in enumerate(zip(pictures, PROMPTS, answers, strict=True)):
        picture.save(tmp_path / f"{number}.png")
        text = "no such answer " * 4 if number == 3 else answer.text  # its length gives all the room there is
        lines.append({"image": f"{number}.png", "prompt": prompt, "answer": text})
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    pack_folder(tiny_checkpoint, tmp_path / "model", group=32)
    options = Options(text_tokens=16, new_tokens=12)
    packed = export_bundle(open_model(str(tmp_path / "model")), PLAN, tmp_path / "bundle", options)
    result = evaluate_bundle(packed, plans=["btp"], data=questions, full_weights=tiny_bundle(PLAN), threads=1)
    assert [row.plan for row in result.rows] == ["btp"]
    own = {
        name: [row.accuracy for row in evaluate_bundle(bundle, plans=["none", "btp"], data=questions, threads=1).rows]
        for name, bundle in (("full", tiny_bundle(PLAN)), ("packed", packed))
    }
    cost = result.weights_cost
    assert cost is not None
    assert [cost.full, cost.pruned, cost.four_bits, cost.both] == own["full"] + own["packed"]
    assert cost.full == 0.75, "three of the four expected answers are the full model's"
    assert cost.weights == "rtn, groups of 32"
    assert Evaluation.model_validate_json(result.to_json()) == result
    assert "weights_cost" not in evaluate_bundle(packed, plans=["btp"], data=questions, threads=1).to_json()
    for pair in ((packed, packed), (tiny_bundle(PLAN), tiny_bundle(PLAN)), (packed, tiny_bundle(PLAN, batch=3))):
        with pytest.raises(InputError, match="own weights"):
            check_full_weights(*pair)


def test_accuracy_counts_exact_answers(tiny_bundle: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    lines = []
    for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        picture.save(tmp_path / f"{number}.png")
        # An answer of n tokens lets n + 2 be generated: find the text the model gives for that length.
        text = "one"
        for _ in range(4):
            length = len(model.prompter.tokens.ids(text))
            text = model.generate(picture, prompt, max_new_tokens=min(12, length + 2))[0].text
        lines.append({"image": f"{number}.png", "prompt": prompt, "answer": text})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = evaluate_bundle(tiny_bundle(PLAN), plans=["btp", "none"], data=tmp_path / "q.jsonl", threads=1)
    room = max(len(model.prompter.tokens.ids(line["answer"])) for line in lines) + 2
    pruned = btp_export.load(tiny_bundle(PLAN), threads=1)
    for name, loaded in (("none", model), ("btp", pruned)):
        answers = loaded.generate(pictures, PROMPTS, max_new_tokens=min(12, room))
        right = [answer.text.strip() == line["answer"].strip() for answer, line in zip(answers, lines, strict=True)]
        row = next(row for row in result.rows if row.plan == name)
        assert row.accuracy == sum(right) / 4
    assert result.full_accuracy == result.rows[1].accuracy


def test_plans_get_the_bundles_own_budget_or_the_given_one(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(PLAN)
    own = resolve_plans(bundle, ["none", "btp", "divprune", "random"], None)
    assert own["btp"] == PLAN and own["none"].stages == ()
    assert own["divprune"].average_tokens == pytest.approx(PLAN.average_tokens, abs=1)
    given = resolve_plans(bundle, ["btp", "divprune"], 0.6)
    assert all(plan.compression == pytest.approx(0.6, abs=0.04) for plan in given.values())
    assert [stage.layer for stage in given["btp"].stages] == [1, 4]


def test_several_budgets_give_a_row_each_and_fixed_plans_one(tiny_bundle: Any) -> None:
    planned = resolve_budgets(tiny_bundle(PLAN), ["none", "btp", "divprune"], [0.5, 0.75])
    assert [name for name, _ in planned] == ["none", "btp", "divprune", "btp", "divprune"]
    for (_, plan), budget in zip(planned[1:], (0.5, 0.5, 0.75, 0.75), strict=True):
        assert plan.compression == pytest.approx(budget, abs=0.04)


def test_equal_plans_are_run_once_and_listed_twice(tiny_bundle: Any, questions: Path) -> None:
    reports: list[int] = []
    result = evaluate_plans(
        tiny_bundle(PLAN),
        [("one", PLAN), ("two", PLAN.model_copy(update={"calibration": {"note": "the same graphs"}}))],
        data=questions,
        threads=1,
        report=lambda done, total, _="": reports.append(total),
    )
    one, two = result.evaluation.rows
    assert one.model_copy(update={"plan": "two"}) == two and result.hits[0] == result.hits[1]
    assert sum(result.hits[0]) == one.accuracy * result.evaluation.samples
    assert set(reports) == {2 * result.evaluation.samples}  # the plan and the unpruned model


def test_plans_side_by_side_answer_as_one_after_another(
    tiny_bundle: Any, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    plans = resolve_plans(tiny_bundle(PLAN), ["none", "btp", "vtw", "random"], None).items()

    def evaluated(**options: Any) -> ScoredEvaluation:
        report = lambda done, total, _="": counts.append(done)  # noqa: E731
        return evaluate_plans(tiny_bundle(PLAN), list(plans), data=questions, report=report, **options)

    together = evaluated(threads=3)
    assert counts == sorted(counts) and counts[-1] == 4 * 4, "answers of all plans in one count"
    monkeypatch.setattr(evaluate, "SMALL_WEIGHTS", 0)
    assert evaluated(threads=1) == together


def test_an_interruption_ends_the_plans_that_are_under_way(
    tiny_bundle: Any, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = list(resolve_plans(tiny_bundle(PLAN), ["none", "btp", "vtw", "random", "fastv", "dart"], None).items())
    asked: list[str] = []
    original = evaluate.answer

    def answer(model: Any, *rest: Any) -> Any:
        asked.append(model.plan.digest())
        if model.plan.digest() == PLAN.digest():
            raise KeyboardInterrupt
        time.sleep(0.2)
        return original(model, *rest)

    monkeypatch.setattr(evaluate, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate_plans(tiny_bundle(PLAN), plans, data=questions, threads=2)
    assert len(set(asked)) <= 4, "what had not begun does not begin"


def test_attention_kept_is_what_transformers_attention_says(tiny_bundle: Any, questions: Path) -> None:
    """Share of the last token's attention on the image tokens, in the layer before the stage, by the streamed run."""
    from btp_export.model.open_model import open_model
    from btp_export.model.prompting import Prompter
    from calibrate.data.samples import jsonl_samples, prepare
    from calibrate.reference.streamed_model import StreamedReference

    bundle = tiny_bundle(PLAN)
    row = evaluate_bundle(bundle, plans=["btp"], data=questions, threads=1).rows[0]
    model = open_model(str(_checkpoint_of(bundle, questions.parent)))
    samples = jsonl_samples(questions, count=4).samples
    prompter = Prompter(bundle.processor, bundle.spec)
    prepared = prepare(samples, prompter, model.family.vision_module(model.checkpoint))
    runs = StreamedReference(model.checkpoint).run([one.input for one in prepared], PLAN)
    shares = [run.stages[0].scores[run.stages[0].indices].sum() / run.stages[0].scores.sum() for run in runs]
    assert row.attention_kept == (pytest.approx(sum(shares) / len(shares), rel=1e-5), None)


def _checkpoint_of(bundle: Any, folder: Path) -> Path:
    """The bundle's weights and configuration as a checkpoint folder."""
    made = folder / "checkpoint"
    made.mkdir(exist_ok=True)
    for file in (bundle.weights / "model.safetensors", *bundle.processor.iterdir()):
        if not (made / file.name).exists():
            (made / file.name).symlink_to(file)
    return made


@pytest.mark.parametrize("names", [["btp", "btp"], ["fastw"], []])
def test_unknown_and_repeated_plans_are_refused(names: list[str], tiny_bundle: Any) -> None:
    with pytest.raises(InputError):
        resolve_plans(tiny_bundle(PLAN), names, None)


def test_the_command_prints_the_contract(tiny_bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny_bundle(PLAN).root), "--plans", "btp,random", "--samples", "5", "--seed", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 5
    keys = {"plan", "average_tokens", "compression", "accuracy", "kept_accuracy", "flops_ratio"}
    assert [row["plan"] for row in document["rows"]] == ["btp", "random"]
    assert all(keys <= row.keys() for row in document["rows"])
    assert cli.main(arguments) == 0
    assert "95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--samples", "0"],
        ["--plans", "x"],
        ["--data", "/nowhere"],
        ["--compression", "2"],
        ["--compression", "0.5,x"],
        ["--compression", "0.5,0.5"],
    ],
)
def test_bad_input(arguments: list[str], tiny_bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tiny_bundle(PLAN).root), *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3


def test_more_samples_than_memory_holds_are_refused_before_they_are_drawn(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrate.data.samples.scene_samples", lambda *_, **__: pytest.fail("they were drawn"))
    each = 4 * (3 * 24 * 24 + 36 * 64)  # pixels and features of the tiny model
    monkeypatch.setenv("BTP_MEMORY_GIB", str(999 * each / 2**30))
    with pytest.raises(InputError, match=r"1000 samples needs about 15\.4 MiB of memory"):
        evaluate_bundle(tiny_bundle(PLAN), plans=["btp"], samples=1000)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("what is <image>?", "the question alone: the chat template puts the picture in by itself"),
        (" ", "the prompt is empty"),
        ("word " * 60, "tokens after the image"),
    ],
)
def test_a_question_that_cannot_be_asked_names_file_and_line(
    prompt: str, words: str, tiny_bundle: Any, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = questions.with_name("bad.jsonl")
    lines = questions.read_text().splitlines()[:1]
    bad.write_text("\n".join([*lines, json.dumps({"image": "0.png", "prompt": prompt, "answer": "x"})]))
    assert cli.main(["eval", str(tiny_bundle().root), "--data", str(bad), "--plans", "none", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert f"{bad} line 2: " in error and words in error
    assert len(error.strip().splitlines()) <= 3
