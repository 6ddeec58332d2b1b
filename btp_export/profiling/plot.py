"""The picture of a profile: one bar a part, pruned under unpruned, with the least time the device could need marked.

The shapes are those of the report (btp_export/drawing/svg.py), so the report's page shows the same drawing in its own
colours; a file of its own carries them with it.
"""

from pathlib import Path

from markupsafe import Markup

from btp_export.drawing.figures import WIDE, milliseconds
from btp_export.drawing.svg import Canvas, Scale, text_width
from btp_export.profiling.rows import part_rows
from btp_export.results.profile import Profile
from graphs.files.atomic import write_text

ROW, BAR, TOP = 34.0, 11.0, 44.0  # pixels: a part's height, a bar's, and above the first
# Of a file of its own; the report's page has rules of the same names.
STYLE = """
svg { background: #fcfbf9; font: 12.5px system-ui, sans-serif; } text { fill: #1d1c1a; } .muted { fill: #5d5951; }
.strong { font-weight: 650; } .full-line { stroke: #5d5951; stroke-width: 1.6; }
.part-vision { fill: #8e887c; } .part-prefill { fill: #0b6b69; } .part-select { fill: #a5490b; }
.part-other { fill: #c4e0dd; }
"""
CSS = {"vision": "part-vision", "select": "part-select"}  # the other parts are the decoder's


def part_bars(profile: Profile, width: int = WIDE) -> Markup:
    """The drawing, for `btp-export profile` and for a section of the report."""
    rows = part_rows(profile)
    canvas = Canvas(width, TOP + ROW * len(rows) + 8)
    names = max((text_width(row.name) for row in rows), default=0.0) + 12
    longest = max((max(row.ms, row.full_ms or 0.0, row.floor_ms) for row in rows), default=0.0) or 1.0
    x = Scale(0, longest, names, width - text_width("0000.0 ms") - 12)
    _legend(canvas, names, full=profile.unpruned is not None)
    for place, row in enumerate(rows):
        top = TOP + ROW * place
        canvas.text(0, top + 2 * BAR - 1, row.name)
        if row.full_ms is not None:
            hint = f"{row.name} without pruning: {milliseconds(row.full_ms)} ms"
            canvas.rect(names, top, x(row.full_ms) - names, BAR, "part-other", hint)
        hint = f"{row.name}: {milliseconds(row.ms)} ms, at best {milliseconds(row.floor_ms)} ms"
        canvas.rect(names, top + BAR, x(row.ms) - names, BAR, CSS.get(row.kind, "part-prefill"), hint)
        canvas.line(x(row.floor_ms), top + BAR - 2, x(row.floor_ms), top + 2 * BAR + 3, "full-line")
        end = max(x(row.ms), x(row.floor_ms), names) + 6
        canvas.text(end, top + 2 * BAR - 1, f"{milliseconds(row.ms)} ms", "label strong")
    return canvas.svg(f"Time of each part on {profile.title}")


def write_svg(profile: Profile, path: Path) -> None:
    """The drawing as a file of its own."""
    head, rest = str(part_bars(profile)).split(">", 1)
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    opened = head.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" ')
    write_text(path, f"{opened}><style>{STYLE}</style>{rest}\n")


def _legend(canvas: Canvas, left: float, *, full: bool) -> None:
    entries = [("vision", "part-vision"), ("decoder", "part-prefill"), ("selection", "part-select")]
    entries += [("without pruning", "part-other")] * full
    for name, css in entries:
        canvas.rect(left, 8, 11, 11, css)
        canvas.text(left + 16, 18, name, "label muted")
        left += 16 + text_width(name) + 18
    canvas.line(left + 5, 6, left + 5, 21, "full-line")
    canvas.text(left + 12, 18, "least possible", "label muted")
