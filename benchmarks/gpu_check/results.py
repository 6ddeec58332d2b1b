"""From the folder that came back (A.jsonl, B.jsonl and their logs) to benchmarks/results/<gpu>.json and a table.

A file for a GPU is written only where the GPU has answered: without the step `facts` there is nothing to name it after.
What a step did not give is absent, and `steps` says why.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu_check.runner import what_is_missing
from benchmarks.gpu_check.steps import DENSE, SANITIZERS
from graphs.records.errors import CheckError, InputError

RESULTS: Final = Path(__file__).parents[1] / "results"
REDUCTION: Final = re.compile(r"reduce_(\d+)_ns")
SUMMARY: Final = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
NCU_KERNEL: Final = re.compile(
    r"^ {2}(?:void )?(?:\w+::|<unnamed>::|\(anonymous namespace\)::)*(\w+)[<(].*\((\d+, \d+, \d+)\)x\((\d+, \d+, \d+)\)"
)
NCU_FIELD: Final = re.compile(r"^ +(Duration|Registers Per Thread|L2 Hit Rate|Memory Throughput)  +(\S+) +([\d.,]+)")

Records = dict[str, dict[str, Any]]


def record(folders: Sequence[Path], target: Path = RESULTS) -> tuple[Path, str]:
    """Write <gpu>.json and <gpu>.md; gives the first and the table.

    Raises InputError for folders without results, CheckError where no GPU has answered.
    """
    prepared, steps, logs = read(folders)
    if steps.get("facts", {}).get("status") != "done":
        why = what_is_missing(steps["facts"]) if "facts" in steps else "the step facts was not run"
        raise CheckError(f"no GPU has answered: {why}", "results of a GPU machine", "docs/gpu-check.md says how")
    document = summary(prepared, steps, logs)
    name = re.sub(r"[^a-z0-9]+", "-", str(document["facts"]["gpu"]).lower()).strip("-")
    text = table(document)
    path = target / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path, text


def read(folders: Sequence[Path]) -> tuple[dict[str, Any], Records, str]:
    """What was prepared, the last record of each step, and the logs. A line that was cut off is left out."""
    prepared: dict[str, Any] = {}
    steps: Records = {}
    files = [path for folder in folders for path in sorted(folder.glob("*.jsonl"))]
    if not files:
        raise InputError(f"no results in {', '.join(map(str, folders))}", "a folder with A.jsonl", "run a call first")
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] == "prepared":
                prepared |= {**record["result"], "date": record["date"]}
            elif record["step"] not in steps or record["status"] == "done":
                steps[record["step"]] = record
    logs = "".join(path.with_suffix(".log").read_text() for path in files if path.with_suffix(".log").is_file())
    return prepared, steps, logs


# -- the document ------------------------------------------------------------------------------------------------------


def summary(prepared: Mapping[str, Any], steps: Records, logs: str) -> dict[str, Any]:
    """Everything, by what it says."""

    def result(name: str) -> Any:
        return steps[name]["result"] if steps.get(name, {}).get("status") == "done" else None

    about = ("date", "commit", "changed", "before", "architecture", "nvcc")
    limits = result("probe")
    return {
        "facts": result("facts"),
        "machine": (result("native") or {}).get("machine"),
        "prepared": {name: prepared.get(name) for name in about},
        "steps": {name: _state(record) for name, record in steps.items()},
        "verified": result("verify"),
        "limits": limits,
        "before_problem": steps.get("time", {}).get("result", {}).get("before_problem", ""),
        "rows": _rows(
            steps.get("time", {}).get("result", {}).get("rows", []),
            prepared.get("shapes", {}),
            limits,
            _dense_rate(result("products")),
        ),
        "replays": result("replay"),
        "streams": result("streams"),
        "green": result("green"),
        "sanitizers": {tool: _sanitized(steps[tool]) for tool in SANITIZERS if tool in steps},
        "ncu": {name: list(_profiled(logs, name)) for name in steps if name.startswith("ncu")},
        "layers": result("layers"),
        "products": result("products"),
        "onnxruntime": {
            name: result(name)
            for name in ("ort-cases", "ort-threads", "demo-float32", "demo-float16", "7b-bench")
            if name in steps
        },
    }  # fmt: skip


def _state(record: Mapping[str, Any]) -> dict[str, Any]:
    state = {"status": record["status"], "seconds": record["seconds"]}
    why = what_is_missing(record)
    return state | ({"why": why} if why else {})


def _dense_rate(products: Any) -> float | None:
    """TFLOP/s of torch's best dense float16 product."""
    rates = [row["tflops"] for row in (products or {"rows": []})["rows"] if row["what"].startswith(DENSE)]
    return max(rates, default=None)


def _rows(
    timed: Iterable[Mapping[str, Any]], shapes: Mapping[str, Any], limits: Any, rate: float | None
) -> list[dict[str, Any]]:
    """One row a timed call: this version, the one before, and what its floor is made of.

    A product (BtpLinear): floor = the larger of bytes / bandwidth and operations / torch's dense rate. A selection:

    floor = two launches + steps x (dependent read from L2 + reductions of a block of that many threads) + bytes of the
    similarity / bandwidth where rule 2 starts from nothing.
    """
    rows = []
    for record in timed:
        microseconds = statistics.median(record["us"])
        row: dict[str, Any] = {"name": record["name"], "us": microseconds, "problem": record["problem"]}
        if record["before_us"]:
            row["before_us"] = statistics.median(record["before_us"])
        shape = shapes.get(record["name"])
        if shape is not None and "operations" in shape:
            row |= _product(shape, row["us"], limits, rate)
        elif shape is not None and limits is not None:
            step = (limits["l2_read_ns"] + limits[_reduction(shape["tokens"], limits)]) / 1e3
            moved = shape["bytes"] / limits["copy_gb_per_s"] / 1e3
            row |= {"steps": shape["steps"], "floor_us": limits["two_launches_us"] + shape["steps"] * step + moved}
        rows.append(row)
    return rows


def _product(shape: Mapping[str, Any], us: float, limits: Any, rate: float | None) -> dict[str, float]:
    """Bandwidth and rate that a product reached, and what share that is of what a copy and a dense product reach."""
    row = {"gb_per_s": shape["bytes"] / us / 1e3, "tflops": shape["operations"] / us / 1e6}
    if limits is not None:
        row["share_of_bandwidth"] = row["gb_per_s"] / limits["copy_gb_per_s"]
    if rate is not None:
        row["share_of_rate"] = row["tflops"] / rate
    if limits is not None and rate is not None:
        row["floor_us"] = max(shape["bytes"] / limits["copy_gb_per_s"] / 1e3, shape["operations"] / rate / 1e6)
    return row


def _reduction(tokens: int, limits: Mapping[str, float]) -> str:
    """The measured reduction with the fewest threads that hold V tokens, four a thread."""
    sizes = sorted(int(match[1]) for match in map(REDUCTION.fullmatch, limits) if match is not None)
    fitting = [threads for threads in sizes if 4 * threads >= tokens]
    return f"reduce_{fitting[0] if fitting else sizes[-1]}_ns"


def _sanitized(record: Mapping[str, Any]) -> str:
    """The tool's own summary, or why there is none."""
    summaries = SUMMARY.findall(str(record.get("tail", "")))
    return summaries[-1].strip() if summaries else what_is_missing(record) or "no summary"


def _profiled(logs: str, step: str) -> Iterable[dict[str, Any]]:
    """Kernel by kernel what ncu said: grid, block, and the fields of NCU_FIELD with their units."""
    part = logs.split(f"==== {step}:", 1)[-1].split("\n====", 1)[0] if f"==== {step}:" in logs else ""
    current: dict[str, Any] | None = None
    for line in part.splitlines():
        if kernel := NCU_KERNEL.match(line):
            if current is not None:
                yield current
            current = {"kernel": kernel[1], "grid": kernel[2], "block": kernel[3]}
        elif current is not None and (field := NCU_FIELD.match(line)):
            current.setdefault(f"{field[1]} ({field[2]})", float(field[3].replace(",", "")))
    if current is not None:
        yield current


# -- the table ---------------------------------------------------------------------------------------------------------


def table(document: Mapping[str, Any]) -> str:
    """The document in Markdown."""
    facts, prepared = document["facts"], document["prepared"]
    lines = [
        f"# {facts['gpu']}",
        "",
        f"{prepared['date']}, kernels of {prepared['commit']}{' with changes' if prepared['changed'] else ''}"
        f", before: {prepared['before'] or 'none'}. [How this was made](../../docs/gpu-check.md).",
        "",
        *_checked(document),
        "",
        *_timed([row for row in document["rows"] if "tflops" not in row]),
        *_products([row for row in document["rows"] if "tflops" in row]),
        *_model(document["layers"], document["products"]),
        *_runtime(document["onnxruntime"]),
    ]
    undone = {name: record for name, record in document["steps"].items() if record["status"] != "done"}
    failed = [f"- {name}: {record['status']}. {record.get('why', '')}" for name, record in undone.items()]
    return "\n".join([*lines, *(["", "Not done:", "", *failed] if failed else []), ""])


def _checked(document: Mapping[str, Any]) -> list[str]:
    lines = []
    if verified := document["verified"]:
        lines.append(f"- {verified['calls']} calls in {verified['launches']} launches equal the reference")
    for kind in ("replays", "streams"):
        for row in (document[kind] or {"rows": []})["rows"]:
            what = "replayed" if kind == "replays" else "two streams"
            lines.append(f"- {what}, {row['name']}: {row['replays']} times, {row['wrong_bytes']} wrong bytes")
    if problem := document["before_problem"]:
        lines.append(f"- the kernels before were not timed: {problem}")
    if green := document["green"]:
        rows = ", ".join(f"{row['name']} {row['us']:.1f} us" for row in green["rows"])
        lines.append(f"- on {green['multiprocessors_used']} multiprocessors: {rows}")
    return [*lines, *(f"- compute-sanitizer {tool}: {summary}" for tool, summary in document["sanitizers"].items())]


def _timed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| call | us | before | steps | floor us | x floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        earlier = f"{row['before_us']:.1f}" if "before_us" in row else "-"
        floor = "- | - | -"
        if "floor_us" in row:
            floor = f"{row['steps']} | {row['floor_us']:.1f} | {row['us'] / row['floor_us']:.2f}"
        lines.append(f"| {row['name']} | {row['us']:.1f} | {earlier} | {floor} |")
    return lines if rows else []


def _products(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "| four-bit product | us | before | GB/s | of a copy's | TFLOP/s | of torch's dense | x floor |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        earlier = f"{row['before_us']:.1f}" if "before_us" in row else "-"
        shares = [f"{row[key]:.0%}" if key in row else "-" for key in ("share_of_bandwidth", "share_of_rate")]
        floor = f"{row['us'] / row['floor_us']:.2f}" if "floor_us" in row else "-"
        reached = f"{row['gb_per_s']:.0f} | {shares[0]} | {row['tflops']:.1f} | {shares[1]}"
        lines.append(f"| {row['name']} | {row['us']:.1f} | {earlier} | {reached} | {floor} |")
    return lines if rows else []


def _model(layers: Any, products: Any) -> list[str]:
    lines = []
    if layers:
        lines += [
            "",
            f"32 layers of a 7B in float16: prefill {layers['full_ms']:.2f} ms, pruned {layers['pruned_ms']:.2f} ms, "
            f"{layers['speedup']:.2f} x of the {layers['flops_limit']:.2f} x that operations allow "
            f"({layers['share_of_limit']:.0%}). Selection: {', '.join(f'{ms:.3f}' for ms in layers['select_ms'])} ms.",
        ]
    if products:
        lines += ["", "| in torch | ms | |", "|---|---|---|"]
        for row in products["rows"]:
            more = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else ""
            more += f", error {row['error']:.1e}" if "error" in row else ""
            more = f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else more
            lines.append(f"| {row['what']} | {row['ms']:.4f} | {more} |")
    return lines


def _runtime(given: Mapping[str, Any]) -> list[str]:
    lines = []
    if step := given.get("ort-cases"):
        where = ", ".join(f"{count} {what}" for what, count in sorted(step["placement"].items()))
        lines.append(f"- {step['cases']} cases equal the reference; {where}")
    if step := given.get("ort-threads"):
        lines.append(f"- two threads in one session: {step['runs'][0]} and {step['runs'][1]} runs, none differs")
    for name in ("demo-float32", "demo-float16", "7b-bench"):
        if not (step := given.get(name)):
            continue
        prefill, decode = step["bench"]["prefill"], step["bench"]["decode"]
        passed = "" if "verify" not in step else "verified, " if step["verify"]["passed"] else "NOT verified, "
        memory = f", {step['most_memory_mib']} MiB at most" if "most_memory_mib" in step else ""
        lines.append(
            f"- {name}: {passed}prefill {prefill['full_ms']:.2f} ms, pruned {prefill['pruned_ms']:.2f} ms "
            f"({prefill['share_of_limit']:.0%} of the limit), decode {decode['ms_per_token']:.2f} ms a token{memory}"
        )
    return ["", "ONNX Runtime on CUDA:", "", *lines] if lines else []
