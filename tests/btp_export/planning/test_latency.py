"""--latency-from: what bench, profile and the whole job print is read back; anything else is one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest

from btp_export.measuring.bench import measure
from btp_export.planning.latency import read_latency
from btp_export.results.timing import Bench
from calibrate.place.cost import MeasuredParts, MeasuredPrefills, MeasuredSegment
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from tests.btp_export.results.examples import verification
from tests.plans import tiny_plan

PLAN = tiny_plan(Stage(layer=2, keep=12, attention_quota=6, pool=12, boundary=12), Stage(layer=4, keep=0))


def part(name: str, kind: str, layers: list[int] | None, tokens: int, flops: int, ms: float) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "layers": layers, "tokens": tokens, "flops": flops, "bytes": 1, "ms": ms,
        "min_ms": ms, "p99_ms": ms, "runs": 9, "variation": 0.0, "floor_ms": 0.1, "bound": "memory",
        "share_of_roofline": 0.1, "slowest_layers": [],
    }  # fmt: skip


def profile_document() -> dict[str, Any]:
    totals = dict.fromkeys(("vision_ms", "prefill_ms", "select_ms", "head_ms", "select_share"))
    totals |= {"first_token_ms": 9.0, "decode_ms": 1.0}
    full = [part("prefill_0", "prefill", [0, 6], 60, 900, 12.0), part("head", "head", None, 1, 5, 0.6)]
    return {
        "format": "btp-profile/1", "target": "l4", "title": "L4", "tensorrt": "10.16", "weights": "baked",
        "assemble": "segments", "precision": "float16", "profile": "b1", "batch": 2, "image_tokens": 36,
        "roofline": {"peak_flops": 1e12, "bandwidth_bytes": 1e11, "sources": [], "measured_target": False},
        "system": {}, "totals": totals, "speedup": None, "compare": None, "notes": [],
        "break_even": {"select_ms": 0.5}, "unpruned": {"parts": full, "totals": totals},
        "parts": [
            part("prefill_0", "prefill", [0, 2], 60, 300, 4.0), part("select_0", "select", None, 36, 40, 0.3),
            part("prefill_1", "prefill", [2, 6], 36, 400, 5.0), part("select_1", "select", None, 12, 20, 0.2),
            part("head", "head", None, 1, 5, 0.5),
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def bench(tiny_bundle: Any) -> Bench:
    return measure(tiny_bundle(PLAN), rounds=1, warm_up=0)


def test_a_bench_is_read_back(bench: Bench, tmp_path: Path) -> None:
    wanted = MeasuredPrefills(
        full_ms=bench.prefill.full_ms, pruned_ms=bench.prefill.pruned_ms, select_ms=sum(bench.select_ms),
        full=bench.flops.full, pruned=bench.flops.pruned, selection=bench.flops.selection, batch=1,
        machine="cpu, float32",
    )  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(bench.to_json())
    assert read_latency(path) == wanted
    job = {
        "format": "btp-job/1", "bundle": "b", "plan": json.loads(PLAN.to_json()), "average_tokens": 1.0,
        "compression": 0.5, "verify": verification().document(), "eval": None, "bench": bench.document(), "report": "r",
        "engines": None, "dummy_weights": False, "seconds": {},
    }  # fmt: skip
    path.write_text(json.dumps(job))
    assert read_latency(path) == wanted
    path.write_text(json.dumps(job | {"bench": None}))
    with pytest.raises(InputError, match="no prefill times"):
        read_latency(path)


def test_a_profile_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_document()))
    assert read_latency(path) == MeasuredParts(
        segments=[MeasuredSegment(0, 2, 60, 4.0), MeasuredSegment(2, 6, 36, 5.0), MeasuredSegment(0, 6, 60, 12.0)],
        head_ms=[0.5, 0.6],
        select_ms=0.5,
        selection=60,
        image_tokens=36,
        batch=2,
        machine="l4, float16",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nothing", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list"),
        (
            json.dumps(profile_document() | {"parts": [part("prefill_0", "prefill", [2, 2], 1, 1, 1.0)]}),
            "layers 2 to",
        ),
        (json.dumps(profile_document() | {"parts": [part("prefill_0", "prefill", [0, 2], 1, 1, -1.0)]}), "parts.0.ms"),
        (json.dumps(profile_document() | {"image_tokens": -36}), "image_tokens"),
        ('{"samples": 3}', "no prefill times"),
        (verification().to_json(), "no prefill times"),
        ('{"format": "btp-bench/1"}', "not a valid bench: prefill: Field required"),
        ('{"format": "btp-job/1"}', "not a valid result: bundle: Field required"),
        (json.dumps(profile_document() | {"parts": [{"name": "head"}]}), "not a valid profile: parts.0.kind"),
        (json.dumps(profile_document() | {"batch": 0}), "not a valid profile: batch"),
    ],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_latency(path)
    with pytest.raises(InputError, match="cannot read"):
        read_latency(tmp_path / "missing.json")
