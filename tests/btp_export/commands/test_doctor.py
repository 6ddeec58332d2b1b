"""`btp-export doctor`: what it says of the machine is what the other commands go by."""

import json

import pytest

from btp_export import cli
from btp_export.commands.doctor import Need, find_package, show
from btp_export.console import emit
from btp_export.results.doctor import Doctor


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
