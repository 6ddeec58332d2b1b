"""Verification passes what is right and finds what is wrong: planted faults in weights, indices, positions, pruning."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export.families import family_for
from btp_export.model.prompting import Prompter
from calibrate.data.samples import prepare, scene_samples
from calibrate.reference.streamed_model import StreamedReference
from engines.runners.cuda import CudaError
from engines.runners.onnxruntime import OrtLoader
from engines.verify.gates import GATES, CheckResults, agreement, compare
from engines.verify.verification import FreeRun, VerifySample, same_kept, verify_free, verify_graphs
from graphs.dtypes import Precision
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError
from graphs.records.plan import PruningPlan, Stage
from tests.plans import PLAN

EARLY = PLAN.model_copy(
    update={"stages": (Stage(layer=0, keep=12, boundary=12, diversity_quota=12), Stage(layer=3, keep=0))}
)
TEXT = PLAN.model_copy(update={"importance": "similar-text"})
NEW = (7, 8, 9)


def samples_for(bundle: Bundle, count: int = 3) -> list[VerifySample]:
    checkpoint = bundle.checkpoint()
    scenes = scene_samples(count, seed=0, split="calibration").samples
    family = family_for(checkpoint.config)
    prepared = prepare(scenes, Prompter(bundle.processor, bundle.spec), family.vision_module(checkpoint))
    inputs = [replace(one.input, new_tokens=NEW) for one in prepared]
    runs = StreamedReference(checkpoint).run(inputs, bundle.plan, record_segments=True)
    return [
        VerifySample(sample.pixel_values, sample.input.image_features.numpy(), run)
        for sample, run in zip(prepared, runs, strict=True)
    ]


def check(bundle: Bundle, samples: list[VerifySample], **faulty: Callable[[Any], Any]) -> CheckResults:
    """Verify with some graphs' runners wrapped."""
    loader = OrtLoader(threads=1)

    def opener(name: str, path: Path) -> Any:
        runner = loader(path)
        return faulty[name](runner) if name in faulty else runner

    graphs = {graph.name: partial(opener, graph.name, bundle.root / graph.file) for graph in bundle.graphs()}
    return verify_graphs(graphs, bundle.plan, bundle.profile(), bundle.manifest.build.precision, samples)


class Faulty:
    """A runner whose outputs are tampered with."""

    def __init__(self, runner: Any, tamper: Callable[[Mapping[str, np.ndarray], dict[str, np.ndarray]], None]) -> None:
        self.inputs, self.outputs, self._runner, self._tamper = runner.inputs, runner.outputs, runner, tamper

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = dict(self._runner.run(inputs))
        self._tamper(inputs, out)
        return out


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Bundle:
    return tiny_bundle(PLAN)


@pytest.fixture(scope="module")
def samples(bundle: Bundle) -> list[VerifySample]:
    return samples_for(bundle)


@pytest.mark.parametrize(
    ("plan", "options"),
    [(PLAN, {}), (PLAN, {"batch": 2}), (PLAN, {"opset": 18}), (PLAN, {"assemble": "whole"}), (EARLY, {}), (TEXT, {})],
    ids=["balanced", "batch", "opset 18", "whole", "layer 0", "similar-text"],
)
def test_right_bundles_pass(plan: PruningPlan, options: dict[str, Any], tiny_bundle: Any) -> None:
    bundle = tiny_bundle(plan, **options)
    findings = check(bundle, samples_for(bundle))
    assert findings.failures == []
    assert findings.kept_agreement() == [1.0] * len(plan.stages)
    assert {check.name for check in findings.graphs} == {graph.name for graph in bundle.graphs()}
    assert all(check.cosine > 1 - 1e-11 and check.max_abs < 1e-3 for check in findings.graphs)
    assert sum(check.max_abs > 0 for check in findings.graphs) >= 2, "two programs never round alike everywhere"


def test_a_perturbed_weight_is_found_in_its_graph(bundle: Bundle, samples: list[VerifySample], tmp_path: Path) -> None:
    """One row of one matrix, by 5 %."""
    root = tmp_path / "bundle"
    shutil.copytree(bundle.root, root)
    ref = bundle.checkpoint()["language_model.layers.3.mlp.up_proj.weight"]
    weight = np.memmap(root / "graphs" / "weights" / ref.shard, np.float32, "r+", offset=ref.offset, shape=ref.shape)
    weight[5] *= 1.05
    weight.flush()
    findings = check(replace(bundle, root=root), samples)
    assert len(findings.failures) == 2  # layer 3 runs in its segment and in decode
    assert [text.split(":")[0] for text in findings.failures] == ["prefill_1", "decode"]


def test_wrong_indices_are_found(bundle: Bundle, samples: list[VerifySample]) -> None:
    def shifted(inputs: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        start, kept = samples[0].run.image_start, np.arange(18, 36, dtype=np.int32)
        out["indices"][:] = kept
        rows = [*range(start), *(start + kept), *range(start + 36, inputs["hidden"].shape[1])]
        for name in ("hidden", "cos", "sin"):
            out[f"{name}_out"][:] = inputs[name][:, rows]

    findings = check(bundle, samples, select_0=lambda runner: Faulty(runner, shifted))
    assert any("stage 0 keeps" in text for text in findings.failures)
    assert findings.kept_agreement()[0] < 0.9 and findings.kept_agreement()[1:] == [1.0, 1.0]
    assert any("select_0" in text and "kept tokens differ" in text for text in findings.near_ties)


def test_indices_out_of_order_are_found(bundle: Bundle, samples: list[VerifySample]) -> None:
    def swapped(_: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        out["indices"][:, [0, 1]] = out["indices"][:, [1, 0]]

    findings = check(bundle, samples, select_1=lambda runner: Faulty(runner, swapped))
    assert any("not ascending" in text for text in findings.failures)


@pytest.mark.parametrize("name", ["cos_out", "sin_out"])
def test_positions_that_close_up_are_found(name: str, bundle: Bundle, samples: list[VerifySample]) -> None:
    """Kept tokens must keep their positions; counting them anew is the usual mistake."""

    def renumbered(inputs: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        out[name][:] = inputs[name.removesuffix("_out")][:, : out[name].shape[1]]

    findings = check(bundle, samples, select_0=lambda runner: Faulty(runner, renumbered))
    assert any(text.startswith("select_0") and name in text for text in findings.failures)


def test_rows_that_are_not_those_at_the_indices_are_found(bundle: Bundle, samples: list[VerifySample]) -> None:
    def one_row(inputs: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        start = samples[0].run.image_start
        out["hidden_out"][:, start + 3] = inputs["hidden"][:, start + int(out["indices"][0, 3]) - 1]

    findings = check(bundle, samples, select_0=lambda runner: Faulty(runner, one_row))
    assert any(text.startswith("select_0") and "hidden_out" in text for text in findings.failures)


def test_a_last_that_did_not_move_is_found(bundle: Bundle, samples: list[VerifySample]) -> None:
    def kept(inputs: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        out["last_out"][:] = inputs["last"]

    findings = check(bundle, samples, select_2=lambda runner: Faulty(runner, kept))
    assert any("tokens not pruned" in text for text in findings.failures)


def test_graphs_that_do_not_prune_are_found(bundle: Bundle, samples: list[VerifySample], tiny_bundle: Any) -> None:
    loader, full = OrtLoader(threads=1), tiny_bundle()
    graphs = {graph.name: partial(loader, bundle.root / graph.file) for graph in bundle.graphs()}
    unpruned = {graph.name: partial(loader, full.root / graph.file) for graph in full.graphs()}
    only = verify_graphs(unpruned, PLAN, bundle.profile(), "float32", samples)
    assert any("lacks the graphs" in text and "select_0" in text for text in only.failures)
    wrong = verify_graphs(graphs | {"prefill_1": unpruned["prefill_0"]}, PLAN, bundle.profile(), "float32", samples)
    assert any("prefill_1 sees" in text and "tokens not pruned" in text for text in wrong.failures)


# The free run


def free_runs(samples: list[VerifySample]) -> list[FreeRun]:
    """Free runs that are the reference."""
    return [
        FreeRun([int(row.argmax()) for row in sample.run.logits], [stage.absolute for stage in sample.run.stages])
        for sample in samples
    ]


def test_equal_free_runs_hold(samples: list[VerifySample]) -> None:
    findings, free = CheckResults(), free_runs(samples)
    assert verify_free(findings, PLAN, [sample.run for sample in samples], free)
    assert findings.failures == [] and findings.near_ties == []
    assert all(same_kept(one.run, run) for one, run in zip(samples, free, strict=True))


def test_another_token_is_a_failure_and_a_tie_is_named(samples: list[VerifySample]) -> None:
    free = free_runs(samples)
    order = np.argsort(samples[0].run.logits[0])
    other = [replace(free[0], tokens=[int(order[-2]), *free[0].tokens[1:]]), *free[1:]]
    findings, runs = CheckResults(), [sample.run for sample in samples]
    assert not verify_free(findings, PLAN, runs, other)
    assert "the bundle gives" in findings.failures[0]
    logits = samples[0].run.logits.copy()
    logits[0, order[-2]] = logits[0, order[-1]] - 1e-6
    tied, findings = replace(samples[0].run, logits=logits), CheckResults()  # type: ignore[type-var]
    assert verify_free(findings, PLAN, [tied, *runs[1:]], other)
    assert findings.failures == [] and "logit gap" in findings.near_ties[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_free_runs_have_gates_of_their_own(precision: Precision, samples: list[VerifySample]) -> None:
    free, runs = free_runs(samples), [sample.run for sample in samples]
    first, *rest = free[0].kept
    others = np.setdiff1d(np.arange(36), first)
    free[0] = replace(free[0], kept=[np.sort(np.append(first[1:], others[0])), *rest])
    findings = CheckResults(gates=GATES["float32"], free=GATES[precision])
    verify_free(findings, PLAN, runs, free)
    told, silent = findings.failures, findings.near_ties
    if precision == "bfloat16":
        told, silent = silent, told
    assert silent == [] and len(told) == 1 and "stage 0 keeps 0.94" in told[0]


def test_a_free_run_that_keeps_everything_is_a_failure(samples: list[VerifySample]) -> None:
    free = free_runs(samples)
    everything = [replace(free[0], kept=[np.arange(36)] * 3), *free[1:]]
    findings = CheckResults()
    verify_free(findings, PLAN, [sample.run for sample in samples], everything)
    assert any("stage 0 keeps 36 tokens, the plan says 18" in text for text in findings.failures)


# Comparing


def test_compare_by_hand() -> None:
    assert compare(np.array([3.0, 4.0]), np.array([6.0, 8.0])) == (1.0, 2.0, 4.0)
    cosine, ratio, gap = compare(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
    assert (cosine, ratio, gap) == pytest.approx((2**-0.5, 2**0.5, 1.0))
    assert compare(np.zeros(2), np.zeros(2)) == (1.0, 1.0, 0.0)
    assert compare(np.ones(2), np.zeros(2))[0] == 0.0
    assert np.isnan(compare(np.ones(2), np.array([1.0, np.nan]))[0])
    assert np.isnan(compare(np.ones(2), np.ones(3))[0])


def test_nan_does_not_pass(bundle: Bundle, samples: list[VerifySample]) -> None:
    def spoiled(_: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        out["logits"][0, 0] = np.nan

    findings = check(bundle, samples, head=lambda runner: Faulty(runner, spoiled))
    assert findings.failures == ["head: logits of sample 0 has numbers that are not finite"]
    head = findings.graphs[-2]
    assert head.name == "head" and head.worst == "logits of sample 0" and np.isnan(head.cosine)


def test_the_first_output_that_is_not_finite_is_named(bundle: Bundle, samples: list[VerifySample]) -> None:
    """A graph gives its layers in their order: the first of them tells where it began."""

    def overflown(_: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        for name in ("value_3", "hidden_out"):
            out[name][0, ..., 0, 0] = np.inf

    findings = check(bundle, samples, prefill_1=lambda runner: Faulty(runner, overflown))
    assert findings.failures == ["prefill_1: value_3 of sample 0 has numbers that are not finite"]


def test_a_graph_that_does_not_run_is_one_failure(bundle: Bundle, samples: list[VerifySample]) -> None:
    """The others are compared all the same; the GPU's own errors go through, after which nothing runs."""

    def refused(error: Exception) -> Callable[[Any], Any]:
        def tamper(inputs: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
            raise error

        return lambda runner: Faulty(runner, tamper)

    findings = check(bundle, samples, select_1=refused(CheckError("cannot run select_1.onnx", do="verify")))
    assert findings.failures == ["select_1: cannot run select_1.onnx"]
    assert findings.kept_agreement() == [1.0, 0.0, 1.0]
    assert {one.name for one in findings.graphs if one.holds()} == {g.name for g in bundle.graphs()} - {"select_1"}
    with pytest.raises(CudaError):
        check(bundle, samples[:1], vision=refused(CudaError("cudaMemcpy", 700, "an illegal memory access")))


def test_numbers_that_a_graph_s_type_does_not_hold_are_said(bundle: Bundle, samples: list[VerifySample]) -> None:
    """What the graph makes of them is not its fault."""

    class Narrow(Faulty):
        """It takes its input in float16."""

        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            hidden = {"hidden": inputs["hidden"].astype(np.float32)}
            return super().run({name: inputs[name] for name in inputs if name != "hidden"} | hidden)

    def narrow(runner: Any) -> Narrow:
        found = Narrow(runner, lambda inputs, out: None)
        found.inputs = runner.inputs | {"hidden": replace(runner.inputs["hidden"], dtype=np.dtype(np.float16))}
        return found

    *before, last = samples[0].run.segments
    run = replace(samples[0].run, segments=(*before, replace(last, hidden_out=last.hidden_out * 1e6)))  # type: ignore[type-var]
    findings = check(bundle, [replace(samples[0], run=run)], head=narrow)
    assert findings.failures[-1] == "head: the reference's hidden has numbers that float16 does not hold"


def test_agreement() -> None:
    assert agreement([1, 2, 3, 4], [4, 3, 9, 1]) == 0.75
    assert agreement([], []) == 1.0 and agreement([], [1]) == 0.0
