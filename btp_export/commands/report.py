"""`btp-export report`: make the report of an existing bundle, or make it again."""

from typing import TYPE_CHECKING, Annotated

import typer

from btp_export import bounds
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, emit, progress

if TYPE_CHECKING:
    from btp_export.results.report import ReportResult


def command(
    bundle: options.BundleArgument,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", help="How many held-out questions."),
        Between(*bounds.QUESTIONS, 100),
    ] = 100,
    seed: options.SeedOption = 0,
    data: options.DataOption = None,
    threads: options.ThreadsOption = None,
    as_json: JsonOption = False,
) -> int:
    """Verify, evaluate and time a bundle, and write report/index.html and report/report.json into it."""
    from btp_export.report.collect import Settings, collect
    from btp_export.report.write import write_report
    from btp_export.results.report import ReportResult
    from graphs.files.atomic import check_writable
    from graphs.files.bundle import Bundle

    opened = Bundle.open(bundle, check="full")
    folder = opened.root / "report"
    check_writable(folder, do="copy the bundle to where you can write")
    measured = collect(opened, Settings(samples, seed, data, threads), progress)
    contents = write_report(folder, measured)
    passed = contents.verification is not None and contents.verification.passed
    result = ReportResult(**dict(contents), report=folder / "index.html", passed=passed)
    emit(result, as_json=as_json, render=show)
    return 0 if passed else 1


def show(result: "ReportResult") -> str:
    """Where the report is, and whether verification held."""
    state = "verified" if result.passed else "NOT verified"
    return f"{result.report}\n{state}; {result.compression:.1%} fewer image tokens, mean over the layers"
