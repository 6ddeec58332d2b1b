"""A full-size LLaVA-1.5-7B with four-bit weights on a CPU: seconds to open, memory, prefill full and pruned, decode.

    python -m benchmarks.four_bits_cpu [--layers 32] [--steps 8] [--folder DIR] [--plain-layers 2] [--out FILE]

Makes a checkpoint of the model's shapes with random codes (4.5 GB, kept in the cache; nothing is searched for: random
weights have nothing to keep), exports it with the published plan in float32, in which a CPU computes, and measures in
processes of their own: the first opening, a second one, the model without pruning, and the pruned one in float16, into
which `--weights int4` puts a float16 checkpoint. Where btp_ort does not multiply (processors without AVX512-VNNI, or it
is not built) the first packs the weights into files that all sessions map (7 GB in the cache). Beside it the same model
in float16, as ONNX Runtime computes it on a CPU where memory does not hold it: one layer open at a time, from
--plain-layers layers. The load of the machine is recorded. Writes benchmarks/results/four_bits_cpu.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.memory import memory
from benchmarks.pages import put_between_marks
from benchmarks.rtx_7b import MODEL, PUBLISHED, SHORT
from btp_export import console
from btp_export.dummy.checkpoints import dummy_checkpoint
from btp_export.exporting import Options, export_bundle
from btp_export.model.open_model import open_model
from engines.runners.onnxruntime import OrtLoader
from engines.verify.streamed_graphs import StreamedRunner
from graphs.building.decoder_graphs import build_decoder_graphs, serialize
from graphs.building.derived_bundles import derive
from graphs.dtypes import Precision
from graphs.files.atomic import link_or_copy
from graphs.files.bundle import Bundle
from graphs.files.cache_folder import cache_folder
from graphs.records.plan import PruningPlan

RESULTS = Path(__file__).parent / "results" / "four_bits_cpu.md"
GROUP = 128


def plan_for(layers: int) -> PruningPlan:
    """The published plan, as far as there are layers for it."""
    stages = tuple(stage for stage in PUBLISHED if stage.layer < layers) if layers > 3 else SHORT
    return PruningPlan(model_type="llava", num_layers=layers, image_tokens=576, grid=(24, 24), stages=stages)


def make_bundle(layers: int, folder: Path, precision: Precision = "float32") -> Bundle:
    """The dummy model with random codes and the published plan."""
    with console.progress("checkpoint") as bar:
        checkpoint = dummy_checkpoint(MODEL, layers=layers, group=GROUP, report=bar)
    model = open_model(str(checkpoint))
    with console.progress("export") as bar:
        return export_bundle(model, plan_for(layers), folder, Options(precision=precision), report=bar)


def measure_here(bundle: Bundle, steps: int) -> dict[str, Any]:
    """Open the bundle, one prefill, then decode."""
    from btp_export.measuring.bench import random_samples
    from btp_export.running.generation import answers_for
    from btp_export.running.runtime import load

    start, busy = time.perf_counter(), time.process_time()
    model = load(bundle)
    opened, busy = time.perf_counter() - start, time.process_time() - busy
    encoded = random_samples(model)
    prefill = model.prefill(encoded)
    times = model.complete(prefill, answers_for(model.spec, encoded.input_ids, room=steps + 1, endless=True))
    return {
        "open": opened, "busy": busy, "vision": prefill.vision_ms, "prefill": prefill.prefill_ms,
        "decode": median(times), "load": os.getloadavg()[0], **memory(),
    }  # fmt: skip


def measure(bundle: Bundle, steps: int) -> dict[str, Any]:
    """The same in a process of its own, whose memory is all this."""
    command = [sys.executable, "-m", "benchmarks.four_bits_cpu", "--measure", str(bundle.root), "--steps", str(steps)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def layer_at_a_time(layers: int, folder: Path) -> float:
    """Milliseconds for each layer of one decode step of the model in float16, a layer of the graph open at a time."""
    model = open_model(str(dummy_checkpoint(MODEL, layers=layers)))
    plan = plan_for(layers).without_stages()
    profile = model.family.profile(model.spec, batch=1, text_tokens=64, new_tokens=128, image_size=None)
    decode = build_decoder_graphs(model.spec, model.checkpoint, plan, profile, precision="float16")[-1]
    (folder / "weights").mkdir(parents=True)
    for file in model.checkpoint.files:
        link_or_copy(file, folder / "weights" / file.name)
    path = folder / "decode.onnx"
    path.write_bytes(serialize(decode))
    runner = StreamedRunner(path, OrtLoader(), most=1)
    inputs = {name: np.zeros(spec.shape, spec.dtype) for name, spec in runner.inputs.items()}
    start = time.perf_counter()
    runner.run(inputs)
    return (time.perf_counter() - start) * 1000 / layers


def rows(found: dict[str, dict[str, Any]]) -> list[str]:
    columns = ("", "opening, s", "of processor time, s", "vision, ms", "prefill, ms", "decode, ms a token")
    columns += ("peak, GiB", "private, GiB", "mapped once, GiB", "load")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, one in found.items():
        gib = {key: one[key] / 1024 for key in ("VmHWM", "RssAnon", "Pss")}
        lines.append(
            f"| {name} | {one['open']:.0f} | {one['busy']:.1f} | {one['vision']:.0f} | {one['prefill']:.0f} "
            f"| {one['decode']:.0f} | {gib['VmHWM']:.1f} | {gib['RssAnon']:.1f} | {gib['Pss'] - gib['RssAnon']:.1f} "
            f"| {one['load']:.1f} |"
        )
    return lines


TITLE = "LLaVA-1.5-7B with four-bit weights on a CPU"
PAGE = """\
`python -m benchmarks.four_bits_cpu`, {date}, {cores} cores ({machine}), ONNX Runtime with int8 rows (btp_ort's products
where the processor has AVX512-VNNI), {layers} layers of random codes in groups of {group}, float32 where a row does
not say float16, batch 1, 576 image tokens, the published plan. The first prefill after opening, the median of
the decode steps. `load` is the machine's: where it is above the number of cores, times say little.{limit}

{table}

Peak is the process's resident memory at most. Pages that are mapped from a file count once, and the system may drop
them.

One layer at a time in float32, as a machine must that does not hold the model in float16: {layer_ms:.0f} ms a layer for
one token, {all_s:.0f} s for {layers} layers.
"""


def limit() -> str:
    """The memory that a control group leaves to this process, if one does."""
    file = Path("/sys/fs/cgroup/memory") / _group() / "memory.limit_in_bytes"
    given = int(file.read_text()) if file.is_file() else 2**62
    return f" The control group's limit was {given / 2**30:.0f} GiB." if given < 2**40 else ""


def _group() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line.split(":")[2].strip("/") for line in lines if ":memory:" in line), "")


def report(found: dict[str, dict[str, Any]], layer_ms: float, layers: int) -> str:
    """What is written into the page."""
    return PAGE.format(
        date=date.today(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        layers=layers,
        group=GROUP,
        table="\n".join(rows(found)),
        limit=limit(),
        layer_ms=layer_ms,
        all_s=layer_ms * layers / 1000,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--plain-layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the bundle goes and stays; a temporary one if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure_here(Bundle.open(given.measure), given.steps)))
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="four-bits-") as scratch:
        place = given.folder or Path(scratch) / "bundle"
        bundle = Bundle.open(place) if place.is_dir() else make_bundle(given.layers, place)
        full = derive(bundle, bundle.plan.without_stages(), Path(scratch) / "full")
        layer_ms = layer_at_a_time(given.plain_layers, Path(scratch) / "plain")
        half = make_bundle(bundle.spec.decoder.num_layers, Path(scratch) / "half", "float16")
        measured = {"pruned, first opening": bundle, "pruned": bundle, "full": full, "pruned, float16": half}
        found = {}
        for name, one in measured.items():
            found[name] = measure(one, given.steps)
            put_between_marks(given.out, report(found, layer_ms, bundle.spec.decoder.num_layers), title=TITLE)
    print(given.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
