"""The steps of the two calls, most valuable first, each with its own time limit in seconds; together they fit the call.

A step is a command. In it {native} is the folder of the compiled files, {cases} the prepared folder, {scratch} a folder
in memory that the steps of a call share, {out} where results go. The last line of JSON that it prints is its result;
exit code 3 means that something is missing, which the result names as `missing`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "build" / "gpu-check"  # what is prepared
# Packages of Python: those that cases and calls are made of, and those of the commands of btp-export.
OPERATORS: Final = ("numpy", "onnx", "ml_dtypes")
COMMANDS: Final = (
    *OPERATORS, "pydantic", "typer", "rich", "jinja2", "onnx_ir", "onnxscript", "onnxruntime", "safetensors",
    "tokenizers", "PIL", "huggingface_hub", "transformers", "torch",
)  # fmt: skip
DENSE: Final = "dense fp16"  # the products of on_torch.py that four-bit ones are compared with
SANITIZERS: Final = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class Step:
    """One command. `beside`: it starts with the call and runs beside the others, until its turn comes."""

    name: str
    seconds: int  # that it may always take; what earlier steps have left comes on top
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()  # programs
    modules: tuple[str, ...] = ()  # of Python, beyond its standard library
    slow_to_start: bool = False  # without a GPU it is not started
    at_most: int = 0  # that it may take at the cost of the last steps: without it none of them runs
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


def native_files(*names: str) -> Step:
    """The compiled files that a call needs. Where those that were carried do not run, nvcc takes more than its time."""
    return Step("native", 12, python("native_step", *names), at_most=100)


def sanitizer(tool: str) -> Step:
    """Small cases, each launched once. The poison would hide from initcheck what nobody wrote."""
    options = ("--tag", "small", *(["--clean"] if tool == "initcheck" else ["--plain"]))
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *harness("verify", *options))
    return Step(tool, 9, command, needs=("compute-sanitizer",))


def profiled(name: str, case: str) -> Step:
    """The launches of one call, with the hardware's counters, without those that make its data."""
    options = ("--clock-control", "none", "--set", "detailed", "--profile-from-start", "off")
    return Step(name, 4, ("ncu", *options, *harness("once", "--only", case)), needs=("ncu",))


def before(native: Path) -> tuple[str, ...]:
    """The option that names the earlier kernels, where they were prepared."""
    library = native / "before" / "libbtp_kernels.so"
    return ("--before", str(library)) if library.is_file() else ()


def on_torch(what: str, seconds: int) -> Step:
    """A step in torch, which takes seconds to load."""
    command = python("on_torch", what, "{cases}", "{native}")
    return Step(what, seconds, command, modules=(*OPERATORS, "torch"), slow_to_start=True)


def call_a(native: Path) -> Call:
    """The kernels by themselves, and then in torch."""
    return Call(
        "A",
        235,
        (
            native_files("libbtp_kernels.so", "harness"),
            Step("facts", 6, ("{native}/harness", "facts")),
            Step("verify", 20, harness("verify")),
            Step("time", 22, (*harness("time", "--tag", "timed", "--count", "15"), *before(native))),
            Step("probe", 8, ("{native}/harness", "probe", "--count", "20")),
            on_torch("layers", 34),
            on_torch("products", 18),
            Step("replay", 37, harness("replay", "--tag", "replayed", "--count", "20000", "--seconds", "30")),
            Step("streams", 16, harness("streams", "--tag", "replayed", "--count", "2000", "--seconds", "0.7")),
            Step("green", 10, harness("green", "--tag", "green", "--count", "16")),
            *(sanitizer(tool) for tool in SANITIZERS),
            profiled("ncu-small", "select_tokens/exact-576"),
            profiled("ncu-large", "select_tokens/exact-2880-float32"),
            profiled("ncu-decode", "linear/decode-1"),
            profiled("ncu-prefill", "linear/prefill-128"),
        ),
    )


def on_ort(name: str, seconds: int, *arguments: str, modules: tuple[str, ...] = COMMANDS, after: str = "") -> Step:
    """A step in ONNX Runtime."""
    return Step(name, seconds, python("on_ort", *arguments), modules=modules, after=after)


def call_b() -> Call:
    """ONNX Runtime on CUDA: the operators, the demo model, and a 7B of made-up weights."""
    alone = (*OPERATORS, "onnxruntime")
    export = python("on_ort", "export-7b", "{scratch}")
    return Call(
        "B",
        290,
        (
            Step("7b-export", 160, export, modules=COMMANDS, beside=True),
            native_files("libbtp_ort.so"),
            on_ort("ort-cases", 40, "cases", "{cases}", "{native}", modules=alone),
            on_ort("ort-threads", 15, "threads", "{cases}", "{native}", modules=alone),
            on_ort("demo-float32", 45, "demo", "{scratch}", "{native}", "float32"),
            on_ort("demo-float16", 45, "demo", "{scratch}", "{native}", "float16"),
            on_ort("7b-bench", 130, "bench-7b", "{scratch}", "{native}", after="7b-export"),
        ),
    )


def calls(native: Path) -> dict[str, Call]:
    """Both calls by name."""
    return {"A": call_a(native), "B": call_b()}
