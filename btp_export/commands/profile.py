"""`btp-export profile`: what each part of a target's engines takes on the device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, note, progress

if TYPE_CHECKING:
    from btp_export.results.profile import Profile, WeightsComparison, WeightsMs

LIMITS = {"compute": "FLOPs", "memory": "bytes"}  # the words of the table; all its columns fit in 80


def command(
    bundle: options.BundleArgument,
    target: options.TargetOption,
    results: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Read the folder profile/ that profile.sh wrote on the device."),
    ] = None,
    profile: options.ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure each engine of a target on the device, and compare it with the device's limits."""
    from btp_export.profiling.profile import profile_engines
    from engines.tensorrt.trtexec import TrtexecError
    from graphs.files.bundle import Bundle

    opened = Bundle.open(bundle)
    try:
        with progress("measuring") as bar:
            result = profile_engines(opened, target, results=results, profile=profile, report=bar)
    except TrtexecError as error:
        for line in error.tail:
            note(f"  {line}")
        raise
    emit(result.model_copy(update={"plot": _plot(result)}), as_json=as_json, render=show)


def _plot(result: "Profile") -> Path:
    """Draw it beside the document."""
    from btp_export.profiling.plot import write_svg

    assert result.file is not None, "profile_engines has written it"
    path = result.file.with_suffix(".svg")
    write_svg(result, path)
    return path


def show(result: "Profile") -> Any:
    """The document of `profile` for the console."""
    from rich.console import Group

    from btp_export.console import table
    from btp_export.profiling.profile import FAR
    from btp_export.profiling.rows import part_rows

    columns = ["part", "limit", "tokens", "GFLOP", "MB", "full ms", "ms", "best", "share"]
    rows = [
        [
            row.name,
            LIMITS.get(row.bound, ""),
            "" if row.tokens is None else str(row.tokens),
            _digits(row.flops / 1e9),
            _digits(row.nbytes / 1e6),
            "" if row.full_ms is None else _digits(row.full_ms),
            _digits(row.ms),
            _digits(row.floor_ms),
            _share(row.share, FAR),
        ]
        for row in part_rows(result)
    ]
    shown = [table(columns, rows, text=2)]
    if result.compare:
        shown.append(_comparison(result.compare))
    return Group(*shown, "\n".join(_lines(result)))


def _digits(value: float) -> str:
    """About three significant digits, in powers of ten only where the value is tiny."""
    if value < 0.001:
        return f"{value:.1g}"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def _share(share: float | None, far: float) -> str:
    """The share of the roofline, marked where it is far from it."""
    return "" if share is None else f"{share:.0%}{' !' if share < far else ''}"


def _comparison(compare: "WeightsComparison") -> Any:
    from btp_export.console import table

    rows = [[part.name, _digits(part.baked_ms), _digits(part.shared_ms), _ratio(part)] for part in compare.parts]
    return table(["part", "baked ms", "shared ms", "shared / baked"], rows)


def _ratio(part: "WeightsMs") -> str:
    return f"{part.shared_ms / part.baked_ms:.2f} x" if part.baked_ms else ""


def _lines(result: "Profile") -> list[str]:
    from btp_export.profiling.rows import break_even_line, layer_line, summary_lines

    lines = [*summary_lines(result), break_even_line(result), *filter(None, [layer_line(result)])]
    if result.compare:
        faster = result.compare.faster
        lines.append(
            f"faster: {faster.first_token} weights for the first token, {faster.decode} for decoding; "
            f"the target takes {result.compare.target_takes}"
        )
    lines += [f"{name}: {value}" for name, value in result.system.items()]
    lines.append(f"TensorRT {result.tensorrt}, {result.weights} weights, {result.precision}, batch {result.batch}")
    lines += [f"note: {text}" for text in result.notes]
    return lines
