"""What is gathered of a layer's inputs equals sums over rows, words counting as much as all that is before them."""

from pathlib import Path

import pytest
import torch

from calibrate.quantise import compensate, layer_inputs
from calibrate.quantise.layer_inputs import gather_inputs
from calibrate.reference.decoder import forward
from calibrate.reference.observers import Rows
from calibrate.reference.streamed_model import StreamedReference
from tests.calibrate.models import checkpoint, make_llava

GROUP = 16


def test_statistics_are_weighted_sums_over_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "SPAN", 90)
    make_llava(tmp_path, layers=1)
    reference = StreamedReference(checkpoint(tmp_path))
    generator = torch.Generator().manual_seed(0)
    runs = []
    for size, text in ((30, 24), (20, 13)):
        cos, sin = reference.rotary_tables(torch.arange(size)[None])
        runs.append(Rows(torch.randn(1, size, 64, generator=generator), cos, sin, text))
    seen: list[torch.Tensor] = []
    with torch.inference_mode(), reference.loaded(0) as module:
        hook = module.get_submodule("mlp.down_proj").register_forward_pre_hook(
            lambda _, given: seen.append(given[0][0])
        )
        for run in runs:
            forward(module, run.hidden, run.cos, run.sin)
        hook.remove()
        found = gather_inputs(module, runs, GROUP)["down"]
        monkeypatch.setattr(layer_inputs, "SAMPLED_ROWS", 20)
        few = gather_inputs(module, runs, GROUP)["down"]
    weight = 13 / 37  # 6 + 7 rows of words, 24 + 13 before them
    rows, weights = torch.cat(seen), torch.tensor([weight] * 24 + [1.0] * 6 + [weight] * 13 + [1.0] * 7)
    torch.testing.assert_close(found.magnitude, (weights[:, None] * rows.abs()).sum(dim=0) / (2 * 13))
    gram = rows.T @ (weights[:, None] * rows)
    assert [len(one) for one in found.grams] == [80, 48], "spans of whole groups"
    for start, one in zip((0, 80), found.grams, strict=True):
        part = slice(start, start + len(one))
        torch.testing.assert_close(one, gram[part, part], rtol=1e-4, atol=1e-4)
    scale = torch.rand(rows.shape[1], generator=generator) + 0.5
    divided, wanted = found.scaled(scale), gram / torch.outer(scale, scale)
    torch.testing.assert_close(divided.grams[1], wanted[80:, 80:], rtol=1e-4, atol=1e-4)
    assert found.count == pytest.approx(float(weights.sum()) ** 2 / float(weights.square().sum()))
    torch.testing.assert_close(found.rows, weights.sqrt()[:, None] * rows)
    assert len(few.rows) == 8 + 5 + 6 + 7, "every third row before the words of each run, and every row of words"
    assert float(few.rows.square().sum() / found.rows.square().sum()) == pytest.approx(1, rel=0.2)
