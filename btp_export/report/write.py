"""Writing a report's two files."""

from pathlib import Path

from btp_export.report.data import ReportData
from btp_export.report.document import document
from btp_export.results.report import ReportDocument
from graphs.files.atomic import write_texts


def write_report(folder: Path, data: ReportData) -> ReportDocument:
    """Write `index.html` and `report.json` into `folder` (a bundle's report/), which is made if it is not there.

    The page needs nothing but itself. The same data gives the same bytes. Both files are complete before the first one
    takes its place, an earlier report's included; what else lies in the folder stays. Gives report.json's document.
    """
    from btp_export.report.page import render

    contents = document(data)
    texts = {
        "report.json": contents.to_json(),
        "index.html": render(contents, data.pictures),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, texts)
    return contents
