"""Files as trtexec writes them: a second writing of what samples/common/sampleReporting.cpp prints, for tests."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path


def put_program(folder: Path, **settings: object) -> None:
    """The stand-in as `folder`/trtexec of 10.3; it reads `folder`/plan.json, where the settings are."""
    folder.mkdir(exist_ok=True)
    options = (Path(__file__).parent / "trtexec" / "10.3.txt").read_text().split()
    (folder / "plan.json").write_text(json.dumps({"version": [10, 3], "options": options, "fail": "", **settings}))
    standin, program = Path(__file__).with_name("trtexec_standin.py"), folder / "trtexec"
    program.write_text(f'#!/bin/sh\nPLAN={folder / "plan.json"} exec {sys.executable} -S -E {standin} "$@"\n')
    program.chmod(0o755)


def median(values: Sequence[float]) -> float:
    """The same as of `statistics`, which takes the stand-in a third of its time to load."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def number(value: float) -> str:
    """As a C++ stream prints a float: six significant digits, "nan" and "inf" as words."""
    if math.isnan(value):
        return "-nan"  # what 0.0F / 0.0F gives on x86
    return f"{value:g}"


def times(compute: Sequence[float]) -> str:
    """--exportTimes: one run after another, each a line; no data transfers."""
    lines, clock = ["["], 200.0
    for place, value in enumerate(compute):
        end = clock + value
        parts = {
            "startEnqMs": clock - 0.02, "endEnqMs": clock - 0.01, "startH2dMs": clock, "endH2dMs": clock,
            "startComputeMs": clock, "endComputeMs": end, "startD2hMs": end, "endD2hMs": end,
            "h2dMs": 0.0, "computeMs": value, "d2hMs": 0.0, "latencyMs": value,
        }  # fmt: skip
        body = ", ".join(f'"{name}" : {number(part)}' for name, part in parts.items())
        lines.append(f"{', ' if place else '  '}{{ {body} }}")
        clock = end + 0.01
    return "\n".join([*lines, "]"]) + "\n"


def layers(timed: Sequence[tuple[str, Sequence[float]]]) -> str:
    """--exportProfile: the number of runs, then the layers; names are not escaped."""
    total = sum(sum(values) for _, values in timed)
    lines = ["[", f'  {{ "count" : {len(timed[0][1]) if timed else 0} }}']
    for name, values in timed:
        share = sum(values) / total * 100 if total else math.nan
        mean = sum(values) / len(values)
        numbers = {"timeMs": sum(values), "averageMs": mean, "medianMs": median(values), "percentage": share}
        body = ", ".join(f'"{key}" : {number(value)}' for key, value in numbers.items())
        lines.append(f', {{ "name" : "{name}", {body} }}')
    return "\n".join([*lines, "]"]) + "\n"


def info(names: Sequence[str], *, detailed: bool) -> str:
    """--exportLayerInfo: the engine inspector's JSON, names alone or with everything."""
    entries = [{"Name": name, "LayerType": "kgen", "Inputs": [], "Outputs": []} if detailed else name for name in names]
    return json.dumps({"Layers": entries, "Bindings": ["hidden"]}, indent=1)


def write_results(prefix: str, milliseconds: float, **layer: object) -> None:
    """The three files of one engine whose runs take about so long, by half a percent more or less.

    `layer`: of a further layer in --exportLayerInfo.
    """
    runs = [milliseconds * (1 + 0.0025 * (number % 5 - 2)) for number in range(65)]
    Path(f"{prefix}.times.json").write_text(times(runs))
    parts = [("first", [milliseconds * 0.7]), ("second", [milliseconds * 0.3])]
    Path(f"{prefix}.profile.json").write_text(layers(parts))
    text = info(["first", "second"], detailed=True)
    if layer:
        document = json.loads(text)
        document["Layers"].append(layer)
        text = json.dumps(document)
    Path(f"{prefix}.layers.json").write_text(text)
