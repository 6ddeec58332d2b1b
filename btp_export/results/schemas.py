"""JSON schemas of every document, one file each:  python -m btp_export.results.schemas [docs/schemas]."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from btp_export.results.answers import RunResult
from btp_export.results.base import Result
from btp_export.results.doctor import Doctor, Version
from btp_export.results.engines import BuildResult
from btp_export.results.evaluation import Evaluation
from btp_export.results.job import JobResult
from btp_export.results.plans import ExportResult, Front, PlanSummary, Presets
from btp_export.results.profile import Profile
from btp_export.results.report import ReportDocument, ReportResult
from btp_export.results.serving import Serve
from btp_export.results.timing import Bench
from btp_export.results.verification import FilesVerified, Verification

# What prints or holds each document, in the order of docs/results-format.md.
DOCUMENTS: dict[type[Result], str] = {
    JobResult: "`btp-export --model NAME`",
    ExportResult: "`export`",
    PlanSummary: "`plan`, `calibrate`",
    Presets: "`plan --list`",
    Front: "`calibrate --pareto`, front.json",
    Verification: "`verify`",
    FilesVerified: "`verify --files`",
    RunResult: "`run`",
    Evaluation: "`eval`",
    Bench: "`bench`",
    BuildResult: "`build`",
    Profile: "`profile`, engines/&lt;target&gt;/profile.*.json",
    ReportDocument: "report/report.json",
    ReportResult: "`report`",
    Serve: "`serve`",
    Doctor: "`doctor`",
    Version: "`--version`",
}


def schema_files() -> Iterator[tuple[str, str]]:
    """(file name, contents) of each schema, and of the page that lists them. The same types give the same bytes."""
    for kind in DOCUMENTS:
        # What is printed: a field with a default is in the document too, so it is required there.
        schema = kind.model_json_schema(mode="serialization")
        yield f"{_stem(kind)}.json", json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    yield "README.md", _index()


def _stem(kind: type[Result]) -> str:
    """btp-verify-1; what the command `report` prints is report.json's document and more."""
    name = str(kind.model_fields["format"].default).replace("/", "-")
    return f"{name}-printed" if kind is ReportResult else name


def _index() -> str:
    lines = [
        "# Schemas of results",
        "",
        "What each command prints with `--json`, as JSON schemas. `make schemas` writes them from the types in",
        "`btp_export/results/`, which also read the documents back; a test holds that they are current.",
        "",
        "| printed by, or file | `format` | schema |",
        "|---|---|---|",
    ]
    for kind, where in DOCUMENTS.items():
        name = _stem(kind)
        lines.append(f"| {where} | {kind.model_fields['format'].default} | [{name}.json]({name}.json) |")
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> None:
    """Write them into a folder, docs/schemas unless another is named."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parents[2] / "docs" / "schemas"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schema_files():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
