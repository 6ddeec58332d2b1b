"""`btp-export bench`: time and memory, pruned beside unpruned."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export import bounds
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, dummy_lines, emit, note, progress, table

if TYPE_CHECKING:
    from btp_export.results.timing import Bench, PrefillTimes

BUSY = 0.15  # variation above which a reader is warned


def command(
    bundle: options.BundleArgument,
    rounds: Annotated[
        int,
        typer.Option("--rounds", metavar="N", help="Runs of each model; medians are shown."),
        Between(*bounds.ROUNDS, 10),
    ] = 10,
    profile: options.ProfileOption = None,
    threads: options.ThreadsOption = None,
    activations: options.ActivationsOption = "int8",
    device: options.DeviceOption = "cpu",
    target: options.EnginesOption = None,
    no_cuda_graph: options.NoCudaGraphOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill, selection, decoding and caches, and compare with the same model without pruning."""
    from btp_export.measuring.bench import measure
    from graphs.files.bundle import Bundle

    opened = Bundle.open(bundle)
    with progress("measuring") as bar:
        result = measure(
            opened,
            profile=profile,
            threads=threads,
            device=device,
            target=target,
            activations=activations,
            cuda_graphs=not no_cuda_graph,
            rounds=rounds,
            report=bar,
            note=note,
        )
    emit(result, as_json=as_json, render=show)


def show(result: "Bench") -> Any:
    """The document of `bench` for the console."""
    from rich.console import Group

    prefill, decode, cache = result.prefill, result.decode, result.cache_bytes
    rows = [
        ["prefill (selection included)", *_times(prefill.full_ms, prefill.pruned_ms, prefill.speedup_interval)],
        ["decode, each token", *_times(decode.full_ms_per_token, decode.ms_per_token, decode.speedup_interval)],
        ["key and value caches", *_pair(cache.full / 2**20, cache.pruned / 2**20, "MiB")],
        ["vision", f"{result.vision_ms:.2f} ms", "the same", ""],
    ]
    selects = ", ".join(f"{value:.2f}" for value in result.select_ms) or "none"
    lines = [
        *dummy_lines(result.dummy_weights),
        f"selection, by stage: {selects} ms",
        f"the FLOPs saved allow a prefill {prefill.flops_limit:.2f} x as fast" + _reached(prefill),
        f"medians of {result.rounds} alternating runs, batch {result.batch}, profile {result.profile}",
    ]
    if result.activations is not None:
        lines.append(f"four-bit weights, multiplied with {result.activations} rows")
    if prefill.speedup_interval is None:
        lines.append("so few runs tell no difference from chance; --rounds 10")
    if result.variation > BUSY:
        lines.append(f"the machine is busy: prefill times vary by {result.variation:.0%}; repeat when it is idle")
    return Group(table(["", "full", "pruned", "ratio"], rows), "\n".join(lines))


def _pair(full: float, pruned: float, unit: str) -> tuple[str, str, str]:
    return f"{full:.2f} {unit}", f"{pruned:.2f} {unit}", f"{full / pruned:.2f} x"


def _times(full: float, pruned: float, interval: tuple[float, float] | None) -> tuple[str, str, str]:
    """Two times, and what the rounds tell of their ratio."""
    *columns, ratio = _pair(full, pruned, "ms")
    if interval is not None:
        ratio = "no difference" if _is_noise(interval) else f"{ratio} ({interval[0]:.2f} to {interval[1]:.2f})"
    return columns[0], columns[1], ratio


def _is_noise(interval: tuple[float, float]) -> bool:
    return interval[0] <= 1 <= interval[1]


def _reached(prefill: "PrefillTimes") -> str:
    if prefill.speedup_interval is not None and _is_noise(prefill.speedup_interval):
        return "; the two are not told apart"
    reached = f"; {prefill.share_of_limit:.0%} of that is reached"
    share = prefill.share_of_causal_limit
    if share is None:
        return reached
    return f"{reached}, {share:.0%} of the {prefill.causal_limit:.2f} x with attention up to its diagonal"
