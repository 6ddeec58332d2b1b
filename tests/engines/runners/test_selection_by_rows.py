"""Selections from rows in place of their similarity: the reference's tokens wherever it stands in, and others stay."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto

from engines.runners.on_cpu import selection
from graphs.building.decoder import Stream
from graphs.building.graph_builder import GraphBuilder
from graphs.dtypes import Precision
from graphs.ops import select_tokens
from graphs.pruning.spatial_set import stage_seeds
from graphs.pruning.torch_scores import cosine_similarity, importance_scores
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec
from tests.engines.runners.sessions import opened, with_selection

BATCH, PREFIX, TOKENS, WIDTH = 2, 3, 77, 48  # more than two stripes of columns, the last one not of whole blocks
SPEC = DecoderSpec(
    num_layers=4, hidden_size=WIDTH, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=12, vocab_size=50,
    rms_norm_eps=1e-6, max_positions=256,
)  # fmt: skip
PROFILE = ShapeProfile(
    name="p", batch=BATCH, image_size=(28, 44), grid=(7, 11), prefix_tokens=PREFIX, image_tokens=TOKENS, text_tokens=5,
    new_tokens=1,
)  # fmt: skip
BY_NORM = Stage(layer=0, keep=20, importance="norm", diversity="coverage", features="centred", weights="scores")
MIXED = Stage(
    layer=0, keep=31, importance="random", attention_quota=7, pool=12, boundary=40, diversity_quota=9, seeds=6,
    diversity="coverage",
)  # fmt: skip
OTHER_SCORES = Stage(layer=0, keep=20, importance="norm", diversity="coverage", weights="scores")
FARTHEST = Stage(layer=0, keep=20, importance="norm", diversity_quota=9, features="centred")


def select_model(stage: Stage, opset: int, precision: Precision = "float32") -> tuple[PruningPlan, ModelProto]:
    plan = PruningPlan(model_type="llava", num_layers=4, image_tokens=TOKENS, grid=(7, 11), stages=(stage,))
    b = GraphBuilder("select_0", opset=opset, precision=precision)
    shape = BATCH, PROFILE.tokens_with(TOKENS)
    cos, sin = (b.input(name, (*shape, SPEC.head_dim // 2)) for name in ("cos", "sin"))
    last = b.input("last", (BATCH,), ir.DataType.INT32)
    stream = Stream(b.input("hidden", (*shape, WIDTH)), cos, sin, last)
    return plan, with_selection(b, plan, PROFILE, stream)


def exact_rows() -> torch.Tensor:
    """Rows with four numbers of one size each, with their negatives: mean, norms, and cosines have no rounding."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, PROFILE.tokens_with(TOKENS), WIDTH)).astype(np.float32)
    for sample in range(BATCH):
        half = np.zeros((TOKENS // 2, WIDTH), np.float32)
        for row in half:
            row[rng.choice(WIDTH, 4, replace=False)] = rng.choice([-1, 1], 4) * 2.0 ** rng.integers(-1, 3)
        rows = np.concatenate([half, -half, np.zeros((TOKENS % 2, WIDTH), np.float32)])
        hidden[sample, PREFIX : PREFIX + TOKENS] = rng.permutation(rows)
    return torch.from_numpy(hidden)


def reference(plan: PruningPlan, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices."""
    nothing = torch.zeros(BATCH, 1, 1, 1)
    scores = importance_scores(
        plan, 0, prefix_tokens=PREFIX, hidden=hidden, last=torch.full((BATCH,), hidden.shape[1] - 1), query=nothing,
        key=nothing, vision_cls=None,
    )  # fmt: skip
    stage, image = plan.stages[0], hidden[:, PREFIX : PREFIX + TOKENS]
    if stage.features == "centred":
        image = image - image.mean(1, keepdim=True)
    seeds = stage_seeds(plan, 0)
    given = None if seeds is None else torch.from_numpy(seeds)
    return scores, select_tokens.reference(scores, cosine_similarity(image), given, **stage.attributes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("stage", "opset", "precision"),
    [(BY_NORM, 23, "float32"), (BY_NORM, 18, "float32"), (BY_NORM, 23, "float16"), (MIXED, 23, "float32"),
     (MIXED, 18, "float16"), (OTHER_SCORES, 18, "float32"), (OTHER_SCORES, 23, "float16")],
)  # fmt: skip
def test_selects_what_the_reference_selects(
    stage: Stage, opset: int, precision: Precision, threads: int, tmp_path: Path
) -> None:
    plan, model = select_model(stage, opset, precision)
    runner = opened(model, tmp_path, threads=threads)
    hidden = exact_rows()
    given = {name: np.zeros(spec.shape, spec.dtype) for name, spec in runner.inputs.items()}
    found = runner.run(given | {"hidden": hidden.numpy().astype(precision)})
    scores, indices = reference(plan, hidden)
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-6)
    np.testing.assert_array_equal(found["indices"], indices)
    selection.for_cpu(model)
    kinds = [node.op_type for node in model.graph.node]
    assert selection.BY_ROWS in kinds and not {"MatMul", selection.SELECTION} & set(kinds)
    assert ("Sqrt" in kinds) == (stage is OTHER_SCORES)  # scores that are not of these features stay


def test_other_selections_stay() -> None:
    _, model = select_model(FARTHEST, 23)
    before = model.SerializeToString()
    selection.for_cpu(model)
    assert model.SerializeToString() == before
