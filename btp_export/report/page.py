"""The page: report.json's document becomes the values and figures that the template sets."""

from collections.abc import Sequence
from pathlib import Path

from btp_export.drawing.figures import milliseconds, outliers
from btp_export.report import charts, numbers, rows
from btp_export.report.data import Picture
from btp_export.report.engines import engine_views
from btp_export.report.picture_views import picture_view
from btp_export.results.report import ReportDocument

TEMPLATE = "template.html.j2"
BUSY = 0.15  # variation of the prefill times above which a reader is warned, as `btp-export bench` does


def render(document: ReportDocument, pictures: Sequence[Picture]) -> str:
    """The whole HTML page. Deterministic; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": numbers.percent,
        "ms": milliseconds,
        "tokens": numbers.tokens,
        "tiny": numbers.tiny,
    }
    evaluated, tried = rows.evaluation_rows(document), rows.placement_rows(document)
    shown = rows.shown_placements(tried)
    return environment.get_template(TEMPLATE).render(
        d=document,
        title=document.model.name if document.model else document.plan.model_type,
        headlines=rows.headlines(document),
        charts=charts.charts(document),
        stages=rows.stage_rows(document),
        rows=evaluated,
        outliers=outliers(charts.points(evaluated)),
        placements=shown,
        left_out=len(tried) - len(shown),
        named=any(row.get("method") for row in shown),
        kinds=rows.kind_rows(document),
        ruled=any(stage.extends for stage in document.plan.stages),
        latency=rows.latency_rows(document),
        engines=engine_views(document.engines),
        costs=rows.cost_rows(document),
        busy=BUSY,
        verdict=rows.verdict(document),
        pictures=[picture_view(document.plan, picture) for picture in pictures],
        gone=next((stage.layer for stage in document.plan.stages if stage.keep == 0), None),
        spread=charts.spread(document)[0],
        places=rows.places(document),
    )
