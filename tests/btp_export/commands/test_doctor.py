"""`btp-export doctor`: what it says of the machine is what the other commands go by."""

import json

import pytest

from btp_export import cli


@pytest.mark.parametrize("there", [3 * 2**30, None])
def test_memory_is_what_the_other_commands_go_by(
    there: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's limit counts: tests/graphs/files/test_memory.py holds how it is read."""
    monkeypatch.setattr("graphs.files.memory.available_memory", lambda: there)
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] == there
    assert cli.main(["doctor"]) == 0
    assert ("unknown" if there is None else "3.0 GiB") + " memory available" in capsys.readouterr().out
