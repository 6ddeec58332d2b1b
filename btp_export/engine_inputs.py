"""`btp-export build` above the engines layer: the build with its progress, and a calibration picture for its inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from btp_export import extras
from engines.tensorrt.build.build import build
from engines.tensorrt.build.machine import BuildMachine
from engines.tensorrt.kit.sample_inputs import RecordingLoader, constant_bytes
from engines.tensorrt.prepare.build_plan import BuildPlan
from engines.tensorrt.summaries import BuiltEngines
from graphs import names
from graphs.files.atomic import size_text
from graphs.files.bundle import Bundle
from graphs.files.memory import available_memory
from graphs.records.errors import InputError, UnavailableError
from graphs.records.progress import Report, silent

if TYPE_CHECKING:
    from PIL import Image

    from btp_export.model.prompting import Encoded
    from btp_export.running.runtime import BundleModel

EXPANSION = 3  # memory of ONNX Runtime on the CPU in units of half-precision weights, which become float32


def build_engines(plan: BuildPlan, machine: BuildMachine, *, force: bool, report: Report | None) -> BuiltEngines:
    """Bring the engines of a target up to date, or its kit where this machine cannot build; gives Result.summary().

    Raises what engines.tensorrt.build.build.build raises.
    """
    report = report or silent
    result = build(
        plan,
        machine.library,
        wish=machine.wishes.plugins,
        reason=machine.reason,
        force=force,
        recorder=record_calibration,
        report=report,
        say=lambda text: report(0, 100, text),
    )
    return result.summary()


def record_calibration(bundle: Bundle, profile: str, graphs: Mapping[str, Path], folder: Path) -> None:
    """Run graphs of a bundle on drawn scenes with questions and leave their inputs in `folder`/<graph>/<input>.bin.

    The scenes are those that `calibrate` begins with. The decode graph, the largest, is fed and not run. Raises
    UnavailableError where this machine cannot run the graphs: no ONNX Runtime, no kernels for bfloat16, too little
    memory.
    """
    from btp_export.model.pictures import fitted
    from btp_export.running.runtime import BundleModel
    from calibrate.data.samples import scene_samples

    with extras.naming(extras.CPU):
        from engines.runners.onnxruntime import OrtLoader

    _require_kernels_and_memory(bundle, graphs)
    chosen = bundle.profile(profile)
    loader = RecordingLoader(OrtLoader(custom_ops=None, prepack=False), folder, not_run=(names.DECODE,))
    model = BundleModel(bundle, loader, profile=profile, graphs=graphs)
    samples = scene_samples(chosen.batch, seed=0, split="calibration").samples
    pictures, _ = fitted([sample.image for sample in samples], bundle.spec, chosen)
    prefill = model.prefill(_encoded(model, pictures, [sample.prompt for sample in samples]))
    model.decode_step(prefill, [int(row.argmax()) for row in prefill.logits])


def _encoded(model: "BundleModel", pictures: "list[Image.Image]", prompts: list[str]) -> "Encoded":
    """The samples, with fewer words in each prompt until it fits the text bucket."""
    words = max(len(prompt.split()) for prompt in prompts)
    while True:
        try:
            shortened = [" ".join(prompt.split()[:words]) for prompt in prompts]
            return model.prompter.encode(pictures, shortened, profile=model.profile)
        except InputError as error:
            if words == 1:
                raise UnavailableError(f"no calibration prompt fits: {error.got}", error.wanted, error.do) from error
        words = max(words // 2, 1)


def _require_kernels_and_memory(bundle: Bundle, graphs: Mapping[str, Path]) -> None:
    """Refuse before minutes are spent."""
    precision, free = bundle.manifest.build.precision, available_memory()
    if precision == "bfloat16":
        raise UnavailableError("ONNX Runtime has no bfloat16 kernels for the CPU", wanted="float16 or float32")
    largest = max(constant_bytes(path) for name, path in graphs.items() if name != names.DECODE)
    needed = largest * (EXPANSION if precision == "float16" else 1)
    if free is not None and needed > free:
        raise UnavailableError(
            f"the largest graph needs about {size_text(needed)} in ONNX Runtime, {size_text(free)} are free"
        )
