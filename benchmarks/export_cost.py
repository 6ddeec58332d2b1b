"""What exporting a full-size model costs in time, memory and disk, beside two other exporters on the same decoder.

    python -m benchmarks.export_cost --model llava-1.5-7b [--checkpoint FOLDER] [--genai PYTHON] [--write]

Makes a checkpoint of the model's real shapes in a temporary folder (true headers; the decoder is a hole in the file
that takes no disk), or takes one that is there, and measures in child processes, one after another:

- graphs: all decoder and selection graphs of the `btp-paper` plan, from headers to files;
- export: the whole `btp-export export --link hard`, vision and hashes included;
- hashing: the weights' hashes alone, two threads, which export hides behind the vision capture;
- torch: torch.onnx.export(dynamo=True) of transformers' decoder with weights in memory, at two depths;
- genai: onnxruntime-genai's model builder on the same decoder (an interpreter that has it, --genai), at two depths.

The last two are given for all layers by a straight line through the two depths. Memory is the highest resident set
beyond what it was after the imports. --write puts the table into benchmarks/results/export_cost.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.sparse_checkpoints import decoder_alone, sparse_checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export_cost.md"
TOKENS = 640  # rows in the exporters that want example inputs: 35 + 576 + text
DEPTHS = (1, 4)
MIB, GIB = 2**20, 2**30


# -- children --------------------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """VmRSS (resident now) or VmHWM (the highest so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def child_graphs(checkpoint: str, out: str) -> None:
    """Decoder and selection graphs from headers to files."""
    import onnx_ir  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from btp_export.exporting import Options, default_precision, make_profiles
    from btp_export.model.open_model import open_model
    from btp_export.planning.plan_files import plan_for
    from graphs.building.decoder_graphs import build_decoder_graphs
    from graphs.building.derived_bundles import write_graphs

    model = open_model(checkpoint)  # its tokenizer and processor are opened too, which loads half of transformers
    plan = plan_for("btp-paper", model.spec)
    profile = make_profiles(model, Options())[0]

    def work() -> None:
        graphs = build_decoder_graphs(model.spec, model.checkpoint, plan, profile, precision=default_precision(model))
        write_graphs(Path(out), graphs, profile.name)

    measured(work, {"bytes": lambda: tree_bytes(Path(out))})


def child_export(checkpoint: str, out: str) -> None:
    """The whole command."""
    import onnx_ir  # noqa: F401
    import onnxscript  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from btp_export import (
        cli,
    )

    def work() -> None:
        arguments = ["export", "--model", checkpoint, "--plan", "btp-paper", "--link", "hard", "--out", out, "--json"]
        if cli.main(arguments):
            raise SystemExit("export failed")

    measured(work, {"bytes": lambda: tree_bytes(Path(out)), "parts": lambda: bundle_parts(Path(out))})


def child_hashing(checkpoint: str, out: str) -> None:
    """sha256 of every shard."""
    from graphs.files.atomic import hashing

    def work() -> None:
        with hashing(sorted(Path(checkpoint).resolve().glob("*.safetensors"))) as hashes:
            hashes()

    measured(work, {})


def child_torch(config: str, out: str) -> None:
    """torch.onnx.export of transformers' decoder with its weights in memory."""
    import onnxscript  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    document = json.loads(Path(config, "config.json").read_text(encoding="utf-8"))
    text = CONFIG_MAPPING[document["model_type"]].from_dict(document)

    def work() -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text, dtype=torch.float16)
        rotary = model.model.rotary_emb
        model = model.to_empty(device="cpu").eval()
        model.model.rotary_emb = type(rotary)(config=text)
        for parameter in model.parameters():
            parameter.data.zero_()
        rows = torch.zeros(1, TOKENS, text.hidden_size, dtype=torch.float16)
        with torch.no_grad():
            torch.onnx.export(
                model,
                (),
                str(Path(out, "model.onnx")),
                kwargs={"inputs_embeds": rows, "use_cache": False},
                dynamo=True,
                external_data=True,
                verbose=False,
            )

    measured(work, {"bytes": lambda: tree_bytes(Path(out))})


CHILDREN: dict[str, Callable[[str, str], None]] = {
    "graphs": child_graphs,
    "export": child_export,
    "hashing": child_hashing,
    "torch": child_torch,
}


def measured(work: Callable[[], None], more: Mapping[str, Callable[[], Any]]) -> None:
    """Do the work; print one line of JSON with what it took."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is now what is resident
    before, start = status("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "imports": before, "memory": status("VmHWM") - before}
    sys.__stdout__.write("\nRESULT " + json.dumps(result | {name: get() for name, get in more.items()}) + "\n")
    sys.__stdout__.flush()


def tree_bytes(folder: Path) -> int:
    """Bytes of files that are not hard links to something elsewhere."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)


def bundle_parts(root: Path) -> dict[str, int]:
    """Bytes written, by kind."""
    kinds = {"graphs": 0, "vision weights": 0, "position tables": 0, "checkpoint weights": 0, "descriptions": 0}
    for path in root.rglob("*"):
        if not path.is_file() or path.stat().st_nlink > 1:
            continue
        if path.suffix == ".onnx":
            kind = "graphs"
        elif path.suffix == ".safetensors":
            own = {"btp-vision.safetensors": "vision weights", "btp-rope.safetensors": "position tables"}
            kind = own.get(path.name, "checkpoint weights")
        else:
            kind = "descriptions"  # manifest, plan, processor files, shard index
        kinds[kind] += path.stat().st_size
    return kinds


# -- parent ----------------------------------------------------------------------------------------------------------


def run_child(name: str, first: str, out: Path, scratch: Path) -> dict[str, Any]:
    """One of CHILDREN in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.export_cost", "--child", name, first, str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    print(f"{name}: {result['seconds']:.2f} s, {result['memory'] / MIB:.0f} MiB beyond imports", flush=True)
    return result


GENAI = """
import json, runpy, sys, time
import onnx_ir, torch, transformers
def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
sys.argv = ["builder", *sys.argv[1:]]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
print("RESULT " + json.dumps({"seconds": time.perf_counter() - start, "memory": status("VmHWM") - before}))
"""


def run_genai(python: str, checkpoint: Path, out: Path, scratch: Path) -> dict[str, Any]:
    """onnxruntime-genai's builder in its own interpreter."""
    arguments = ["-i", str(checkpoint), "-o", str(out), "-p", "fp16", "-e", "cuda", "-c", str(scratch / "cache")]
    done = subprocess.run(
        [python, "-c", GENAI, *arguments], capture_output=True, text=True, check=False, cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"genai failed:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    result["bytes"] = tree_bytes(out)
    print(f"genai: {result['seconds']:.2f} s, {result['memory'] / MIB:.0f} MiB beyond imports", flush=True)
    return result


def line_through(measured: Mapping[int, Mapping[str, Any]], layers: int) -> dict[str, float]:
    """What two depths say about all layers."""
    (low, first), (high, second) = sorted(measured.items())
    if second["seconds"] <= first["seconds"]:
        raise SystemExit(
            f"{high} layers took less time than {low}: the machine is too busy, repeat this when it is idle"
        )
    return {
        key: second[key] + (second[key] - first[key]) / (high - low) * (layers - high)
        for key in ("seconds", "memory", "bytes")
    }


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything, one child after another."""
    from btp_export.dummy.checkpoints import configured

    config, _ = configured(options.model, layers=options.layers)
    layers = config["text_config"]["num_hidden_layers"]
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        sparse_checkpoint(checkpoint, options.model, options.layers)
    measured: dict[str, Any] = {"model": options.model, "layers": layers, "sparse": options.checkpoint is None}
    measured["weights"] = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    (scratch / "graphs").mkdir()
    measured["graphs"] = run_child("graphs", str(checkpoint), scratch / "graphs", scratch)
    measured["hashing"] = run_child("hashing", str(checkpoint), scratch, scratch)
    measured["export"] = run_child("export", str(checkpoint), scratch / "bundle", scratch)
    shutil.rmtree(scratch / "bundle")
    for kind in ("torch", "genai"):
        if kind == "genai" and options.genai is None:
            continue
        depths: dict[int, dict[str, Any]] = {}
        for depth in DEPTHS:
            source, out = scratch / "decoder", scratch / "exported"
            source.mkdir(), out.mkdir()
            decoder_alone(source, options.model, depth, weights=kind == "genai")
            if kind == "genai":
                depths[depth] = run_genai(options.genai, source, out, scratch)
            else:
                depths[depth] = run_child("torch", str(source), out, scratch)
            shutil.rmtree(source)
            shutil.rmtree(out)
        measured[kind] = {"depths": depths, "all": line_through(depths, layers)}
    return measured


def table(measured: Mapping[str, Any]) -> str:
    """The findings as Markdown."""
    ours, export = measured["graphs"], measured["export"]
    parts = export["parts"]
    rows = [
        ("decoder and selection graphs", ours["seconds"], ours["memory"], ours["bytes"], "1"),
        ("everything, vision and hashes included", export["seconds"], export["memory"], export["bytes"], ""),
    ]
    for kind, title in (
        ("torch", "torch.onnx.export, decoder alone"),
        ("genai", "onnxruntime-genai builder, decoder alone"),
    ):
        if kind in measured:
            every = measured[kind]["all"]
            slower, larger = every["seconds"] / ours["seconds"], every["memory"] / max(ours["memory"], MIB)
            ratio = f"{slower:.0f} x time, {larger:.0f} x memory"
            rows.append((f"{title} (extrapolated)", every["seconds"], every["memory"], every["bytes"], ratio))
    lines = [
        f"## {measured['model']}, {measured['layers']} decoder layers, {measured['weights'] / 1e9:.1f} GB of weights"
        + (" (sparse file)" if measured["sparse"] else ""),
        "",
        "| | time | memory beyond imports | written | against the first row |",
        "|---|---|---|---|---|",
        *(f"| {name} | {seconds:.2f} s | {memory / MIB:.0f} MiB | {size / MIB:.1f} MiB | {ratio} |"
          for name, seconds, memory, size, ratio in rows),
        "",
        f"Written by export: {', '.join(f'{kind} {size / MIB:.2f} MiB' for kind, size in parts.items())}.",
        f"Hashing the weights alone, two threads: {measured['hashing']['seconds']:.1f} s.",
    ]  # fmt: skip
    for kind in ("torch", "genai"):
        if kind in measured:
            seen = "; ".join(
                f"{depth} deep {row['seconds']:.1f} s, {row['memory'] / MIB:.0f} MiB, {row['bytes'] / MIB:.0f} written"
                for depth, row in measured[kind]["depths"].items()
            )
            lines.append(f"Seen of {kind}: {seen}; the row for all layers is the straight line through these.")
    return "\n".join(lines) + "\n"


def heading() -> str:
    """What the result file begins with."""
    from graphs.files.bundle import tool_versions

    versions = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
    busy = os.getloadavg()[0]
    return (
        f"# export_cost.py\n\n`python -m benchmarks.export_cost`, {date.today().isoformat()}, {os.cpu_count()} CPU "
        f"cores, load {busy:.1f} at the end, Python {platform.python_version()}, {versions}.\n\n"
    )


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, to try the script")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of the model that is there already")
    parser.add_argument("--genai", help="a Python interpreter that has onnxruntime-genai")
    parser.add_argument("--scratch", type=Path, help="where to work; on the checkpoint's disk")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/export_cost.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child[0]](options.child[1], options.child[2])
        return
    place = options.scratch or (options.checkpoint.resolve().parent if options.checkpoint else None)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        text = table(measure(options, Path(scratch)))
    print(text)
    if options.write:
        before = RESULTS.read_text(encoding="utf-8") + "\n" if RESULTS.exists() else heading()
        RESULTS.write_text(before + text, encoding="utf-8")


if __name__ == "__main__":
    main()
