"""The report of a bundle: `report/index.html`, one self-contained page, and `report/report.json`, the same as data.

    ReportData (what the other parts measured) -> document (JSON) -> page (view) -> template.html.j2 with inline SVG

`write_report` only writes what it is given; `btp_export.commands.report` does the measuring for an existing bundle.
"""

from btp_export.drawing.kept_tokens import draw_kept
from btp_export.report.data import Machine, Picture, ReportData, machine
from btp_export.report.write import write_report

__all__ = ["Machine", "Picture", "ReportData", "draw_kept", "machine", "write_report"]
