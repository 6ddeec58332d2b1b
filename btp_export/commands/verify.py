"""`btp-export verify`: a bundle against transformers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, progress


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="How many generated scenes.")] = 4,
    seed: options.SeedOption = 0,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="Shape profile.  [default: the first]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads.  [default: all cores]")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Check every graph of a bundle, its kept tokens and its text against transformers' own modelling code."""
    from btp_export.verify import verify_bundle
    from graphs.bundle import Bundle

    with progress("verifying") as bar:
        opened = Bundle.open(bundle, check="full")
        result = verify_bundle(opened, samples=samples, seed=seed, profile=profile, threads=threads, report=bar)
    emit(result, as_json=as_json, render=show)
    return 0 if result["passed"] else 1


def show(result: dict[str, Any]) -> Any:
    """The document of `verify` for the console."""
    from rich.console import Group

    from btp_export.console import table

    rows = [
        [graph["name"], f"{graph['cosine']:.12f}", f"{graph['norm_ratio']:.9f}", f"{graph['max_abs']:.3g}"]
        for graph in result["graphs"]
    ]
    kept = ", ".join(f"{share:.4f}" for share in result["kept_agreement"]) or "no stages"
    lines = [
        f"kept tokens equal, by stage: {kept}",
        f"generated tokens equal: {'yes' if result['tokens_equal'] else 'no'} ({result['samples']} samples)",
        *(f"near-tie: {text}" for text in result["near_ties"]),
        *(f"failed: {text}" for text in result["failures"]),
        "verified" if result["passed"] else "NOT verified",
    ]
    return Group(table(["graph", "cosine", "norm ratio", "max abs"], rows), "\n".join(lines))
