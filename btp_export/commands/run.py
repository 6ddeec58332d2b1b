"""`btp-export run`: ask a bundle about a picture."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from btp_export import bounds, extras
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, dummy_lines, emit, note, stream

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from btp_export.results.answers import RunResult
    from btp_export.running.runtime import BundleModel, Generation
    from graphs.records.stored_weights import Activations


@dataclass(frozen=True)
class AnswerOptions:
    """How tokens are chosen, and how many."""

    heading: ClassVar[str] = "Answers"
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", help="Most tokens to generate.  [default: the profile's]"),
        Between(*bounds.TOKENS, 8),
    ] = None
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="X", help="Above 0: sample; 0: take the most probable token."),
        Between(0, 100, 0.7),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="X", help="Sample from the likeliest tokens that make up this probability."),
        Between(0, 1, 0.9),
    ] = 1.0
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of the sampling."), Between(*bounds.SEEDS, 0)
    ] = 0


@dataclass(frozen=True)
class DrawingOptions:
    """A picture of the tokens that are kept."""

    heading: ClassVar[str] = "Kept tokens"
    show: Annotated[
        Path | None, typer.Option("--show", metavar="PNG", help="Draw the image tokens that each stage keeps.")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --show.")] = False


EXTRA = extras.CPU  # what is named where a library is missing


def command(
    bundle: options.BundleArgument,
    image: Annotated[list[Path], typer.Option("--image", metavar="FILE", help="A picture; repeat for several.")],
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="A question; repeat for several.")],
    sampling: AnswerOptions,
    drawing: DrawingOptions,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            help="Shape profile.  [default: the first the picture fits]",
            autocompletion=complete.profiles,
        ),
    ] = None,
    raw_prompt: Annotated[
        bool, typer.Option("--raw-prompt", help="--prompt is the whole text, image placeholder included.")
    ] = False,
    system: options.SystemOption = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Scale pictures that do not fit the profile's size.")
    ] = False,
    threads: options.ThreadsOption = None,
    activations: options.ActivationsOption = "int8",
    device: options.DeviceOption = "cpu",
    target: options.EnginesOption = None,
    no_cuda_graph: options.NoCudaGraphOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about a picture; text is printed as it is generated."""
    from btp_export.model.pictures import fitted, profile_for
    from btp_export.model.prompting import Prompter
    from btp_export.running.opening import activations_in
    from btp_export.running.runtime import load, paired, room_in
    from btp_export.running.sampling import Sampling
    from graphs.files.bundle import Bundle
    from graphs.files.pictures import open_picture

    pictures = [open_picture(path) for path in image]
    if drawing.show is not None:
        _check_show(drawing.show, max(len(pictures), len(prompt)), force=drawing.force)
    opened = Bundle.open(bundle)
    # Before anything is loaded: what no graph takes is refused, and the rest is what the model sees.
    profiles = opened.manifest.profiles if profile is None else [opened.profile(profile)]
    chosen = profile_for(pictures, opened.spec, profiles, resize=resize)
    pictures, _ = fitted(pictures, opened.spec, chosen)
    chosen_by = Sampling(sampling.temperature, sampling.top_p, sampling.seed)
    room = room_in(chosen, sampling.max_new_tokens)
    prompter = Prompter(opened.processor, opened.spec)
    encoded = prompter.encode(*paired(pictures, prompt), raw=raw_prompt, system=system, profile=chosen)
    model = load(
        opened,
        profile=chosen.name,
        threads=threads,
        device=device,
        target=target,
        activations=activations,
        cuda_graphs=not no_cuda_graph,
        note=note,
    )
    model.prompter = prompter
    live = not as_json and len(pictures) == len(prompt) == 1
    on_text = (lambda sample, piece: stream(piece)) if live else None
    answers = model.answer(encoded, room=room, chosen_by=chosen_by, on_text=on_text)
    if live:
        stream("\n")
    _note_unknown_words(prompt, answers)
    if drawing.show is not None:
        _draw(model, pictures[0], answers[0], drawing.show)
    dummy, ran = model.bundle.manifest.model.dummy_weights, activations_in(opened, activations, target)
    _print(_document(answers, dummy_weights=dummy, activations=ran), answers, live=live, as_json=as_json)


def _note_unknown_words(prompt: list[str], answers: "list[Generation]") -> None:
    questions = prompt if len(prompt) == len(answers) else prompt * len(answers)
    for question, answer in zip(questions, answers, strict=True):
        if answer.unknown_tokens:
            note(f"note: {answer.unknown_tokens} words of {question!r} are not in the model's vocabulary")


def _print(document: "RunResult", answers: "list[Generation]", *, live: bool, as_json: bool) -> None:
    """The document or the texts, unless they are there already (`live`); then times and kept tokens."""
    render = None if live else lambda _: "\n".join(answer.text for answer in answers)
    emit(document, as_json=as_json, render=render)
    if not as_json:
        note(_summary(answers[0]))
        if document.activations is not None:
            note(f"four-bit weights, multiplied with {document.activations} rows")
        for line in dummy_lines(document.dummy_weights):
            note(line)


def _check_show(path: Path, samples: int, *, force: bool) -> None:
    """Refuse before the long work what would fail after it."""
    from PIL import Image

    from graphs.files.atomic import check_writable
    from graphs.records.errors import InputError

    if samples != 1:
        raise InputError(
            f"--show with {samples} samples", wanted="one picture and one prompt", do="run them one by one"
        )
    kind = Image.registered_extensions().get(path.suffix.lower())  # also of formats that are only read
    if kind not in Image.SAVE:
        raise InputError(f"--show {path}", wanted="a file name that ends in .png", do="--show kept.png")
    _encoded(Image.new("RGB", (1, 1)), path)
    if not path.absolute().parent.is_dir():
        raise InputError(f"no folder {path.parent}", wanted="a folder that exists", do=f"mkdir -p {path.parent}")
    check_writable(path.absolute().parent, do="give another file name")
    if path.is_dir() or (os.path.lexists(path) and not force):
        do = "give another file name" + ("" if path.is_dir() else ", or --force")
        raise InputError(f"--show {path} already exists", wanted="a new file", do=do)


def _encoded(picture: "Picture", path: Path) -> bytes:
    """The picture as a file of the kind that the name says, in memory: nothing is written that fails halfway."""
    from PIL import Image

    from graphs.records.errors import InputError

    stream = io.BytesIO()
    try:
        picture.save(stream, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--show {path}: {error}", wanted="a file name that ends in .png", do="--show kept.png"
        ) from error
    return stream.getvalue()


def _draw(model: "BundleModel", picture: Any, answer: "Generation", path: Path) -> None:
    from btp_export.drawing.kept_tokens import draw_kept
    from graphs.files.atomic import write_bytes

    stages = [indices.tolist() for indices in answer.kept]
    layers = [stage.layer for stage in model.plan.stages]
    plan = model.plan
    drawn = draw_kept(picture, plan.grid, stages, layers=layers, total=plan.image_tokens, blocks=plan.blocks)
    write_bytes(path, _encoded(drawn, path))
    note(f"picture of the kept tokens written to {path}")


def _document(answers: "list[Generation]", *, dummy_weights: bool, activations: "Activations | None") -> "RunResult":
    from btp_export.results.answers import Answer, RunResult

    documents = tuple(
        Answer(
            text=answer.text,
            tokens_kept=answer.tokens_kept,
            prefill_ms=answer.prefill_ms,
            decode_ms_per_token=answer.decode_ms_per_token,
            select_ms=answer.select_ms,
            vision_ms=answer.vision_ms,
            token_ids=answer.token_ids,
            kept=tuple(tuple(indices.tolist()) for indices in answer.kept),
        )
        for answer in answers
    )
    return RunResult(**dict(documents[0]), answers=documents, dummy_weights=dummy_weights, activations=activations)


def _summary(answer: "Generation") -> str:
    parts = [f"prefill {answer.prefill_ms:.0f} ms"]
    if answer.vision_ms is not None:
        parts.insert(0, f"vision {answer.vision_ms:.0f} ms")
    if answer.decode_ms_per_token is not None:
        parts.append(f"{answer.decode_ms_per_token:.1f} ms for each further token")
    if answer.tokens_kept:
        parts.append(f"image tokens kept: {', '.join(map(str, answer.tokens_kept))}")
    return "; ".join(parts)
