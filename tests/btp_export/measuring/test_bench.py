"""`bench`: the contract's keys, the arithmetic behind them, and both assemblies."""

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from btp_export import cli
from btp_export.commands.bench import show
from btp_export.measuring.bench import measure
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
