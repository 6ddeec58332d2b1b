"""docs/jetson.md: the afternoon with an Orin, run with stand-ins; what the page says they print, they print.

A block of the page that begins with the comment `<!-- stand-in NAME -->` is what step NAME prints here. Numbers and
paths are not compared, and the page may leave lines out.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export.cli import main
from engines.native import libraries
from graphs.records.plan import Stage
from tests.engines import jetson_files
from tests.engines.tensorrt.jetson_device import Device, prepare
from tests.engines.tensorrt.run.engine_folders import TARGET
from tests.plans import tiny_plan

PAGE = Path(__file__).parents[1] / "docs" / "jetson.md"
BLOCK = re.compile(r"<!-- stand-in (\S+) -->\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
STAGES = (Stage(layer=2, keep=18, attention_quota=6, pool=24, boundary=18, diversity_quota=6, seeds=9),)
TIMES = {"vision": 91.0, "prefill_0": 96.0, "select_0": 0.9, "prefill_1": 91.0}
TIMES |= {"head": 1.3, "decode": 68.0}


@pytest.fixture(scope="module")
def prepared(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tiny_bundle(tiny_plan(*STAGES)), tmp_path_factory.mktemp("host") / "bundle")


def steps(device: Device, folder: Path, picture: Path, capture: Any) -> dict[str, str]:
    """What each step of the page prints, in the page's order; on a terminal of 100 columns."""
    said: dict[str, str] = {}

    def command(name: str, *arguments: str, code: int = 0) -> None:
        assert main([arguments[0], *arguments[1:]]) == code
        captured = capture.readouterr()
        said[name] = captured.out + captured.err

    bundle, target = str(device.root), ("--target", TARGET)
    asked = ("--image", str(picture), "--prompt", "what color is it ?")
    command("doctor", "doctor")
    said["build.sh"] = device.script("build.sh")
    command("too-early", "run", bundle, *asked, *target, code=2)
    command("build", "build", bundle, *target, "--plugins", "none")
    command("run", "run", bundle, *asked, *target)
    command("verify", "verify", bundle, *target, "--samples", "1")
    said["profile.sh"] = device.script("profile.sh")
    command("profile", "profile", bundle, *target)
    command("report", "report", bundle, "--samples", "8")
    return said


def test_the_page_shows_what_the_stand_ins_print(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, pictures: list[Image.Image]
) -> None:
    device = Device(prepared, tmp_path, monkeypatch, capsys)
    jetson_files.write(tmp_path / "root", jetson_files.AGX_ORIN)
    monkeypatch.setenv("BTP_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "none").mkdir()
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path / "none"))  # what was compiled here is not for an Orin
    device.plan_times({f"{name}.engine": ms for name, ms in TIMES.items()})
    device.check_here(monkeypatch)
    picture = tmp_path / "a.png"
    pictures[0].save(picture)
    capsys.readouterr()
    said = steps(device, tmp_path, picture, capsys)
    blocks = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    assert blocks.keys() <= said.keys() and len(blocks) >= 6
    for name, block in blocks.items():
        printed = [plain(line) for line in said[name].splitlines()]
        for line in map(plain, block.splitlines()):
            assert not line or line == "..." or line in printed, f"{name}: {line!r} is not in\n{said[name]}"


def plain(line: str) -> str:
    """A line without its numbers, paths and columns."""
    line = line.replace("─", "")
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", re.sub(r"\S*/\S*", "PATH", line))).strip()
