"""The streamed reference against transformers' whole model, and against a second implementation of pruning."""

import tracemalloc
from collections import Counter as Counts
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btp_export.families.llava import FAMILY
from calibrate.place.counts import Shape
from calibrate.place.presets import preset
from calibrate.reference import streamed_model
from calibrate.reference.decoder import forward_with_attention
from calibrate.reference.observers import LayerView
from calibrate.reference.records import ReferenceInput
from calibrate.reference.runs import image_start
from calibrate.reference.streamed_model import StreamedReference, _finite
from graphs.ops import select_tokens
from graphs.pruning import torch_scores
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from tests.calibrate.models import IMAGE_TOKEN, PREFIX, checkpoint, make_input, make_llava
from tests.calibrate.naive import prefill

LAYERS, SIDE = 6, 6
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))
BALANCED = SHAPE.plan(
    (
        Stage(layer=1, keep=20, attention_quota=6, pool=18, boundary=20, diversity_quota=6, seeds=9),
        Stage(layer=3, keep=9, attention_quota=6, pool=10, boundary=9, diversity_quota=3),
        Stage(layer=4, keep=4, attention_quota=4, pool=5, boundary=4),
        Stage(layer=5, keep=0),
    )
)


@pytest.fixture(scope="module", params=["own output matrix", "tied"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llava")
    return make_llava(folder, layers=LAYERS, side=SIDE, tied=request.param == "tied"), folder


@pytest.fixture(scope="module")
def reference(model: tuple[Any, Path]) -> StreamedReference:
    return StreamedReference(checkpoint(model[1]))


def test_unpruned_logits_are_the_whole_models(model: tuple[Any, Path], reference: StreamedReference) -> None:
    for seed, text in ((0, 3), (1, 9)):
        given, pixels = make_input(model[0], text=text, seed=seed)
        with torch.no_grad():
            whole = model[0](input_ids=given.input_ids[None], pixel_values=pixels).logits[0, -1]
        run = reference.run([given], SHAPE.plan(()))[0]
        assert run.image_start == PREFIX
        np.testing.assert_allclose(run.logits[0], whole.numpy(), atol=2e-5)


def test_appended_tokens_check_generate_in_one_pass(model: tuple[Any, Path], reference: StreamedReference) -> None:
    given, pixels = make_input(model[0], text=5, seed=3)
    with torch.no_grad():
        ids = model[0].generate(
            input_ids=given.input_ids[None], pixel_values=pixels, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    answer = ids[0, len(given.input_ids) :].tolist()
    appended = ReferenceInput(given.input_ids, given.image_features, tuple(answer[:-1]))
    assert reference.run([appended], SHAPE.plan(()))[0].next_tokens == answer
    wrong = ReferenceInput(given.input_ids, given.image_features, ((answer[0] + 1) % 60, *answer[1:-1]))
    assert reference.run([wrong], SHAPE.plan(()))[0].next_tokens[0] == answer[0], "the first row sees the prompt only"


@pytest.mark.parametrize("name", ["balanced", "btp-paper", "fastv", "pyramiddrop", "divprune", "vtw"])
def test_pruned_runs_equal_a_second_implementation(
    name: str, model: tuple[Any, Path], reference: StreamedReference
) -> None:
    plan = BALANCED if name == "balanced" else preset(
        name, model_type="llava", num_layers=LAYERS, image_tokens=SIDE * SIDE, grid=(SIDE, SIDE),
        released=FAMILY.released,
    )  # fmt: skip
    inputs = [make_input(model[0], text=4 + seed, seed=seed)[0] for seed in range(3)]
    for given, run in zip(inputs, reference.run(inputs, plan, record_segments=True), strict=True):
        with torch.no_grad():
            logits, kept, states = prefill(model[0], given.input_ids, given.image_features, plan, PREFIX)
        assert [list(stage.absolute) for stage in run.stages] == kept
        np.testing.assert_allclose(run.logits[0], logits.numpy(), atol=2e-5)
        for segment in run.segments:
            np.testing.assert_allclose(segment.hidden_out, states[segment.stop - 1][0].numpy(), atol=1e-4)


def test_appended_tokens_change_nothing_before_them(model: tuple[Any, Path], reference: StreamedReference) -> None:
    given = make_input(model[0], text=6, seed=5)[0]
    more = ReferenceInput(given.input_ids, given.image_features, (7, 8, 9))
    plain, appended = (reference.run([sample], BALANCED, record_segments=True)[0] for sample in (given, more))
    for a, b in zip(plain.stages, appended.stages, strict=True):
        assert list(a.absolute) == list(b.absolute) and a.last == b.last
    for a, b in zip(plain.segments, appended.segments, strict=True):
        np.testing.assert_allclose(a.hidden_out, b.hidden_out[: a.last + 1], atol=1e-5)
    np.testing.assert_allclose(plain.logits[0], appended.logits[0], atol=1e-5)


def test_a_generated_placeholder_is_a_word_like_any(model: tuple[Any, Path], reference: StreamedReference) -> None:
    given = make_input(model[0])[0]
    appended = ReferenceInput(given.input_ids, given.image_features, (IMAGE_TOKEN,))
    run = reference.run([appended], SHAPE.plan(()), record_segments=True)[0]
    assert run.embedded is not None
    wanted = model[0].model.language_model.embed_tokens.weight[IMAGE_TOKEN].detach().numpy()
    np.testing.assert_array_equal(run.embedded.hidden[-1], wanted)


def test_kept_tokens_keep_their_positions(model: tuple[Any, Path], reference: StreamedReference) -> None:
    run = reference.run([make_input(model[0])[0]], BALANCED, record_segments=True)[0]
    assert run.embedded is not None
    for stage, segment in zip(run.stages, run.segments[1:], strict=True):
        rows = [*range(PREFIX), *(PREFIX + stage.absolute), *range(PREFIX + SIDE * SIDE, len(run.embedded.cos))]
        np.testing.assert_array_equal(segment.cos, run.embedded.cos[rows])
        np.testing.assert_array_equal(segment.sin, run.embedded.sin[rows])
        assert segment.last == stage.last


def test_forced_kept_sets_are_used(model: tuple[Any, Path], reference: StreamedReference) -> None:
    given = make_input(model[0])[0]
    free = reference.run([given], BALANCED)[0]
    forced = [list(range(20)), list(range(9)), list(range(4)), []]
    run = reference.run([given], BALANCED, forced_kept=[forced])[0]
    assert [list(stage.indices) for stage in run.stages] == forced
    assert list(run.stages[0].chosen) == list(free.stages[0].chosen), "what it would have chosen is still told"
    assert list(run.stages[0].chosen) != forced[0]


def test_several_plans_in_one_pass_equal_single_runs(model: tuple[Any, Path], reference: StreamedReference) -> None:
    """Also where plans share their first stage, whose rows are then computed once."""
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    later = BALANCED.model_copy(update={"stages": (BALANCED.stages[0], Stage(layer=4, keep=3, boundary=3))})
    plans = [SHAPE.plan(()), BALANCED, later]
    together = reference.run(inputs, plans)
    single = [run for plan in plans for run in reference.run(inputs, plan)]
    assert [(run.plan, run.sample) for run in together] == [(run.plan, run.sample) for run in single]
    for a, b in zip(together, single, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
        assert [list(stage.absolute) for stage in a.stages] == [list(stage.absolute) for stage in b.stages]


def test_plans_that_keep_fewer_by_one_rule_share_its_picks(
    model: tuple[Any, Path], reference: StreamedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep is what the operator gives for each count alone; the rows chosen from differ after layer 2."""

    def covering(layer: int, keep: int, features: str = "raw", importance: str | None = None) -> Stage:
        weights = "none" if importance is None else "scores"
        return Stage.model_validate(
            {"layer": layer, "keep": keep, "importance": importance, "diversity": "coverage", "features": features,
             "weights": weights}
        )  # fmt: skip

    stages: list[tuple[Stage, ...]] = [
        *((covering(0, keep),) for keep in (5, 11, 8)),
        *((covering(0, keep, "centred", "norm"),) for keep in (9, 4)),
        *((Stage(layer=0, keep=keep), Stage(layer=3, keep=2)) for keep in (7, 12)),
        *((BALANCED.stages[0], covering(2, keep)) for keep in (6, 3)),
        (Stage(layer=1, keep=19), covering(2, 6)),
    ]
    plans = [SHAPE.plan(each) for each in stages]
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    single = [run for plan in plans for run in reference.run(inputs, plan)]
    asked: list[int] = []
    original = select_tokens.picks_from_nothing
    monkeypatch.setattr(
        select_tokens, "picks_from_nothing",
        lambda scores, similarity, count, **rule: asked.append(count) or original(scores, similarity, count, **rule),
        raising=False,
    )  # fmt: skip
    together = reference.run(inputs, plans)
    for a, b in zip(together, single, strict=True):
        assert [list(stage.absolute) for stage in a.stages] == [list(stage.absolute) for stage in b.stages]
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
    rules = [11, 9, 12, 19, 6, 6, 2, 2]  # by rule and rows the largest count
    assert sorted(asked) == sorted(2 * rules)


def test_what_plans_have_in_common_is_computed_once(
    model: tuple[Any, Path], reference: StreamedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before the first stage, whatever its rule, and the similarity of the tokens that stages choose from."""

    @dataclass
    class Counter:
        layers: Counts[int] = field(default_factory=Counts)

        def see(self, view: LayerView) -> None:
            self.layers[view.layer] += 1

        def finish(self, head: Any) -> None:
            pass

    stages = [(Stage(layer=2, keep=keep, attention_quota=2, pool=2, diversity_quota=3),) for keep in (12, 7)]
    stages += [(Stage(layer=2, keep=9, features="centred"),), (Stage(layer=3, keep=9),)]
    rules = ("last-token", "random", "mean-text", "last-token")
    plans = [SHAPE.plan(each, importance=rule) for each, rule in zip(stages, rules, strict=True)]
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    single = [run for plan in plans for run in reference.run(inputs, plan)]
    made: list[str] = []
    original = torch_scores.stage_similarity
    monkeypatch.setattr(
        torch_scores, "stage_similarity", lambda stage, image: made.append(stage.features) or original(stage, image)
    )
    counter = Counter()
    together = reference.run(inputs, plans, probes=(counter,))
    for a, b in zip(together, single, strict=True):
        assert [list(stage.absolute) for stage in a.stages] == [list(stage.absolute) for stage in b.stages]
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
    assert [counter.layers[layer] for layer in range(4)] == [2, 2, 8, 8], "four plans on two samples"
    assert sorted(made) == ["centred"] * 2 + ["raw"] * 4, "before layer 2 both kinds, before layer 3 one"


def test_runs_with_as_many_rows_go_through_a_layer_together(
    model: tuple[Any, Path], reference: StreamedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one prompt, and with no more rows together than it has without pruning; each gives what it gives alone."""
    seen: list[tuple[int, int]] = []

    def forward(module: Any, hidden: torch.Tensor, *tables: torch.Tensor) -> Any:
        seen.append((hidden.shape[0], hidden.shape[1]))
        return forward_with_attention(module, hidden, *tables)

    plans = [SHAPE.plan((Stage(layer=0, keep=9, features=features),)) for features in ("raw", "centred")]
    plans += [SHAPE.plan((Stage(layer=0, keep=9),), importance=rule) for rule in ("random", "norm", "mean-text")]
    plans += [SHAPE.plan((Stage(layer=0, keep=20),)), SHAPE.plan((Stage(layer=0, keep=9), Stage(layer=2, keep=4)))]
    inputs = [make_input(model[0], text=3 + seed, seed=seed)[0] for seed in range(2)]
    single = [run for plan in plans for run in reference.run(inputs, plan)]
    monkeypatch.setattr(streamed_model, "forward_with_attention", forward)
    for a, b in zip(reference.run(inputs, plans), single, strict=True):
        assert [list(stage.absolute) for stage in a.stages] == [list(stage.absolute) for stage in b.stages]
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
    assert max(batch for batch, _ in seen) > 1 and len({rows for _, rows in seen}) > 4
    assert all(batch * rows <= len(inputs[1].input_ids) for batch, rows in seen)
    assert sum(batch for batch, _ in seen) > 1.3 * len(seen)


def test_only_one_layer_is_in_memory(tmp_path: Path) -> None:
    model = make_llava(tmp_path, layers=8, hidden=256, heads=4, kv_heads=4)
    layer = sum(parameter.nbytes for parameter in model.model.language_model.layers[0].parameters())
    given = make_input(model)[0]
    del model

    class Loaded:
        most = 0

        def see(self, view: LayerView) -> None:
            modules = [view.module, *others]
            self.most = max(self.most, sum(p.nbytes for m in modules for p in m.parameters() if not p.is_meta))

        def finish(self, head: Any) -> None:
            head(torch.zeros(1, 256))

    reference = StreamedReference(checkpoint(tmp_path))
    others = [module for module in reference._model.layers]
    loaded = Loaded()
    plan = Shape("llava", 8, SIDE * SIDE, (SIDE, SIDE)).plan(())
    reference.run([given], plan)  # what is allocated once, and the first import of things
    tracemalloc.start()
    reference.run([given], plan, observers=[loaded])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.most == 2 * layer  # `view.module` is one of `others`, so the one loaded layer is counted twice
    assert peak < 3 * layer  # NumPy's copies; a model that is loaded whole takes eight
    assert all(parameter.is_meta for parameter in reference._model.parameters())


@pytest.mark.parametrize("ids", ["none", "short", "apart", "nothing after"])
def test_prompts_without_one_whole_image_are_refused(ids: str) -> None:
    image = [IMAGE_TOKEN] * 4
    prompt = {"none": [5, 6], "short": [5, *image[1:], 6], "apart": [*image[:2], 5, *image[2:], 6],
              "nothing after": [5, *image]}[ids]  # fmt: skip
    with pytest.raises(InputError):
        image_start(torch.tensor(prompt), IMAGE_TOKEN, 4)


def test_a_plan_for_another_depth_is_refused(model: tuple[Any, Path], reference: StreamedReference) -> None:
    other = PruningPlan(model_type="llava", num_layers=5, image_tokens=36, grid=(6, 6))
    with pytest.raises(InputError, match="5 layers"):
        reference.run([make_input(model[0])[0]], other)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_one_number_that_is_not_finite_is_noticed(odd: float) -> None:
    """And a sum that overflows is none."""
    values = torch.full((4, 5), 6e4, dtype=torch.float16)
    values[2, 3] = odd
    assert _finite(values) == (odd == 1.0) and not bool(torch.isfinite(values.sum()))
