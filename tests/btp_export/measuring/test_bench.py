"""`bench`: the contract's keys, the arithmetic behind them, and both assemblies."""

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from btp_export import cli
from btp_export.commands.bench import show
from btp_export.measuring.bench import measure, speedup_interval
from graphs.pruning import operations
from graphs.records.errors import InputError
from tests.plans import PLAN


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Any:
    return tiny_bundle(PLAN)


def test_bench_measures_both_models(bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(bundle.root), "--rounds", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    prefill = document["prefill"]
    assert prefill["speedup"] == pytest.approx(prefill["full_ms"] / prefill["pruned_ms"])
    assert prefill["share_of_limit"] == pytest.approx(prefill["speedup"] / prefill["flops_limit"])
    full, pruned = (
        operations.cost(bundle.spec.decoder, plan, bundle.profile())
        for plan in (PLAN.model_copy(update={"stages": ()}), PLAN)
    )
    assert prefill["flops_limit"] == pytest.approx(full.decoder / pruned.decoder)
    assert prefill["causal_limit"] == pytest.approx(full.needed / pruned.needed)
    assert document["cache_bytes"] == {"full": full.cache_bytes, "pruned": pruned.cache_bytes}
    assert len(document["select_ms"]) == 3
    assert document["decode"]["ms_per_token"] > 0 and document["vision_ms"] > 0


def test_a_busy_machine_is_told(bundle: Any) -> None:
    result = measure(bundle, rounds=4, warm_up=0)
    assert result.variation >= 0
    quiet, busy = (
        Text.from_ansi(render(show(result.model_copy(update={"variation": value})))).plain for value in (0.01, 0.4)
    )
    assert "busy" not in quiet
    assert "vary by 40%" in busy


@pytest.mark.parametrize("count", [6, 10, 25])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    """Speed-ups that are drawn around 1.3, of a distribution with long tails, ten thousand times."""
    rng = np.random.default_rng(0)
    drawn = 1.3 * np.exp(rng.standard_t(2, (10_000, count)) / 50)
    held = [low <= 1.3 <= high for low, high in (speedup_interval(row, np.ones(count)) for row in drawn)]  # type: ignore[misc]
    assert 0.95 <= np.mean(held) < 0.99
    assert speedup_interval(drawn[0][:5], np.ones(5)) is None, "five runs can all lie on one side by chance"


def test_a_difference_inside_the_noise_is_not_told(bundle: Any) -> None:
    result = measure(bundle, rounds=6, warm_up=0)
    prefill = result.prefill
    assert prefill.speedup_interval is not None and result.decode.speedup_interval is not None
    assert prefill.speedup_interval[0] <= prefill.speedup_interval[1]

    def shown(low: float, high: float) -> str:
        changed = prefill.model_copy(update={"speedup": 1.234, "causal_limit": 1.543, "speedup_interval": (low, high)})
        return Text.from_ansi(render(show(result.model_copy(update={"prefill": changed})))).plain

    assert "no difference" in shown(0.97, 1.5) and "not told apart" in shown(0.97, 1.5)
    assert "(1.10 to 1.50)" in shown(1.1, 1.5) and "of that is reached" in shown(1.1, 1.5)
    assert "80% of the 1.54 x with attention up to its diagonal" in shown(1.1, 1.5)


def render(shown: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_bench_for_people(bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(bundle.root), "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("prefill", "decode", "vision", "FLOPs saved allow"))


def test_bench_of_an_unpruned_bundle(tiny_bundle: Any) -> None:
    result = measure(tiny_bundle(), rounds=1, warm_up=0)
    assert result.prefill.flops_limit == 1
    assert result.select_ms == ()
    assert np.isfinite(result.prefill.speedup)


def test_bench_of_a_whole_graph(tiny_bundle: Any) -> None:
    result = measure(tiny_bundle(PLAN, assemble="whole"), rounds=1, warm_up=0)
    assert len(result.select_ms) == 3
    assert result.vision_ms > 0


def test_bench_needs_rounds(tiny_bundle: Any) -> None:
    with pytest.raises(InputError, match="0 rounds"):
        measure(tiny_bundle(), rounds=0)
