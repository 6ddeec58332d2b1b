"""Writing a report's two files."""

import json
from pathlib import Path

from btp_export.report.data import ReportData, document
from graphs.files.atomic import write_texts


def write_report(folder: Path, data: ReportData) -> None:
    """Write `index.html` and `report.json` into `folder` (a bundle's report/), which is made if it is not there.

    The page needs nothing but itself. The same data gives the same bytes. Both files are complete before the first one
    takes its place, an earlier report's included; what else lies in the folder stays.
    """
    from btp_export.report.page import render

    contents = document(data)
    texts = {
        "report.json": json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "index.html": render(contents, data.pictures),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, texts)
