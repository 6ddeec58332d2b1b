"""`btp-export verify`: a bundle against transformers."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export import bounds
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, emit, note, progress
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from btp_export.results.verification import FilesVerified, Verification
    from graphs.files.bundle import Bundle


def command(
    bundle: options.BundleArgument,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", help="How many generated scenes."),
        Between(*bounds.VERIFIED_SAMPLES, 4),
    ] = 4,
    seed: options.SeedOption = 0,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", metavar="NAME", help="Shape profile.  [default: all]", autocompletion=complete.profiles
        ),
    ] = None,
    threads: options.ThreadsOption = None,
    target: options.EnginesOption = None,
    no_cuda_graph: options.NoCudaGraphOption = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", help="Generated tokens compared.  [default: 8; 3 for large models]"),
        Between(*bounds.TOKENS, 8),
    ] = None,
    device: options.DeviceOption = "auto",
    maths: options.MathsOption = "float32",
    files: Annotated[
        bool, typer.Option("--files", help="Hash the files of the bundle, and check nothing else.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Check every graph of a bundle, its kept tokens and its text against transformers' own modelling code."""
    from graphs.files.bundle import Bundle

    if files and target is not None:
        raise InputError(f"--files with --target {target}", wanted="one of them", do="leave one out")
    with progress("verifying") as bar:
        opened = Bundle.open(bundle, check="full")
        if files:
            emit(_files(opened), as_json=as_json, render=lambda found: f"{found.files} files are as they were exported")
            return 0
        from btp_export.measuring.verify import verify_profiles

        result = verify_profiles(
            opened,
            samples=samples,
            tokens=tokens,
            seed=seed,
            profile=profile,
            threads=threads,
            device=device,
            maths=maths,
            target=target,
            cuda_graphs=not no_cuda_graph,
            report=bar,
            note=note,
        )
    emit(result, as_json=as_json, render=show)
    return 0 if result.passed else 1


def _files(bundle: "Bundle") -> "FilesVerified":
    from btp_export.results.verification import FilesVerified
    from graphs.files.bundle_checks import listed_files

    sizes = [entry.size for entry in listed_files(bundle.manifest)]
    return FilesVerified(files=len(sizes), bytes=sum(sizes))


def show(result: "Verification") -> Any:
    """The document of `verify` for the console."""
    from rich.console import Group

    from btp_export.console import dummy_lines, table

    several = len(result.profiles) > 1
    rows = [
        [
            f"{graph.name} ({graph.profile})" if several else graph.name,
            _number(graph.cosine, ".12f"),
            _number(graph.norm_ratio, ".9f"),
            _number(graph.max_abs, ".3g"),
        ]
        for graph in result.graphs
    ]
    kept = ", ".join(f"{share:.4f}" for share in result.kept_agreement) or "no stages"
    lines = [
        *dummy_lines(result.dummy_weights),
        f"kept tokens equal, by stage: {kept}",
        f"generated tokens equal: {'yes' if result.tokens_equal else 'no'} "
        f"({result.samples} samples, {result.tokens} tokens)",
        *(f"near-tie: {text}" for text in result.near_ties),
        *_rounding(result),
        *(f"failed: {text}" for text in result.failures),
        "verified" if result.passed else "NOT verified",
    ]
    return Group(table(["graph", "cosine", "norm ratio", "max abs"], rows), "\n".join(lines))


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _rounding(result: "Verification") -> list[str]:
    """What is not part of the check: run, eval and bench round rows to int8 unless told otherwise."""
    rows = result.int8_rows
    if rows is None:
        return []
    return [
        f"verified with float32 rows; with int8 rows, as run takes them: cosine of logits {rows.logits_cosine:.5f}, "
        f"{rows.answers_equal:.0%} of the answers the same"
    ]
