"""The report's section on engines: what `btp-export profile` measured of this bundle, device by device."""

from collections.abc import Sequence
from typing import Any

from btp_export.drawing.figures import both
from btp_export.profiling.plot import part_bars
from btp_export.profiling.rows import break_even_line, summary_lines
from btp_export.results.profile import Profile


def engine_views(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """For each profile: its drawing, a heading, the main numbers, and what to know of them."""
    return [_view(profile) for profile in profiles]


def _view(profile: Profile) -> dict[str, Any]:
    lines = [*summary_lines(profile), break_even_line(profile)]
    return {
        "chart": both(lambda width: part_bars(profile, width)),
        "heading": (
            f"{profile.title}, TensorRT {profile.tensorrt}, {profile.weights} weights, "
            f"{profile.precision}, batch {profile.batch}, profile {profile.profile}"
        ),
        "summary": " ".join(f"{line[0].upper()}{line[1:]}." for line in lines),
        "facts": [f"{name}: {value}" for name, value in profile.system.items()],
        "notes": list(profile.notes),
    }
