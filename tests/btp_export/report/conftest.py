"""Made-up but plausible report data (test data, measured by nobody), and a headless browser to look at the page."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export.report.data import Picture, ReportData
from btp_export.results.evaluation import EvaluatedPlan, Evaluation
from btp_export.results.report import Machine
from btp_export.results.timing import Bench, CacheBytes, DecodeTimes, Operations, PrefillTimes
from btp_export.results.verification import GateValues, GraphParity, Verification
from calibrate.data.scenes import samples
from graphs.records.manifest import BuildRecord, FileRecord, Manifest, ModelRecord
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec, ModelSpec, VisionSpec
from tests.btp_export.results.examples import verification

GRID = (24, 24)
CHANGED = [0.5, 3.1, 151.0, 325.4, 359.2, 141.0, 136.3, 155.1, 38.0, 45.2, 11.4, 1.2]


@pytest.fixture
def data() -> ReportData:
    """Every part is there."""
    return make_data()


def make_data() -> ReportData:
    plan = PruningPlan(
        model_type="llava",
        num_layers=12,
        image_tokens=576,
        grid=GRID,
        stages=(
            Stage(layer=1, keep=230, attention_quota=138, pool=300, boundary=230, diversity_quota=46, seeds=57),
            Stage(layer=3, keep=92, attention_quota=74, pool=120, boundary=92, diversity_quota=18),
            Stage(layer=6, keep=37, attention_quota=37, pool=44, boundary=37),
            Stage(layer=9, keep=0),
        ),
        calibration=_calibration(),
    )
    return ReportData(
        plan=plan,
        manifest=_manifest(),
        verification=_verification(),
        evaluation=_evaluation(plan),
        bench=_bench(),
        pictures=[_picture(3, "count", "white", 0.0214), _picture(4, "colour")],
        machine=Machine(
            cpu="Test CPU 3000", cores=2, system="Linux x86_64", versions={"python": "3.11.2", "onnx": "1"}
        ),
    )


def _calibration() -> dict[str, Any]:
    return {
        "samples": 64,
        "seed": 0,
        "threshold": {"value": 0.97, "reason": "the model's setting"},
        "changed_tokens": CHANGED,
        "changed_tokens_spread": {
            "16": [c * 0.09 for c in CHANGED],
            "64": [c * 0.045 for c in CHANGED],
            "256": [c * 0.022 for c in CHANGED],
        },
        "attention_mass": [0.61, 0.58, 0.66, 0.71, 0.69, 0.52, 0.44, 0.47, 0.41, 0.38, 0.36, 0.33],
        "drop_divergence": [3.12, 3.05, 2.71, 2.2, 1.61, 0.93, 0.6, 0.31, 0.09, 0.012, 0.004, 0.001],
        "requested_compression": 0.78,
        "candidates": [
            {
                "layers": [1, 3, 6, 9],
                "keep": [230, 92, 37, 0],
                "drop_bound": 0.02,
                "divergence": 0.0312,
                "agreement": 1.0,
            },
            {
                "layers": [2, 3, 5, 9],
                "keep": [160, 51, 8, 0],
                "drop_bound": 0.02,
                "divergence": 0.1871,
                "agreement": 0.958,
            },
        ],
        "chosen": 0,
        "answers": {
            "divergence": 0.0312,
            "interval": [0.021, 0.044],
            "divergence_worst": 0.31,
            "exact": 0.953,
            "kind_bound": 1.0,
            "by_kind": {"colour": 0.0011, "count": 0.0621, "is there": 0.004},
        },
        "notes": ["this is test data"],
    }


def _manifest() -> Manifest:
    decoder = DecoderSpec(
        num_layers=12, hidden_size=128, intermediate_size=384, num_heads=4, num_kv_heads=4, head_dim=32,
        vocab_size=61, rms_norm_eps=1e-5, max_positions=1024,
    )  # fmt: skip
    spec = ModelSpec(
        model_type="llava", name="demo", decoder=decoder, vision=VisionSpec(image_size=(96, 96), grid=GRID),
        prefix_tokens=8, image_token_id=4, eos_token_ids=(2,), pad_token_id=0, weight_dtype="float16",
    )  # fmt: skip
    profile = ShapeProfile(
        name="b1", image_size=(96, 96), grid=GRID, prefix_tokens=8, image_tokens=576, text_tokens=32, new_tokens=8
    )
    return Manifest(
        model=ModelRecord(name="demo", source="demo", config_sha256="0" * 64),
        spec=spec,
        plan=FileRecord(file="plan.json", size=1, sha256="0" * 64),
        build=BuildRecord(opset=23, precision="float32", assemble="segments"),
        profiles=(profile,),
        graphs=(),
        weights=(),
        processor=(),
        tools={"btp-export": "0.1.0", "onnx": "1.23.2"},
    )


def _verification() -> Verification:
    names = [
        "vision",
        *(f"{kind}_{i}" for i in range(4) for kind in ("prefill", "select")),
        "prefill_4",
        "head",
        "decode",
    ]
    gates = {"cosine": 1 - 1e-9, "norm_ratio_within": 1e-4}
    graphs = tuple(
        GraphParity(
            name=name,
            profile="b1",
            cosine=1 - 3e-13 * (n + 1),
            norm_ratio=1 + 2.5e-7 * n,
            max_abs=7.2e-7 * (n + 1),
            worst="hidden_out of sample 0",
            gates=GateValues(**gates),
        )
        for n, name in enumerate(names)
    )
    return verification(
        graphs=graphs,
        kept_agreement=(1.0, 1.0, 0.9973, 1.0),
        samples=4,
        tokens=8,
        near_ties=("select_2, sample 5: 1 of 37 kept tokens differ; test data",),
    )


def _evaluation(plan: PruningPlan) -> Evaluation:
    average = plan.average_tokens
    collected = {
        "none": (576.0, 0.953), "btp": (average, 0.937), "btp-paper": (128.9, 0.921), "fastv": (average - 0.4, 0.912),
        "pyramiddrop": (average - 0.1, 0.918), "divprune": (average - 0.2, 0.905), "random": (average - 0.2, 0.811),
        "vtw": (96.0, 0.352),
    }  # fmt: skip
    rows = [
        {
            "plan": name, "average_tokens": tokens, "compression": 1 - tokens / 576, "accuracy": accuracy,
            "kept_accuracy": accuracy / 0.953, "flops_ratio": 0.07 + 0.93 * tokens / 576,
            "interval": [accuracy - 0.028, min(1.0, accuracy + 0.022)],
            "attention_kept": [0.81, 0.74, 0.92, None] if name == "btp" else [None] * 4,
            "kinds": {"colour": accuracy, "is there": accuracy + 0.02, "count": accuracy - 0.1},
        }
        for name, tokens, accuracy in [
            *[(name, *values) for name, values in collected.items()],
            *[(name, values[0] / 2, values[1] - 0.06) for name, values in collected.items() if name != "none"],
        ]
    ]  # fmt: skip
    return Evaluation(
        samples=200,
        source="generated test scenes",
        full_accuracy=0.953,
        rows=tuple(EvaluatedPlan.model_validate(row) for row in rows),
    )


def _bench() -> Bench:
    return Bench(
        vision_ms=21.46,
        prefill=PrefillTimes(
            full_ms=182.4, pruned_ms=61.9, speedup=2.9467, flops_limit=3.712, causal_limit=3.4, share_of_limit=0.7938
        ),
        select_ms=(6.31, 2.42, 1.07, 0.02),
        decode=DecodeTimes(ms_per_token=3.275, full_ms_per_token=5.918, speedup=1.807),
        flops=Operations(full=2_412_345_678, pruned=649_876_543, selection=12_345_678),
        cache_bytes=CacheBytes(full=7667712, pruned=2204672),
        variation=0.02,
        profile="b1",
        batch=1,
        precision="float32",
        rounds=5,
        threads=None,
        device="cpu",
        engine=None,
        dummy_weights=False,
    )


def _picture(seed: int, kind: str, full_answer: str | None = None, divergence: float | None = None) -> Picture:
    scene = samples(1, seed=seed, split="calibration")[0]
    cells = np.asarray(scene.image.resize(GRID, Image.Resampling.BOX), dtype=float)
    order = np.argsort(-(cells.max(-1) - cells.min(-1)).ravel(), kind="stable")
    rest = np.random.default_rng(seed).permutation(order[150:])[:80]
    first = sorted(int(i) for i in [*order[:150], *rest])
    kept = [first, sorted(int(i) for i in order[:92]), sorted(int(i) for i in order[:37]), []]
    return Picture(
        image=scene.image, prompt=scene.question, answer=scene.answer, grid=GRID, kept=kept, kind=kind,
        full_answer=full_answer or scene.answer, divergence=divergence,
    )  # fmt: skip


class Browser:
    """A headless Chromium spoken to over its debugging pipe, as the DevTools protocol has it."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --remote-debugging-pipe"
        )
        shell = f'exec "$0" {flags} "--user-data-dir=$1" about:blank 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, str(profile)],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ids, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def open(self, url: str, *, width: int, dark: bool) -> None:
        """Load a page at a width and in a theme; `events` then holds what happened."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """Console errors, exceptions and log entries since `open`."""
        collected = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                collected.append(str(params["exceptionDetails"]["text"]))
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                collected.append(str(params["args"]))
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                collected.append(str(params["entry"]["text"]))
        return collected

    def requests(self) -> list[str]:
        """Addresses asked for since `open`."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [str(event["params"]["request"]["url"]) for event in sent]

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=20)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, if it is installed."""
    result = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not result:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the page was not looked at in a browser")
    chromium = Browser(result[0], tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()
