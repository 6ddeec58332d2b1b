"""Every option of every command with values of every sort: an exit code that means something, and no traceback.

Only what is refused, or done at once, is meant: the bundle named on the command line is not there.
"""

import re
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from btp_export import cli
from tests.fuzz.mutations import FUZZ

VALUES = [
    "0", "-1", "1", "1e9", "99999999999999999999", "nan", "inf", "-inf", "", " ", "\u0661", "0x10", "1_0", "1.5", "-0",
    "1e-320", "9" * 5000, "½", "true", "\x1b[31m", "0.5", "1e400", "--", "2,3", ",", "3,2,1", "a,b", "x", "../x", ".",
    "/dev/null", "/proc/self/mem", "no/such/file.json", "a\nb", "\udcff", "é", "cpu", "cuda:9", "0x0", "336x336",
    "demo",
]  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
MAIN: Any = typer.main.get_command(cli.make_app())
# What begins with work of minutes, or waits, without a bundle: options of theirs are tried with a plan that is none.
FIXED = {
    "calibrate": ["--model", "no-such-model"],
    "export": ["--model", "no-such-model", "--out", "out"],
    "plan": ["no-such-plan"],
    "doctor": None,
}


def options_of(command: str) -> list[tuple[str, bool]]:
    """(name, whether it takes a value) of each."""
    result = [(one.opts[0], not getattr(one, "is_flag", False)) for one in MAIN.commands[command].params]
    return [pair for pair in result if pair[0].startswith("--") and pair[0] not in ("--help", "--debug", "--list")]


COMMANDS = [name for name in cli.command_names() if FIXED.get(name, []) is not None]


@pytest.mark.parametrize("command", COMMANDS)
@FUZZ
@given(data=st.data())
def test_any_value(command: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    words = [command, *(FIXED.get(command) or ["no-such-bundle"])]
    for name, takes_value in data.draw(st.lists(st.sampled_from(options_of(command)), min_size=1, max_size=3)):
        words += [name, data.draw(st.sampled_from(VALUES))] if takes_value else [name]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        code, out, err = _run(words)
    assert code in (1, 2, 3), (words, code, out[:500])
    assert "defect" not in err and "Traceback" not in err, (words, err[-2000:])
    assert not CONTROL.search(err) and max(map(len, err.splitlines()), default=0) < 2000, (words, err[-2000:])
    assert not out or "--json" not in words


def _run(words: list[str]) -> tuple[int, str, str]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()
