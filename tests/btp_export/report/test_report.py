"""The report: its numbers are the data's, its text is escaped, and it needs nothing but itself."""

import base64
import io
import json
import re
import resource
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export.report.data import ReportData
from btp_export.report.document import document
from btp_export.report.machine import machine
from btp_export.report.numbers import count, percent, size
from btp_export.report.picture_views import data_uri
from btp_export.report.rows import headlines
from btp_export.report.write import write_report
from btp_export.results.evaluation import WeightsCost
from btp_export.results.verification import GraphParity, Int8Rows

NBSP = "\N{NO-BREAK SPACE}"


class Page(HTMLParser):
    """What a reader gets: texts by section, tables, attributes; and that tags are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "rect", "circle", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("rect", "circle"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The only table row that begins with `name`, blanks made plain."""
        result = [row for row in self.rows if row and row[0].strip() == name]
        assert len(result) == 1, (name, result)
        return [" ".join(cell.split()) for cell in result[0]]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def _written(folder: Path, data: ReportData) -> tuple[Page, str, dict[str, Any]]:
    write_report(folder, data)
    html = (folder / "index.html").read_text(encoding="utf-8")
    return Page(html), html, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_numbers_on_the_page_are_the_datas(data: ReportData, tmp_path: Path) -> None:
    page, _, _ = _written(tmp_path, data)
    assert data.evaluation and data.bench and data.verification
    words = page.words
    assert f"{data.plan.compression * 100:.1f} % fewer image tokens" in _swapped(words)
    for stage in data.plan.stages[:-1]:
        cells = page.row(str(data.plan.stages.index(stage) + 1))
        assert cells[1] == str(stage.layer) and cells[2].startswith(str(stage.keep))
        assert cells[3:7] == [str(n) for n in (stage.attention_quota, stage.pool, stage.diversity_quota, stage.seeds)]
    assert page.row("2, 3, 5, 9")[1:] == ["160, 51, 8, 0", "0.187", "96 %"]
    for row in data.evaluation.rows:
        shown = [r for r in page.rows if r[0] == row.plan and len(r) == 6]
        (cells,) = [r for r in shown if r[1].startswith(f"{row.accuracy * 100:.1f}")]
        assert f"{row.interval[0] * 100:.1f} to {row.interval[1] * 100:.1f}" in cells[1]
        assert f"{row.kept_accuracy * 100:.1f}" in cells[2] and f"{row.flops_ratio * 100:.1f}" in cells[5]
    assert page.row("Vision tower and projector")[1:] == ["21.5", "21.5"]
    assert page.row("Decoder prefill, selection included")[1:] == ["182", "61.9"]
    assert "it reaches 79 % of that limit, and 87 % of 3.40 times, where attention is counted up to" in page.words
    assert page.row("of it: selection of stage 2 before layer 3")[1:] == ["–", "2.42"]
    assert page.row("Prefill operations of the decoder")[1].endswith(" G")
    assert page.row("Key and value cache")[1:] == ["7.67 MB", "2.20 MB", "28.8 %"]
    for graph in data.verification.graphs:
        cells = page.row(graph.name)
        assert float(cells[1]) == pytest.approx(1 - graph.cosine, rel=0.1)
        assert float(cells[2]) == pytest.approx(graph.norm_ratio, abs=1e-7)
        assert float(cells[3]) == pytest.approx(graph.max_abs, rel=0.05)
    assert page.row("stage 3: same tokens kept")[1] == "99.73 %"
    assert page.row("processor")[1] == "Test CPU 3000"


def test_what_each_kind_loses_is_told_and_drawn(data: ReportData, tmp_path: Path) -> None:
    page, _, contents = _written(tmp_path / "a", data)
    rows = [row for row in page.rows if len(row) == 4 and row[0] in ("colour", "count", "is there")]
    assert [row[0] for row in rows] == ["count", "is there", "colour"], "the most moved first"
    assert [" ".join(cell.split()) for cell in rows[0]] == ["count", "0.0621", "85.3 %", "83.7 %"]
    assert (
        "Without pruning: white . Of the calibration’s pictures" in page.words and "0.0214 nats a token" in page.words
    )
    assert page.words.count("Without pruning: the same answer") == 1
    assert contents["pictures"][0]["kind"] == "count" and contents["pictures"][0]["full_answer"] == "white"
    preset = replace(data, plan=data.plan.model_copy(update={"calibration": {}}))
    page, _, _ = _written(tmp_path / "b", preset)
    rows = [row for row in page.rows if row and row[0] == "count"]
    assert [" ".join(cell.split()) for cell in rows[0]] == ["count", "85.3 %", "83.7 %"], "accuracy alone"


def test_headlines_say_where_they_come_from(data: ReportData) -> None:
    shown = {item.name: item for item in headlines(document(data))}
    assert shown["of the accuracy kept"].value == f"{0.937 / 0.953 * 100:.1f}{NBSP}%"
    assert shown["faster prefill"].value == "2.95×"
    assert shown["less key and value cache"].value == f"{(1 - 2204672 / 7667712) * 100:.1f}{NBSP}%"
    assert all(re.match(r"(the plan|eval|bench): ", item.source) for item in shown.values())


def test_accuracy_kept_is_that_of_the_bundles_own_plan(data: ReportData) -> None:
    """Rows of other budgets and of other plans with the same tokens do not count as the bundle's own."""
    assert data.evaluation
    average = data.plan.average_tokens
    rows = [
        row.model_copy(update={"average_tokens": average}) if row.plan == "fastv" else row
        for row in data.evaluation.rows
    ]
    evaluation = data.evaluation.model_copy(update={"samples": 9, "rows": tuple(rows)})
    kept = headlines(document(replace(data, evaluation=evaluation)))[1]
    assert kept.value == f"{0.937 / 0.953 * 100:.1f}{NBSP}%"
    others = tuple(row for row in rows if row.plan not in ("btp", "fastv"))
    evaluation = evaluation.model_copy(update={"rows": others})
    assert headlines(document(replace(data, evaluation=evaluation)))[1].value is None


def test_four_bits_are_told_beside_full_weights_where_they_were_measured(data: ReportData, tmp_path: Path) -> None:
    assert data.evaluation
    page, _, _ = _written(tmp_path / "a", data)
    assert "what four bits cost" not in page.words
    cost = WeightsCost(weights="awq, groups of 32", full=0.953, pruned=0.937, four_bits=0.951, both=0.933)
    evaluation = data.evaluation.model_copy(update={"weights_cost": cost})
    page, _, contents = _written(tmp_path / "b", replace(data, evaluation=evaluation))
    assert "What pruning costs, what four bits cost (awq, groups of 32)" in page.words
    assert page.row("the model’s own")[1:] == ["95.3 %", "93.7 %"]
    assert page.row("four bits")[1:] == ["95.1 %", "93.3 %"]
    assert contents["evaluation"]["weights_cost"]["both"] == 0.933


def test_what_four_bit_weights_were_multiplied_with_is_told(data: ReportData, tmp_path: Path) -> None:
    assert data.verification and data.evaluation and data.bench
    page, _, _ = _written(tmp_path / "a", data)
    assert "int8" not in page.words
    rounding = Int8Rows(logits_cosine=0.99997, answers_equal=0.75)
    packed = replace(
        data,
        verification=data.verification.model_copy(update={"activations": "float32", "int8_rows": rounding}),
        evaluation=data.evaluation.model_copy(update={"activations": "int8"}),
        bench=data.bench.model_copy(update={"activations": "int8"}),
    )
    page, _, _ = _written(tmp_path / "b", packed)
    assert "cosine of the logits 0.99997, 75 % of the answers the same" in page.words
    assert "four-bit weights multiplied with float32 rows, against transformers" in page.row("Verification")[1]
    assert all(page.row(step)[1].endswith("multiplied with int8 rows") for step in ("Evaluation", "Benchmark"))


def test_report_json_holds_what_the_page_shows(data: ReportData, tmp_path: Path) -> None:
    _, _, contents = _written(tmp_path, data)
    assert data.evaluation and data.bench and data.manifest
    assert contents["format"] == "btp-report/1"
    assert contents["tokens_per_layer"]["pruned"] == data.plan.tokens_per_layer()
    assert contents["evaluation"] == data.evaluation.document()
    assert contents["bench"] == data.bench.document()
    assert contents["pictures"][0]["kept"] == [list(stage) for stage in data.pictures[0].kept]
    profile = data.manifest.profiles[0]
    rows = sum(profile.capacity_with(tokens) for tokens in data.plan.tokens_per_layer())
    assert contents["costs"]["cache_bytes"]["pruned"] == 2 * 4 * 32 * 4 * rows, "2 B K D bytes per number and row"


def test_no_path_of_this_machine_gets_in(data: ReportData, tmp_path: Path) -> None:
    assert data.verification and data.evaluation
    record = {**data.plan.calibration, "log": "/home/somebody/verify.log", "out": Path("/home/somebody")}
    hidden = replace(
        data,
        plan=data.plan.model_copy(update={"calibration": record}),
        verification=data.verification.model_copy(update={"failures": ("/home/somebody/weights.safetensors",)}),
        evaluation=data.evaluation.model_copy(update={"source": "/home/somewhere/questions.jsonl"}),
    )
    _written(tmp_path, hidden)
    assert "questions.jsonl" in (tmp_path / "report.json").read_text(encoding="utf-8")
    for name in ("index.html", "report.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "somewhere" not in text and "somebody" not in text and str(tmp_path) not in text


def test_the_same_data_gives_the_same_bytes(data: ReportData, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, data)
    for name in ("index.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hostile_texts_are_shown_and_not_obeyed(data: ReportData, tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script><img src=x onerror=alert(1)>" onload="y'
    picture = replace(data.pictures[0], prompt=hostile, answer=hostile)
    assert data.evaluation and data.verification and data.manifest
    rows = tuple(row.model_copy(update={"plan": row.plan + hostile}) for row in data.evaluation.rows)
    poisoned = replace(
        data,
        pictures=[picture],
        evaluation=data.evaluation.model_copy(update={"rows": rows}),
        verification=data.verification.model_copy(update={"near_ties": (hostile,), "failures": (hostile,)}),
        manifest=data.manifest.model_copy(
            update={"model": data.manifest.model.model_copy(update={"name": hostile, "source": hostile})}
        ),
    )
    page, html, contents = _written(tmp_path, poisoned)
    assert "<script" not in html and not any(tag == "script" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert hostile in page.words
    assert contents["pictures"][0]["prompt"] == hostile


def test_the_page_needs_nothing_but_itself(data: ReportData, tmp_path: Path) -> None:
    page, html, _ = _written(tmp_path, data)
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "poster", "srcset", "action"):
            if tag != "path" and attributes.get(name) is not None:
                assert str(attributes[name]).startswith("data:"), (tag, name)
    assert not re.search(r"url\(|@import|https?://", html)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "report.json"]


def test_pictures_have_texts_and_tables_have_headers(data: ReportData, tmp_path: Path) -> None:
    page, _, _ = _written(tmp_path, data)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == sum(1 + sum(bool(kept) for kept in p.kept) for p in data.pictures)
    assert all(attributes["alt"] for attributes in pictures)
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert charts and all(attributes["aria-label"] and attributes["role"] == "img" for attributes in charts)
    tables = [tag for tag, _ in page.tags if tag in ("table", "caption", "thead")]
    assert tables.count("table") == tables.count("caption") == tables.count("thead") >= 8
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_a_plan_alone_makes_a_report_that_says_how_to_measure_the_rest(data: ReportData, tmp_path: Path) -> None:
    alone = ReportData(plan=data.plan.model_copy(update={"calibration": {}}), machine=None)
    page, _, contents = _written(tmp_path, alone)
    for name in ("calibrate", "eval", "bench", "verify", "run", "report"):
        assert f"btp-export {name}" in page.words
    assert contents["evaluation"] is contents["bench"] is contents["machine"] is contents["calibration"] is None


@pytest.mark.parametrize("part", ["manifest", "verification", "evaluation", "bench", "machine"])
def test_each_part_may_be_missing(data: ReportData, part: str, tmp_path: Path) -> None:
    page, _, _ = _written(tmp_path, replace(data, **{part: None}))
    assert "The plan" in page.words


def test_an_unpruned_bundle_has_a_report(data: ReportData, tmp_path: Path) -> None:
    plan = data.plan.model_copy(update={"stages": (), "calibration": {}})
    assert data.bench and data.evaluation
    bench = data.bench.model_copy(update={"select_ms": ()})
    full = tuple(row for row in data.evaluation.rows if row.plan == "none")
    evaluation = data.evaluation.model_copy(update={"samples": 5, "rows": full})
    page, _, _ = _written(tmp_path, replace(data, plan=plan, bench=bench, evaluation=evaluation, pictures=[]))
    assert "every layer sees all image tokens" in page.words


def test_times_of_a_busy_machine_are_marked(data: ReportData, tmp_path: Path) -> None:
    assert data.bench
    for variation, marked in ((0.05, False), (0.45, True)):
        page, _, _ = _written(tmp_path, replace(data, bench=data.bench.model_copy(update={"variation": variation})))
        assert ("The machine was busy: prefill times varied by 45" in page.words) == marked


def test_failed_verification_cannot_be_overlooked(data: ReportData, tmp_path: Path) -> None:
    assert data.verification
    whole = dict(data.verification.graphs[0]) | {"name": "prefill_0"}
    broken = GraphParity(**whole | {"cosine": float("nan"), "norm_ratio": float("inf"), "max_abs": float("inf")})
    failed = data.verification.model_copy(
        update={"passed": False, "tokens_equal": False, "graphs": (broken,), "failures": ("it is off",)}
    )
    page, _, contents = _written(tmp_path, replace(data, verification=failed))
    assert page.words.count("verification failed") == 2 and "it is off" in page.words
    assert page.row("prefill_0")[1:] == ["not a number"] * 3
    assert contents["verification"]["graphs"][0]["cosine"] is None


def test_a_report_is_replaced_whole_and_other_files_stay(data: ReportData, tmp_path: Path) -> None:
    write_report(tmp_path, replace(data, evaluation=None))
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    largest = len(before["report.json"])
    assert largest < len(before["index.html"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))  # the page does not get that far
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(tmp_path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_report(tmp_path, data)
    assert (tmp_path / "index.html").read_bytes() != before["index.html"]
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


def test_units_of_numbers() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_200_000, 123_456_789_012)] == [
        f"{text}{NBSP}{unit}"
        for text, unit in (("0", "bytes"), ("999", "bytes"), ("1.00", "kB"), ("2.20", "MB"), ("123", "GB"))
    ]
    assert count(649_876_543) == f"650{NBSP}M" and count(12) == "12.0"
    assert percent(None) == "–" and percent(1.0) == f"100.0{NBSP}%"


def test_photographs_are_embedded_small_and_whole() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    for image, kind in ((photo, "jpeg"), (photo.resize((20, 20)), "png")):
        head, _, body = data_uri(image).partition(";base64,")
        assert head == f"data:image/{kind}"
        with Image.open(io.BytesIO(base64.b64decode(body))) as again:
            assert again.size == image.size


def test_the_machine_is_described_without_its_name() -> None:
    import socket

    result = machine()
    assert result.cores >= 1 and result.cpu and "onnxruntime" in result.versions
    assert socket.gethostname() not in result.model_dump_json()


def test_texts_have_contrast_in_both_themes(data: ReportData, tmp_path: Path) -> None:
    """WCAG 2: at least 4.5 for text, 3 for bars and lines."""
    _, html, _ = _written(tmp_path, data)
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", html, re.S)
    )
    for theme in (light, dark):
        for name in ("ink", "muted", "accent", "warm", "bad", "good"):
            assert _contrast(theme[name], theme["paper"]) >= 4.5, name
        assert _contrast(theme["muted"], theme["faint"]) >= 4.5
        assert _contrast(theme["grey-fill"], theme["paper"]) >= 3


def _contrast(one: str, two: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def _swapped(text: str) -> str:
    return re.sub(r"(fewer image tokens) ([\d.]+ %)", r"\2 \1", text.replace(NBSP, " "))
