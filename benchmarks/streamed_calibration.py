"""What a calibration on the built-in mix of pictures costs in time and memory, its layers streamed one at a time.

    python -m benchmarks.streamed_calibration [--samples 64] [--depths 2 4] [--large-samples 8] [--only small|large]

Small models: a LLaVA and a Qwen2.5-VL of the families' own shapes with narrow layers and random weights, the whole
calibration as it is run, in a process of its own. LLaVA-1.5-7B: dummy weights at full width with few decoder layers and
few samples (--depths, --large-samples), from which the whole is extrapolated: floating point operations are counted
while it runs, they grow with layers and samples. Writes benchmarks/results/streamed_calibration.md.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

from benchmarks.memory import memory
from benchmarks.pages import put_between_marks
from btp_export.dummy.checkpoints import dummy_checkpoint
from btp_export.dummy.processor import save_processor
from btp_export.families import known_models

RESULTS: Final = Path(__file__).parent / "results" / "streamed_calibration.md"
LARGE: Final = "llava-1.5-7b"
LAYERS: Final = 32
SAMPLES: Final = 64
SMALL: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "llava-1.5-7b": {
        "text_config": {
            "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12, "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "projection_dim": 128,
        },
    },
    "qwen2.5-vl-7b": {
        "text_config": {
            "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_window_layers": 12,
        },
        "vision_config": {
            "hidden_size": 128, "intermediate_size": 256, "depth": 4, "num_heads": 4, "out_hidden_size": 256,
            "fullatt_block_indexes": [1, 3],
        },
    },
}  # fmt: skip
PICTURE: Final = (448, 448)  # of the model that takes any size: 256 tokens
# A100-class card in bfloat16: what its matrix units do at most, what a streamed pass of one sample reaches of it, and
# how fast weights come over PCIe 4.
GPU_FLOPS, GPU_SHARE, GPU_LINK = 312e12, 0.3, 20e9
GB = 1e9


def small_checkpoint(name: str, folder: Path) -> None:
    """A model of a family's shapes with narrow layers and random weights."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = copy.deepcopy(dict(known_models()[name].config))
    for part, narrow in SMALL[name].items():
        config[part] |= narrow
    if "head_dim" in config["text_config"]:
        del config["text_config"]["head_dim"]
    if "rope_scaling" in config["text_config"]:  # the rotary sections of three axes make up half a head
        config["text_config"]["rope_scaling"]["mrope_section"] = [8, 12, 12]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    model.to(torch.float16).save_pretrained(folder)
    save_processor(config, folder)


def calibrate_here(folder: str, samples: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """The whole calibration: seconds, the highest resident memory, and the operations of its matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    from btp_export.model.defaults import default_profile
    from btp_export.model.open_model import open_model
    from btp_export.planning.study import CalibrationSettings, calibrate_model

    model = open_model(folder)
    profile = default_profile(model, size)
    counter = FlopCounterMode(display=False)
    start = time.perf_counter()
    with counter:
        plan = calibrate_model(model, CalibrationSettings(samples=samples, cache=False), profile=profile)
    seconds = time.perf_counter() - start
    peak = memory()["VmHWM"] * 2**20
    record = plan.calibration
    return {
        "seconds": seconds, "peak": peak, "flops": counter.get_total_flops(), "tokens": profile.image_tokens,
        "kinds": len(record["answers"]["by_kind"]), "answer_tokens": record["answers"]["tokens"],
        "plans": len(record["candidates"]), "layers": plan.num_layers, "samples": samples, "load": os.getloadavg()[0],
    }  # fmt: skip


def calibrate(folder: Path, samples: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The same in a process of its own, whose memory is all this."""
    command = [sys.executable, "-m", "benchmarks.streamed_calibration", "--measure", str(folder)]
    command += ["--samples", str(samples), *(["--size", *map(str, size)] if size else [])]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def operations_of(runs: Sequence[dict[str, Any]], layers: int) -> float:
    """Operations at so many layers, by the straight line through the runs with the fewest and the most."""
    low, high = (pick(runs, key=lambda run: run["layers"]) for pick in (min, max))
    slope = (high["flops"] - low["flops"]) / (high["layers"] - low["layers"])
    return float(high["flops"] + slope * (layers - high["layers"]))


def extrapolated(runs: Sequence[dict[str, Any]], weight_bytes: int) -> dict[str, float]:
    """The whole model on SAMPLES samples: here, and by arithmetic on one GPU.

    Operations grow with the samples, and the machine does as many a second as in the faster run: other work may have
    disturbed one of them. A pass reads each layer once whatever the samples.
    """
    flops = operations_of(runs, LAYERS) * SAMPLES / runs[0]["samples"]
    rate = max(run["flops"] / run["seconds"] for run in runs)
    passes = max(run["plans"] for run in runs) + 2 + 16  # as if each plan had one of its own, and each answer token
    return {
        "flops": flops,
        "hours": flops / rate / 3600,
        "rate": rate,
        "gpu_seconds": flops / (GPU_FLOPS * GPU_SHARE) + passes * weight_bytes / GPU_LINK,
        "passes": passes,
    }


def row(name: str, run: dict[str, Any]) -> str:
    """A line of the table."""
    counts = [str(run[key]) for key in ("layers", "tokens", "samples", "kinds", "plans")]
    measured = [f"{run['seconds']:.0f}", f"{run['peak'] / GB:.2f}", f"{run['flops'] / 1e12:.2f}", f"{run['load']:.1f}"]
    return f"| {' | '.join([name, *counts, *measured])} |"


TITLE = "Streamed calibration on the mix of pictures"
PAGE = """\
`{command}`, {date}, {cores} cores ({machine}), float32. The whole calibration of
`btp` with its defaults (16 answer tokens at most), statistics not cached, each in a process of its own; peak is its
resident memory at most, libraries and memory-mapped weights included. `load` is the machine's at the end: where it is
above the number of cores, times say little. The narrow models have 12 layers of width 256 and the families' own shapes
otherwise.

| model | layers | image tokens | samples | kinds | plans tried | seconds | peak, GB | operations, T | load |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""
WHOLE = """
LLaVA-1.5-7B has {layers} layers, and a calibration {samples} samples. **This was not run**; a straight line through
the operations of the two depths above, times {more:g} for the samples, gives {flops:.0f} T operations: {hours:.1f}
hours at the {rate:.0f} G operations a second that the faster of the runs did. The plans that are tried depend on the
depth, so this is good to perhaps a third.
Memory does not grow with the layers: one is in memory at a time. With the samples grow the rows between two layers,
{rows_gb:.2f} GB for {samples}; with them the whole stays at about {peak:.1f} GB.

By arithmetic on one GPU with {gpu:.0f} T operations a second in 16 bits of which a pass of single samples reaches
{share:.0%}: {gpu_minutes:.1f} minutes, of them {link_minutes:.1f} for reading {weights:.1f} GB of weights in each of
at most {passes:.0f} passes at {link:.0f} GB/s. Nothing of this was measured.
"""


def report(rows: Sequence[str], large: Sequence[dict[str, Any]], weight_bytes: int) -> str:
    """What is written into the page."""
    command = " ".join(["python -m benchmarks.streamed_calibration", *sys.argv[1:]])
    page = PAGE.format(
        command=command, date=date.today(), cores=os.cpu_count(), machine=platform.machine(), rows="\n".join(rows)
    )
    if len(large) < 2:
        return page
    whole = extrapolated(large, weight_bytes)
    row_bytes = 4 * 4096 * (SAMPLES - large[0]["samples"]) * (large[0]["tokens"] + 80)
    return page + WHOLE.format(
        layers=LAYERS, samples=SAMPLES, more=SAMPLES / large[0]["samples"], flops=whole["flops"] / 1e12,
        hours=whole["hours"], rate=whole["rate"] / 1e9, rows_gb=row_bytes / GB,
        peak=(max(run["peak"] for run in large) + row_bytes) / GB, gpu=GPU_FLOPS / 1e12, share=GPU_SHARE,
        gpu_minutes=whole["gpu_seconds"] / 60, link_minutes=whole["passes"] * weight_bytes / GPU_LINK / 60,
        weights=weight_bytes / GB, passes=whole["passes"], link=GPU_LINK / GB,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the small models")
    parser.add_argument("--depths", type=int, nargs=2, default=(4, 8), help="decoder layers of the large model")
    parser.add_argument("--large-samples", type=int, default=8)
    parser.add_argument("--only", choices=("small", "large"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(calibrate_here(given.measure, given.samples, tuple(given.size) if given.size else None)))
        return
    rows: list[str] = []
    large: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in SMALL if given.only != "large" else ():
            small_checkpoint(name, Path(scratch) / name)
            size = PICTURE if "qwen" in name else None
            rows.append(row(f"{name}, narrow", calibrate(Path(scratch) / name, given.samples, size)))
            print(rows[-1], flush=True)
    for layers in given.depths if given.only != "small" else ():
        large.append(calibrate(dummy_checkpoint(LARGE, layers=layers), given.large_samples))
        rows.append(row(f"{LARGE}, dummy weights", large[-1]))
        print(rows[-1], flush=True)
    weights = 2 * LAYERS * (4 * 4096**2 + 3 * 4096 * 11008)
    put_between_marks(given.out, report(rows, large, weights), title=TITLE)
    print(given.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
