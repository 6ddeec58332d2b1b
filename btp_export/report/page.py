"""The page: report.json's document becomes the values and figures that the template sets."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from btp_export.drawing import figures
from btp_export.drawing.kept_tokens import draw_stage, fit, panel_size
from btp_export.report.data import Picture
from btp_export.report.engines import engine_views

TEMPLATE = "template.html.j2"
PANEL = 288  # pixels; twice the width at which a phone shows a panel
_PNG_LIMIT = 150_000  # bytes; photographs get larger than that as PNG and are embedded as JPEG
BUSY = 0.15  # variation of the prefill times above which a reader is warned, as `btp-export bench` does
_NBSP = "\N{NO-BREAK SPACE}"
STEPS = ("calibration", "verification", "evaluation", "bench")


@dataclass(frozen=True)
class Headline:
    """One of the main numbers, where it comes from, or the command that measures it."""

    name: str
    value: str | None
    source: str
    command: str = ""


def render(document: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
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
        "percent": percent, "ms": figures.milliseconds, "bytes": size, "tokens": tokens, "tiny": tiny,
    }  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        d=document,
        title=_title(document),
        headlines=headlines(document),
        charts=charts(document),
        stages=stage_rows(document),
        rows=(rows := evaluation_rows(document)),
        outliers=figures.outliers(_points(rows)),
        placements=placement_rows(document),
        latency=latency_rows(document),
        engines=engine_views(document),
        costs=cost_rows(document),
        busy=BUSY,
        verdict=verdict(document),
        pictures=[_picture_view(document, picture) for picture in pictures],
        gone=next((stage["layer"] for stage in document["plan"]["stages"] if stage["keep"] == 0), None),
        spread=_spread(document)[0],
        places=_places(document),
    )


# The numbers


def percent(value: float | None, digits: int = 1) -> str:
    """0.776 -> "77.6 %"; None -> a dash."""
    return "–" if value is None else f"{value * 100:.{digits}f}{_NBSP}%"


def size(count: float) -> str:
    """Bytes with a decimal unit: 12_345_678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f}{_NBSP}{unit}" if unit == "bytes" else f"{f'{count:#.3g}'.rstrip('.')}{_NBSP}{unit}"


def time(value: float) -> str:
    """Milliseconds with the unit."""
    return f"{figures.milliseconds(value)}{_NBSP}ms"


def count(value: float) -> str:
    """A large number with a decimal prefix: 1.23e9 -> "1.23 G"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{f'{value:#.3g}'.rstrip('.')}{_NBSP}{prefix}".rstrip()


def tokens(value: float) -> str:
    """An average token count: 129.0 -> "129", 130.25 -> "130.2"."""
    return f"{value:.1f}".removesuffix(".0")


def tiny(value: float | None) -> str:
    """A small difference: two significant digits; not a number or missing -> said so."""
    if value is None or value != value:
        return "not a number"
    return "0" if value == 0 else f"{value:.1e}"


def headlines(document: Mapping[str, Any]) -> list[Headline]:
    """The four main numbers: compression, accuracy kept, prefill speed-up, cache saved."""
    plan, bench = document["plan"], document["bench"]
    made = [
        Headline(
            "fewer image tokens",
            percent(document["compression"]),
            f"the plan: {tokens(document['average_tokens'])} of {plan['image_tokens']}, "
            f"mean over {plan['num_layers']} layers",
        )
    ]
    own = own_row(document)
    if own:
        source = f"eval: {percent(own['accuracy'])} right, on {_counted(document['evaluation']['samples'], 'question')}"
        made.append(Headline("of the accuracy kept", percent(own["kept_accuracy"]), source))
    else:
        made.append(Headline("of the accuracy kept", None, "not measured", "btp-export eval"))
    if bench:
        times = bench["prefill"]
        source = f"bench: {time(times['full_ms'])} to {time(times['pruned_ms'])}"
        made.append(Headline("faster prefill", f"{times['speedup']:.2f}×", source))
    else:
        made.append(Headline("faster prefill", None, "not measured", "btp-export bench"))
    cache = cache_bytes(document)
    if cache:
        source = f"{'bench' if bench else 'the graphs’ shapes'}: {size(cache['full'])} to {size(cache['pruned'])}"
        made.append(Headline("less key and value cache", percent(1 - cache["pruned"] / cache["full"]), source))
    else:
        made.append(Headline("less key and value cache", None, "not measured", "btp-export bench"))
    return made


def cache_bytes(document: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Cache sizes as `bench` found them, else by arithmetic."""
    found = document["bench"] or document["costs"]
    return found["cache_bytes"] if found else None


def own_row(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The evaluation's row of the bundle's own plan: by name, else the one that has the plan's average tokens."""
    rows = document["evaluation"]["rows"] if document["evaluation"] else []
    same = [row for row in rows if abs(row["average_tokens"] - document["average_tokens"]) < 1e-6]
    named = [row for row in same if row["plan"] == document["plan_name"]]
    if named or len(same) == 1:
        return dict((named or same)[0])
    return None


def stage_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan's stages with their number, what they choose from, the attention on the image, and what they keep of it.

    `mass` is the attention on all image tokens in the layer before the stage, of the model without pruning; `held` the
    share of the stage's own attention that its kept tokens hold, mean over the evaluation's questions.
    """
    rows, before = [], document["plan"]["image_tokens"]
    held = (own_row(document) or {}).get("attention_kept") or [None] * len(document["plan"]["stages"])
    mass = (document["calibration"] or {}).get("attention_mass")
    for number, stage in enumerate(document["plan"]["stages"]):
        layer = stage["layer"]
        seen = mass[layer - 1] if mass and 0 < layer <= len(mass) else None
        rows.append({**stage, "number": number + 1, "before": before, "mass": seen, "held": held[number]})
        before = stage["keep"]
    return rows


def placement_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calibration's placements: first those decided on the most pictures, the nearest first; `own` is the plan's.

    Divergences on different numbers of pictures do not compare: few pictures hold few of the hard ones.
    """
    record = document["calibration"] or {}
    rows = [
        {**one, "own": number == record.get("chosen"), "samples": one.get("samples")}
        for number, one in enumerate(record.get("candidates") or ())
    ]
    return sorted(rows, key=lambda row: (-(row["samples"] or 0), row["divergence"] is None, row["divergence"] or 0.0))


def evaluation_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluation's rows: the unpruned model on top, then the plans at the bundle's own budget (`main`), then those
    at smaller ones, best first in each group.
    """
    if not document["evaluation"]:
        return []
    own = own_row(document)
    least = 0.75 * document["average_tokens"]  # plans at one budget are within a few tokens of each other
    rows = [
        {**row, "own": dict(row) == own, "interval": interval(row), "main": row["average_tokens"] >= least}
        for row in document["evaluation"]["rows"]
    ]
    return sorted(rows, key=lambda row: (row["compression"] > 0, not row["main"], -row["accuracy"], row["plan"]))


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """A row's confidence interval of the accuracy, if it has one."""
    found = row.get("interval") or row.get("accuracy_interval")
    return (float(found[0]), float(found[1])) if found else None


def latency_rows(document: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """What `bench` timed, part by part: (name, milliseconds without pruning, milliseconds with pruning)."""
    bench = document["bench"]
    if not bench:
        return []
    vision, prefill, decode = bench.get("vision_ms"), bench["prefill"], bench["decode"]
    rows = [("Vision tower and projector", vision, vision)] if vision is not None else []
    rows.append(("Decoder prefill, selection included", prefill["full_ms"], prefill["pruned_ms"]))
    for number, value in enumerate(bench["select_ms"]):
        layer = document["plan"]["stages"][number]["layer"]
        rows.append((f"of it: selection of stage {number + 1} before layer {layer}", None, value))
    rows.append(("Decoding, for each token", decode.get("full_ms_per_token"), decode["ms_per_token"]))
    return rows


def cost_rows(document: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """What pruning leaves: (name, without, with, share)."""
    plan = document["plan"]
    full, mean = plan["image_tokens"], document["average_tokens"]
    rows = [("Image tokens, mean over the layers", tokens(full), tokens(mean), mean / full)]
    if document["costs"]:
        needed = document["costs"]["operations"]
        every, left, select = needed["full"], needed["pruned"], needed["selection"]
        rows.append(("Prefill operations of the decoder", count(every), count(left), left / every))
        rows.append(("Operations of the selection", "none", count(select), select / every))
    cache = cache_bytes(document)
    if cache:
        share = cache["pruned"] / cache["full"]
        rows.append(("Key and value cache", size(cache["full"]), size(cache["pruned"]), share))
    return rows


def verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    """Whether verification passed, in words; `state` is passed, failed or unknown."""
    found = document["verification"]
    if not found:
        return {"state": "unknown", "text": "not verified"}
    if not found["passed"]:
        return {"state": "failed", "text": "verification failed"}
    return {"state": "passed", "text": "verified against transformers"}


# Figures and pictures


def charts(document: Mapping[str, Any]) -> dict[str, Markup | None]:
    """The figures by name; None where the data is missing."""
    plan = document["plan"]
    layers = [stage["layer"] for stage in plan["stages"]]
    said = ", ".join(f"{row['keep']} from layer {row['layer']}" for row in plan["stages"]) or "no stage"
    made: dict[str, Markup | None] = {
        **dict.fromkeys(("changed", "dropped", "accuracy", "latency")),
        "tokens": figures.token_steps(
            document["tokens_per_layer"]["pruned"],
            plan["image_tokens"],
            layers,
            title=f"Image tokens that each layer sees: {plan['image_tokens']} at first, {said}.",
        ),
    }
    made |= _calibration_charts(document, layers)
    rows = evaluation_rows(document)
    if rows:
        title = f"Accuracy of {len(rows)} plans against their average image tokens; the table below has the numbers."
        made["accuracy"] = figures.accuracy_plot(_points(rows), plan["image_tokens"], title=title)
    if document["bench"]:
        made["latency"] = _latency_chart(document["bench"])
    return made


def _points(rows: Sequence[Mapping[str, Any]]) -> list[figures.Point]:
    return [
        figures.Point(row["plan"], row["average_tokens"], row["accuracy"], row["interval"], row["own"]) for row in rows
    ]


def _calibration_charts(document: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Markup]:
    record, made = document["calibration"] or {}, {}
    count = document["plan"]["num_layers"]
    if len(record.get("changed_tokens") or ()) == count:
        made["changed"] = figures.layer_bars(
            record["changed_tokens"],
            layers,
            title="Changed image tokens per layer, with the layers before which the plan prunes.",
            unit="image tokens changed",
            ceiling=document["plan"]["image_tokens"],
            spread=_spread(document)[1],
        )
    if len(record.get("drop_divergence") or ()) == count:
        made["dropped"] = figures.layer_bars(
            record["drop_divergence"],
            layers,
            title="Change of the next-token distribution if every image token is dropped before a layer.",
            unit="nats",
        )
    return made


def _spread(document: Mapping[str, Any]) -> tuple[int | None, list[float] | None]:
    """(pictures, bootstrap standard deviation per layer) for the sample size nearest to the calibration's own."""
    record = document["calibration"] or {}
    found = record.get("changed_tokens_spread") or {}
    if not found:
        return None, None
    used = int(record.get("samples") or 64)
    nearest = min(found, key=lambda size: (abs(int(size) - used), int(size)))
    return int(nearest), list(found[nearest])


def _latency_chart(bench: Mapping[str, Any]) -> Markup:
    vision = ("vision", "part-vision", float(bench["vision_ms"])) if bench.get("vision_ms") is not None else None
    head = (vision,) if vision else ()
    select = sum(bench["select_ms"])
    pruned = max(0.0, bench["prefill"]["pruned_ms"] - select)
    decoder, full = "decoder prefill", bench["prefill"]["full_ms"]
    bars = [
        figures.Bar("without pruning", (*head, (decoder, "part-prefill", full))),
        figures.Bar("with pruning", (*head, (decoder, "part-prefill", pruned), ("selection", "part-select", select))),
    ]
    said = " and ".join(f"{figures.milliseconds(bar.total)} ms {bar.name}" for bar in bars)
    return figures.stacked_bars(bars, title=f"Time to the first token: {said}.")


def _picture_view(document: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    stages, total = document["plan"]["stages"], document["plan"]["image_tokens"]
    original = fit(picture.image, picture.grid)
    width, height = panel_size(picture.grid, PANEL)
    sampling = Image.Resampling.NEAREST if original.width * 2 <= width else Image.Resampling.LANCZOS
    clear = data_uri(original.resize((width, height), sampling))
    panels = [_panel(clear, "The picture as the model sees it.", "the picture", f"{total} image tokens")]
    for number, kept in enumerate(picture.kept):
        if not kept:
            continue  # nothing to show: the text beside says from which layer on no token is left
        src = data_uri(draw_stage(picture.image, picture.grid, kept, blocks=picture.blocks, width=PANEL))
        alt = f"The {len(kept)} image tokens that stage {number + 1} keeps; the others are washed out."
        name = f"stage {number + 1} · layer {stages[number]['layer']}"
        panels.append(_panel(src, alt, name, f"{len(kept)} of {total} tokens"))
    wrong = picture.expected is not None and picture.answer.strip().casefold() != picture.expected.strip().casefold()
    return {
        "picture": picture,
        "wrong": wrong,
        "panels": panels,
        "width": width,
        "height": height,
    }


def _panel(src: str, alt: str, *caption: str) -> dict[str, Any]:
    return {"src": src, "alt": alt, "caption": caption}


def data_uri(image: Image.Image) -> str:
    """The picture inside the page: PNG, or JPEG where PNG gets large."""
    for kind, options in (("png", {}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() <= _PNG_LIMIT or kind == "jpeg":
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise AssertionError("the last format is always taken")


# Where it ran


def _places(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran where: (step, what it ran in)."""
    there = {name: document[name] is not None for name in STEPS}
    runner = "the exported graphs in ONNX Runtime"
    rows = []
    if there["calibration"] and "samples" in document["calibration"]:
        rows.append(("Calibration", "the unpruned model in PyTorch, one layer at a time"))
    if there["verification"]:
        rows.append(("Verification", f"{runner}, against transformers’ modelling code in PyTorch"))
    if there["evaluation"]:
        rows.append(("Evaluation", runner))
    if there["bench"]:
        rows.append(("Benchmark", runner))
    if document["pictures"]:
        rows.append(("Pictures", runner))
    return rows


def _title(document: Mapping[str, Any]) -> str:
    return str(document["model"]["name"]) if document["model"] else str(document["plan"]["model_type"])


def _counted(number: int, noun: str) -> str:
    return f"{number}{_NBSP}{noun}{'' if number == 1 else 's'}"
