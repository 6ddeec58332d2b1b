"""Options that several commands share, each declared once: annotations for single ones, dataclasses for groups.

A group is a dataclass whose fields are options, with a method that makes of them what the toolkit takes; see _groups.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from btp_export import bounds
from btp_export.commands import _complete as complete
from btp_export.commands._groups import MODELS, Between, Formerly
from graphs.files.paths import expanded
from graphs.records.stored_weights import GROUP_OF, Weights

if TYPE_CHECKING:
    from btp_export.exporting import Options
    from btp_export.model.open_model import DummyWeights, Model
    from btp_export.planning.calibration_settings import CalibrationSettings

Importance = Literal["last-token", "mean-text", "similar-text"]
Metric = Literal["euclidean", "manhattan"]
Float = Literal["float32", "float16", "bfloat16"]

MODEL_HELP = f"demo, {MODELS}, a checkpoint folder, or a hub id."
TARGET_HELP = "The device, e.g. jetson-orin-jp6, h100, rtx-ada."

BundleArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="NAME", help=MODEL_HELP, autocompletion=complete.models)]
MaybeModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help=MODEL_HELP, autocompletion=complete.models)
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder of the new bundle.  [default: ./NAME-bundle]")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the bundle at --out.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Chooses the samples."), Between(*bounds.SEEDS, 0)]
TargetOption = Annotated[
    str, typer.Option("--target", metavar="NAME", help=TARGET_HELP, autocompletion=complete.targets)
]
EnginesOption = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="NAME", help="Use the engines built for this device.", autocompletion=complete.targets
    ),
    Formerly("--engine"),
]
NoCudaGraphOption = Annotated[
    bool,
    typer.Option("--no-cuda-graph", help="With --target: start engines one by one, not as CUDA graphs."),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="Shape profile.  [default: the first]", autocompletion=complete.profiles
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="CPU threads for each graph.  [default: all cores]"),
    Between(*bounds.THREADS, 4),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Spread the samples over a Ray cluster: auto, local, host:port or ray://..."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="D",
        help="Where PyTorch or ONNX Runtime computes: cpu, cuda, cuda:<n>, or auto (a GPU if there is one).",
        autocompletion=complete.devices,
    ),
]
ActivationsOption = Annotated[
    Literal["int8", "float32"],
    typer.Option(
        "--activations",
        help="What a CPU multiplies four-bit weights with: rows rounded to int8 (fast), or float32 rows (exact).",
    ),
]
MathsOption = Annotated[
    Float,
    typer.Option("--maths", metavar="TYPE", help="Type transformers computes in: float32, float16 or bfloat16."),
]
CompressionOption = Annotated[
    float | None,
    typer.Option("--compression", metavar="X", help="Share of image tokens to save, mean over layers, e.g. 0.78."),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep", metavar="K,K,...", help="Tokens kept by each stage, e.g. 288,144,0; not with --compression."
    ),
]
ImagesOption = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="DIR|JSONL|hf:NAME",
        help="Calibration pictures: a folder, a JSONL file of image and prompt, or a data set.  [default: drawn ones]",
    ),
]
MixOption = Annotated[
    str | None,
    typer.Option(
        "--mix",
        metavar="KIND=X,...",
        help="Shares of the drawn kinds: scenes, signs, pages, tables, charts, forms; reading: all but scenes.",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="JSONL of image, prompt, answer.  [default: drawn scenes]"),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System message that prompts begin with.  [default: the template's]"),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="The decoder's matrices: as they are, or in four bits in groups of 128 (int4), 32 or 64, "
        "with scales searched on the calibration pictures.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--image-size", metavar="HxW", help="Height and width of pictures in pixels.  [default: the model's]"),
]


@dataclass(frozen=True)
class PlanOptions:
    """Which plan, and how it is calibrated."""

    heading: ClassVar[str] = "Plan and calibration"
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            metavar="PRESET|FILE",
            help="btp (calibrated), a preset (see plan --list) or a plan.json.",
            autocompletion=complete.plans,
        ),
    ] = "btp"
    compression: CompressionOption = None
    keep: KeepOption = None
    images: ImagesOption = None
    mix: MixOption = None
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", help="Calibration samples."),
        Between(*bounds.CALIBRATION_SAMPLES, 64),
    ] = 64
    seed: SeedOption = 0

    def settings(self) -> "CalibrationSettings":
        """The calibration's settings. Raises InputError for settings out of range."""
        from btp_export.planning.calibration_settings import CalibrationSettings, check_settings, parse_keep

        settings = CalibrationSettings(
            images=self.images,
            mix=self.mix,
            samples=self.samples,
            compression=self.compression,
            keep=None if self.keep is None else parse_keep(self.keep),
            seed=self.seed,
        )
        check_settings(settings)
        return settings


@dataclass(frozen=True)
class ExportOptions:
    """The static shapes, and the form of the graphs."""

    heading: ClassVar[str] = "Shapes and graphs"
    batch: Annotated[
        int, typer.Option("--batch", metavar="B", help="Samples at a time."), Between(*bounds.BATCHES, 1)
    ] = 1
    text_tokens: Annotated[
        int | None,
        typer.Option("--text-tokens", metavar="T", help="Room for the prompt after the image.  [default: 64; demo 32]"),
        Between(*bounds.TOKENS, 64),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", help="Room for generated tokens.  [default: 128; demo 8]"),
        Between(*bounds.TOKENS, 128),
    ] = None
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            "--image-size",
            metavar="HxW",
            help="Height and width of pictures in pixels; repeat for several sizes.  [default: the model's]",
        ),
    ] = None
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            help="A shape profile, batch=B,text=T,new=N,image=HxW; repeat for several.",
        ),
        Formerly("--profile"),
    ] = None
    opset: Annotated[
        int,
        typer.Option("--opset", metavar="N", help="23: fused operators; 18: primitive operators only."),
    ] = 23
    precision: Annotated[
        Float | None,
        typer.Option(
            "--precision", metavar="TYPE", help="float32, float16 or bfloat16.  [default: the model's; demo float32]"
        ),
    ] = None
    assemble: Annotated[
        Literal["segments", "whole"], typer.Option("--assemble", help="Prefill in segments, or as one graph.")
    ] = "segments"
    link: Annotated[
        Literal["auto", "hard", "copy"],
        typer.Option("--link", help="Weights as hard links or copies; auto: links for large files."),
    ] = "auto"

    def options(self) -> "Options":
        """The export's options. Raises InputError for an image size that is none."""
        from btp_export.exporting import Options

        return Options(
            batch=self.batch,
            text_tokens=self.text_tokens,
            new_tokens=self.max_new_tokens,
            profiles=tuple(self.shape or ()),
            image_sizes=tuple(parse_image_size(text) for text in self.image_size or ()),
            opset=self.opset,
            precision=self.precision,
            assemble=self.assemble,
            link=self.link,
        )


@dataclass(frozen=True)
class DummyOptions:
    """Random weights in place of a model's own."""

    heading: ClassVar[str] = "Random weights"
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights of the model's shapes: for times and sizes only.")
    ] = False
    dummy_layers: Annotated[
        int | None,
        typer.Option("--dummy-layers", metavar="N", help="With --dummy-weights: this many decoder layers only."),
        Between(1, 1024, 2),
    ] = None
    dummy_seed: Annotated[
        int, typer.Option("--dummy-seed", metavar="N", help="Chooses the dummy weights."), Between(*bounds.SEEDS, 0)
    ] = 0

    def chosen(self, weights: Weights = "model") -> "DummyWeights | None":
        """What the three options say together, for --weights. Raises InputError for the others without the first."""
        from btp_export.model.open_model import DummyWeights
        from graphs.records.errors import InputError

        if not self.dummy_weights and (self.dummy_layers is not None or self.dummy_seed):
            flag, value = ("seed", self.dummy_seed) if self.dummy_layers is None else ("layers", self.dummy_layers)
            raise InputError(f"--dummy-{flag} {value} without --dummy-weights", wanted="both", do="add --dummy-weights")
        if not self.dummy_weights:
            return None
        return DummyWeights(self.dummy_seed, self.dummy_layers, GROUP_OF.get(weights))


def default_out(model: str) -> Path:
    """./demo-bundle for demo, ./model-bundle for owner/model or some/folder/model."""
    path = expanded(model)
    return Path(f"{path.resolve().name if model in ('.', '..') else path.name}-bundle")


def parse_image_size(text: str) -> tuple[int, int]:
    """ "672x336" -> (672, 336), height and width. Raises InputError for anything else."""
    from graphs.records.errors import InputError

    height, _, width = text.lower().partition("x")
    if not all(part.isascii() and part.isdigit() and len(part) < 7 and int(part) > 0 for part in (height, width)):
        raise InputError(f"--image-size {text}", wanted="height x width in pixels", do="--image-size 672x672")
    return int(height), int(width)


def open_chosen(
    model: str, dummy: "DummyWeights | None", system: str | None = None, weights: "Weights" = "model"
) -> "Model":
    """The model, with a progress bar where dummy weights have to be made, and a note that they are dummies."""
    from btp_export.console import dummy_lines, note, progress
    from btp_export.model.open_model import open_model

    with progress("opening") as bar:
        opened = open_model(model, dummy, system=system, weights=weights, report=bar)
    for line in dummy_lines(opened.source.is_dummy):
        note(line)
    return opened
