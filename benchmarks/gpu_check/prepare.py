"""Puts into one folder what the GPU's time must not be spent on: compiled programs, cases, expected outputs, a plan.

    build/gpu-check/     what is carried; git ignores it
        native/          harness, libbtp_kernels.so, libbtp_ort.so, and before/libbtp_kernels.so of an earlier version
        cases.bin        calls.json
        prepared.json    what all of it was made from, shapes for the floors, the 7B's stages

What is there already and was made from the same sources is kept.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.compiling import KEY, compile_all, nvcc_version
from benchmarks.gpu_check.steps import ROOT
from engines.native import kernels

DRAWN = 200


def prepare(folder: Path, architecture: str, before: str | None, *, cases: bool = True, report: Any = print) -> None:
    """Bring the folder up to date. `before`: the git revision whose kernels are timed beside these, None for none.

    Raises UnavailableError without nvcc or for an architecture that it does not know, InputError for a wrong revision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compile_all(folder / "native", architecture, before, report=report)
    record: dict[str, Any] = {"architecture": architecture, "nvcc": nvcc_version(), **versions(before)}
    if cases:
        record |= {"shapes": write_all_cases(folder, report), "model": model_7b()}
        (folder / "prepared.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    report(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB")


def versions(before: str | None) -> dict[str, Any]:
    """What git says of the sources; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "graphs/ops", "engines/native", "benchmarks/gpu_check")),
        "before": None if before is None else git("rev-parse", "--short", before),
    }


def last_other_kernels() -> str | None:
    """The last revision whose kernels are not those of HEAD; None where git knows none."""
    command = ["git", "log", "-n", "1", "--format=%H", "--", "graphs/ops/*.cu", "graphs/ops/*.cuh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    changed = done.stdout.strip()
    if done.returncode != 0 or not changed:
        return None
    parent = subprocess.run(["git", "rev-parse", f"{changed}^"], cwd=ROOT, capture_output=True, text=True, check=False)
    return parent.stdout.strip() if parent.returncode == 0 else None


# -- cases and plan ----------------------------------------------------------------------------------------------------


def case_sources() -> list[Path]:
    """The files that decide what is in the case file."""
    places = [ROOT / "graphs" / "ops", Path(__file__).parent]
    return [*sorted(path for place in places for path in place.rglob("*.py")), Path(kernels.__file__)]


def write_all_cases(folder: Path, report: Any) -> dict[str, Any]:
    """cases.bin and calls.json; gives the shapes of the timed calls that have a floor. Kept while their sources are."""
    from benchmarks.gpu_check import calls, drawn, linear_cases

    key = hashlib.sha256(b"".join(path.read_bytes() for path in case_sources())).hexdigest()
    note = folder / f"cases.bin{KEY}"
    if note.is_file() and (kept := json.loads(note.read_text()))["key"] == key and (folder / "cases.bin").is_file():
        return dict(kept["shapes"])
    writer, shapes = calls.CaseWriter(), {}
    large = [*drawn.large_cases(), *linear_cases.large_cases()]
    cases = [*calls.all_cases(), *large, *drawn.drawn_cases(DRAWN)]
    report(f"expected outputs of {len(cases)} cases")
    for given in cases:
        wanted = calls.expected(given)
        writer.add(given, wanted)
        if "timed" in given.tags and given.operator == drawn.SELECT:
            shapes[f"{given.operator}/{given.name}"] = vars(drawn.shape_of(given, wanted))
        if "timed" in given.tags and given.operator == linear_cases.LINEAR:
            shapes[f"{given.operator}/{given.name}"] = vars(linear_cases.product_of(given, wanted))
    writer.write(folder)
    note.write_text(json.dumps({"key": key, "shapes": shapes}), encoding="utf-8")
    return shapes


def model_7b() -> dict[str, Any]:
    """LLaVA-1.5 7B under the released plan: sizes, what each stage selects, and the limit that operations set."""
    from btp_export.families.llava import VICUNA_7B, Llava
    from calibrate.place.presets import preset
    from graphs.pruning.operations import cost
    from graphs.pruning.spatial_set import stage_seeds
    from graphs.records.shapes import ShapeProfile
    from graphs.records.spec import DecoderSpec

    text = VICUNA_7B
    heads, sizes = text["num_attention_heads"], {name: text[name] for name in ("hidden_size", "intermediate_size")}
    decoder = DecoderSpec(
        num_layers=text["num_hidden_layers"], num_heads=heads, num_kv_heads=heads, vocab_size=text["vocab_size"],
        head_dim=sizes["hidden_size"] // heads, rms_norm_eps=text["rms_norm_eps"], max_positions=4096, **sizes,
    )  # fmt: skip
    plans = {
        name: preset(name, model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24), released=Llava.released)
        for name in ("none", "btp-paper")
    }
    profile = ShapeProfile(
        name="7b", image_size=(336, 336), grid=(24, 24), prefix_tokens=35, image_tokens=576, text_tokens=64,
        new_tokens=64,
    )  # fmt: skip
    plan = plans["btp-paper"]
    operations = {name: cost(decoder, plan, profile, "float16").needed for name, plan in plans.items()}
    stages = []
    for number, stage in enumerate(plan.stages):
        seeds = stage_seeds(plan, number) if stage.keep else None
        counts = stage.model_dump(include={"keep", "attention_quota", "diversity_quota", "pool", "boundary"})
        pairs = bool(stage.keep) and stage.needs_similarity
        listed = None if seeds is None else seeds.tolist()
        stages.append({"layer": stage.layer, "attributes": counts, "similarity": pairs, "seeds": listed})
    return {
        "layers": decoder.num_layers, "heads": heads, **sizes, "prefix": 35, "image": 576, "text": 64, "stages": stages,
        "operations": operations, "flops_limit": operations["none"] / operations["btp-paper"],
    }  # fmt: skip


def main(architecture: str | None, before: str | None, folder: Path) -> int:
    """`prepare`: for the architecture that is named, or for the GPU that is there."""
    from benchmarks.gpu_check.runner import gpu_architecture

    chosen = architecture or gpu_architecture() or "90"
    revision = last_other_kernels() if before is None else None if before == "none" else before
    prepare(folder, chosen, revision, report=lambda text: print(text, file=sys.stderr))
    return 0
