"""The report of a bundle: `report/index.html`, one self-contained page, and `report/report.json`, the same as data.

data.py       ReportData, what the other parts measured; collect.py measures it for an existing bundle
document.py   report.json: everything the page shows (btp_export/results/report.py)
page.py       the page: rows.py (tables), charts.py, picture_views.py, engines.py, numbers.py, set by template.html.j2
"""

from btp_export.drawing.kept_tokens import draw_kept
from btp_export.report.data import Picture, ReportData
from btp_export.report.machine import machine
from btp_export.report.write import write_report
from btp_export.results.report import Machine

__all__ = ["Machine", "Picture", "ReportData", "draw_kept", "machine", "write_report"]
