"""The report of a bundle: `report/index.html`, one self-contained page, and `report/report.json`, the same as data.

data.py       ReportData, what the other parts measured; collect.py measures it for an existing bundle
document.py   report.json: everything the page shows (btp_export/results/report.py)
page.py       the page: rows.py (tables), charts.py, picture_views.py, engines.py, numbers.py, set by template.html.j2
"""
