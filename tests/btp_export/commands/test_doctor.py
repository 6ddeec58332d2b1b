"""`btp-export doctor`: what it says of the machine is what the other commands go by."""

import json
from pathlib import Path

import pytest

from btp_export import cli
from btp_export.commands.doctor import Need, find_package, show
from btp_export.console import emit
from btp_export.results.doctor import Doctor
from engines.tensorrt import installed
from tests.engines import jetson_files


def test_memory_is_what_the_other_commands_go_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit counts, the user's or a container's: tests/graphs/files/test_memory.py holds how they are read."""
    monkeypatch.setenv("BTP_MEMORY_GIB", "0.25")
    assert cli.main(["doctor", "--json"]) == 0
    document = capsys.readouterr().out
    assert json.loads(document)["memory_bytes"] == 2**28
    assert cli.main(["doctor"]) == 0
    assert "256.0 MiB memory available" in capsys.readouterr().out
    emit(Doctor.model_validate_json(document).model_copy(update={"memory_bytes": None}), as_json=False, render=show)
    assert "unknown memory available" in capsys.readouterr().out


def test_a_missing_package_is_named_with_how_to_install_it() -> None:
    package = find_package(Need("no-such-package", "a test", alternatives=("no-such-other",)))
    assert (package.version, package.install) == (None, "pip install no-such-package")
    assert find_package(Need("no-such-package", "a test", alternatives=("numpy",))).package == "numpy"


def test_a_jetson_is_named_with_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jetson_files.write(tmp_path, jetson_files.AGX_ORIN)
    monkeypatch.setenv("BTP_ROOT", str(tmp_path))
    monkeypatch.setattr(installed, "flavour_version", lambda flavour: None)
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["jetson"]["target"] == "jetson-agx-orin-64" and len(document["jetson"]["faults"]) == 2
    (library,) = [entry for entry in document["tensorrt"] if entry["library"] == "TensorRT"]
    assert library["problem"].startswith("10.3.0 is in ") and "--system-site-packages" in library["do"]
    assert cli.main(["doctor"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in ("L4T 36.4.7, CUDA 12.6.11, power mode MODE_30W", "error 12", "#4832", "sudo jetson_clocks"):
        assert text in said
