"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btp_export.families import known_models

if TYPE_CHECKING:
    from btp_export.exporting import Options
    from btp_export.model.open_model import DummyWeights, Model
    from btp_export.planning.study import CalibrationSettings

MODEL_HELP = f"demo, {', '.join(known_models())}, a checkpoint folder, or a hub id."

ModelOption = Annotated[str, typer.Option("--model", metavar="NAME", help=MODEL_HELP)]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The bundle.  [default: ./NAME-bundle]")]
PlanOption = Annotated[
    str,
    typer.Option("--plan", metavar="PRESET|FILE", help="btp (calibrated), a preset (plan --list) or a plan.json."),
]
CompressionOption = Annotated[
    float | None,
    typer.Option("--compression", metavar="X", help="Share of image tokens to save, mean over layers, e.g. 0.78."),
]
KeepOption = Annotated[
    str | None, typer.Option("--keep", metavar="K,K,...", help="Tokens kept by each stage instead, e.g. 288,144,0.")
]
SamplesOption = Annotated[int, typer.Option("--samples", metavar="N", help="Calibration samples.")]
ImagesOption = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="DIR|JSONL|hf:NAME",
        help="Calibrate on these pictures: a folder, image and prompt by line, or a data set.  [default: drawn scenes]",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Chooses the samples.")]
BatchOption = Annotated[int, typer.Option("--batch", metavar="B", help="Samples at a time.")]
TextOption = Annotated[
    int | None,
    typer.Option("--text-tokens", metavar="T", help="Room for the prompt after the image.  [default: 64; demo 32]"),
]
NewOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Room for generated tokens.  [default: 128; demo 8]"),
]
ProfileOption = Annotated[
    list[str] | None,
    typer.Option("--profile", metavar="SHAPE", help="batch=B,text=T,new=N,image=HxW; again for several."),
]
ImageSizeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image-size",
        metavar="HxW",
        help="Pictures of this height and width in pixels; again for several.  [default: the model's]",
    ),
]
OpsetOption = Annotated[int, typer.Option("--opset", help="23: fused operators; 18: primitives only.")]
PrecisionOption = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(
        "--precision", metavar="TYPE", help="float32, float16 or bfloat16.  [default: the model's; demo float32]"
    ),
]
AssembleOption = Annotated[
    Literal["segments", "whole"], typer.Option("--assemble", help="Prefill as segments, or one whole graph.")
]
LinkOption = Annotated[
    Literal["auto", "hard", "copy"],
    typer.Option("--link", help="Weights: hard links, copies, or links for the big ones."),
]
EngineOption = Annotated[
    str | None, typer.Option("--engine", metavar="TARGET", help="Use the engines built for this target.")
]
TARGET_HELP = "The device, e.g. jetson-orin-jp6, h100, rtx-ada."
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a bundle at --out.")]

DeviceOption = Annotated[str, typer.Option("--device", metavar="D", help="cpu, cuda, cuda:<n>, or auto: a GPU if any.")]
MathsOption = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option("--maths", metavar="TYPE", help="What transformers computes in: float32, float16 or bfloat16."),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System message that prompts begin with.  [default: the template's]"),
]
DummyOption = Annotated[
    bool, typer.Option("--dummy-weights", help="Random weights in the model's shapes: for times and sizes only.")
]
DummyLayersOption = Annotated[
    int | None, typer.Option("--dummy-layers", metavar="N", help="With --dummy-weights: only so many decoder layers.")
]
DummySeedOption = Annotated[int, typer.Option("--dummy-seed", metavar="N", help="Chooses the dummy weights.")]


def default_out(model: str) -> Path:
    """./demo-bundle for demo, ./model-bundle for owner/model or some/folder/model."""
    return Path(f"{Path(model.rstrip('/')).resolve().name if model in ('.', '..') else Path(model).name}-bundle")


def export_options(
    *,
    batch: int,
    text_tokens: int | None,
    max_new_tokens: int | None,
    image_size: list[str] | None,
    profile: list[str] | None,
    opset: int,
    precision: Literal["float32", "float16", "bfloat16"] | None,
    assemble: Literal["segments", "whole"],
    link: Literal["auto", "hard", "copy"],
) -> "Options":
    """The export's options from the command line's. Raises InputError for a count below 1."""
    from btp_export.exporting import Options
    from graphs.records.errors import InputError

    for flag, count in (("--batch", batch), ("--text-tokens", text_tokens), ("--max-new-tokens", max_new_tokens)):
        if count is not None and count < 1:
            raise InputError(f"{flag} {count}", wanted="at least 1", do=f"{flag} 1")
    return Options(
        batch=batch,
        text_tokens=text_tokens,
        new_tokens=max_new_tokens,
        profiles=tuple(profile or ()),
        image_sizes=tuple(parse_image_size(text) for text in image_size or ()),
        opset=opset,
        precision=precision,
        assemble=assemble,
        link=link,
    )


def parse_image_size(text: str) -> tuple[int, int]:
    """ "672x336" -> (672, 336), height and width. Raises InputError for anything else."""
    from graphs.records.errors import InputError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--image-size {text}", wanted="height x width in pixels", do="--image-size 672x672")
    return int(parts[0]), int(parts[1])


def dummy_weights(asked: bool, *, seed: int, layers: int | None) -> "DummyWeights | None":
    """What the three options say together. Raises InputError for the others without the first."""
    from btp_export.model.open_model import DummyWeights
    from graphs.records.errors import InputError

    if not asked and (layers is not None or seed):
        flag = f"--dummy-layers {layers}" if layers is not None else f"--dummy-seed {seed}"
        raise InputError(f"{flag} without --dummy-weights", wanted="both", do="add --dummy-weights")
    return DummyWeights(seed, layers) if asked else None


def open_chosen(model: str, dummy: "DummyWeights | None", system: str | None = None) -> "Model":
    """The model, with a progress bar where dummy weights have to be made, and a word that they are dummies."""
    from btp_export.console import dummy_lines, note, progress
    from btp_export.model.open_model import open_model

    with progress("opening") as bar:
        opened = open_model(model, dummy, system=system, report=bar)
    for line in dummy_lines(opened.source.is_dummy):
        note(line)
    return opened


def calibration_settings(
    *, images: str | None, samples: int, compression: float | None, keep: str | None, seed: int
) -> "CalibrationSettings":
    """The calibration's settings from the command line's. Raises InputError for settings out of range."""
    from btp_export.planning.study import CalibrationSettings, check_settings, parse_keep

    settings = CalibrationSettings(
        images=images,
        samples=samples,
        compression=compression,
        keep=None if keep is None else parse_keep(keep),
        seed=seed,
    )
    check_settings(settings)
    return settings
