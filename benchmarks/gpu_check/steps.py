"""The steps of the two calls, most valuable first, each with its own time limit in seconds.

A step is a command. In it {native} is the folder of the compiled files, {cases} the prepared folder, {scratch} a folder
in memory that the steps of a call share, {out} where results go. The last line of JSON that it prints is its result;
exit code 3 means that something is missing, which the result names as `missing`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DENSE: Final = "dense fp16"  # the products of on_torch.py that four-bit ones are compared with
SANITIZERS: Final = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class Step:
    """One command. `beside`: it starts with the call and runs beside the others, until its turn comes."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()  # programs
    modules: tuple[str, ...] = ()  # of Python, beside those that every step has
    beside: bool = False
    after: str = ""  # a step whose failure makes this one pointless


@dataclass(frozen=True)
class Call:
    """What one call of a GPU machine runs, in at most so many seconds all together."""

    name: str
    seconds: int
    steps: tuple[Step, ...]


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """A step in this Python."""
    return (sys.executable, "-m", f"benchmarks.gpu_check.{module}", *arguments)


def harness(*arguments: str, library: str = "libbtp_kernels.so") -> tuple[str, ...]:
    """A step of the native program."""
    return ("{native}/harness", *arguments, "--kernels", f"{{native}}/{library}", "--cases", "{cases}/cases.bin")


def sanitizer(tool: str) -> Step:
    """Small cases, each launched once. The poison would hide from initcheck what nobody wrote."""
    options = ("--tag", "small", *(["--clean"] if tool == "initcheck" else ["--plain"]))
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *harness("verify", *options))
    return Step(tool, 25, command, needs=("compute-sanitizer",))


def profiled(name: str, case: str) -> Step:
    """The launches of one call, with the hardware's counters; not those that make its data."""
    options = ("--clock-control", "none", "--set", "detailed", "--kernel-name", "regex:^(?!gram_kernel|patch_kernel)")
    return Step(name, 30, ("ncu", *options, *harness("once", "--only", case)), needs=("ncu",))


def before(native: Path) -> tuple[str, ...]:
    """The option that names the earlier kernels, where they were prepared."""
    library = native / "before" / "libbtp_kernels.so"
    return ("--before", str(library)) if library.is_file() else ()


def call_a(native: Path) -> Call:
    """The kernels by themselves, and then in torch."""
    return Call(
        "A",
        235,
        (
            Step("native", 100, python("native_step")),
            Step("facts", 15, ("{native}/harness", "facts")),
            Step("verify", 45, harness("verify")),
            Step("time", 40, (*harness("time", "--tag", "timed", "--count", "30"), *before(native))),
            Step("probe", 15, ("{native}/harness", "probe", "--count", "20")),
            Step("layers", 60, python("on_torch", "layers", "{cases}", "{native}"), modules=("torch",)),
            Step("products", 40, python("on_torch", "products", "{cases}", "{native}"), modules=("torch",)),
            Step("replay", 75, harness("replay", "--tag", "replayed", "--count", "20000", "--seconds", "13")),
            Step("streams", 30, harness("streams", "--tag", "replayed", "--count", "2000", "--seconds", "1")),
            Step("green", 20, harness("green", "--tag", "green", "--count", "16")),
            *(sanitizer(tool) for tool in SANITIZERS),
            profiled("ncu-small", "select_tokens/exact-576"),
            profiled("ncu-large", "select_tokens/exact-2880-float32"),
            profiled("ncu-decode", "linear/decode-1"),
            profiled("ncu-prefill", "linear/prefill-128"),
        ),
    )


def call_b() -> Call:
    """ONNX Runtime on CUDA: the operators, the demo model, and a 7B of made-up weights."""
    return Call(
        "B",
        290,
        (
            Step("7b-export", 200, python("on_ort", "export-7b", "{scratch}"), beside=True),
            Step("native", 100, python("native_step")),
            Step("ort-cases", 75, python("on_ort", "cases", "{cases}", "{native}")),
            Step("ort-threads", 30, python("on_ort", "threads", "{cases}", "{native}")),
            Step("demo-float32", 60, python("on_ort", "demo", "{scratch}", "{native}", "float32")),
            Step("demo-float16", 60, python("on_ort", "demo", "{scratch}", "{native}", "float16")),
            Step("7b-bench", 150, python("on_ort", "bench-7b", "{scratch}", "{native}"), after="7b-export"),
        ),
    )


def calls(native: Path) -> dict[str, Call]:
    """Both calls by name."""
    return {"A": call_a(native), "B": call_b()}
