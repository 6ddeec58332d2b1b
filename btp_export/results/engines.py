"""`btp-export build`: "btp-build/1"."""

from pathlib import Path
from typing import Literal

from btp_export.results.base import Result
from engines.tensorrt.summaries import BuiltEngines, EngineState, PlannedEngines


class BuildResult(PlannedEngines, Result):
    """What was planned, with estimates; and what was built. After a dry run nothing was: `folder` on is empty."""

    format: Literal["btp-build/1"] = "btp-build/1"
    dry_run: bool
    folder: Path | None = None
    plugin_sha256: str | None = None
    engines: tuple[EngineState, ...] = ()
    unpruned_engines: tuple[EngineState, ...] = ()
    built: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    not_built: str | None = None
    seconds: float | None = None

    @staticmethod
    def of(planned: PlannedEngines, built: BuiltEngines | None = None) -> "BuildResult":
        """The document of a build, or of a dry run where nothing was built."""
        return BuildResult(**dict(planned) | ({} if built is None else dict(built)), dry_run=built is None)
