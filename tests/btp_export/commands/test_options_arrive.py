"""Every option of every command reaches what it sets.

Each command runs twice, without and with the option. What it calls outside btp_export/commands and the files it leaves
are watched by the interpreter's trace hook, so nothing is replaced; the two runs must differ. Calls that take a
`report` are long work: the run ends there, once its arguments are seen.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import typer.main
from PIL import Image
from pydantic import BaseModel

from btp_export import cli
from calibrate.place.presets import preset
from graphs.files.bundle import Bundle

ROOT = Path(__file__).parents[3]
COMMANDS = ROOT / "btp_export" / "commands"
COMMAND_FILES = frozenset(map(str, COMMANDS.glob("*.py")))
FRAME = {ROOT / "btp_export" / name for name in ("cli.py", "console.py")}
SHORT = {"open_model", "choose_plan"}  # take a `report`, and are over in a moment on the tiny model
LONG = {"run_job", "collect", "serve_until_stopped"}  # make a progress bar themselves, or have no end

# What `--json` and the others change is what is printed; test_cli and test_console look at that.
PRINTED = {"--json", "--help", "--version", "--debug", "--list", "--install-completion", "--show-completion"}


class Given(NamedTuple):
    """How an option is given, and what else the command needs before it means anything."""

    value: str | None = None
    more: tuple[str, ...] = ()


VALUES = {
    "--model": Given("demo"), "--out": Given("OUT"), "--compression": Given("0.5"), "--keep": Given("20,10,0"),
    "--images": Given("PICTURES"), "--prompts": Given("PROMPTS", ("--images", "PICTURES")), "--samples": Given("3"),
    "--seed": Given("5"), "--batch": Given("2"), "--text-tokens": Given("40"), "--max-new-tokens": Given("3"),
    "--image-size": Given("24x24"), "--opset": Given("18"), "--dummy-layers": Given("2", ("--dummy-weights",)),
    "--activations": Given("float32"),
    "--dummy-seed": Given("2", ("--dummy-weights",)), "--threads": Given("2"), "--device": Given("cuda:1"),
    "--tokens": Given("2"), "--rounds": Given("2"), "--image": Given("PICTURES/red.png"), "--prompt": Given("where ?"),
    "--temperature": Given("0.5"), "--top-p": Given("0.5"), "--show": Given("SHOWN.png"), "--data": Given("DATA"),
    "--plans": Given("none,vtw"), "--tensorrt": Given("10.3.0", ("--dry-run",)),
    "--memory": Given("500", ("--dry-run",)), "--from": Given("PICTURES"),
    "--latency-share": Given("0.5"), "--latency-from": Given("DATA"),
    "--budgets": Given("0.5,0.6", ("--pareto",)), "--stages": Given("1,3"), "--balance": Given("0.1,0.2,0.3"),
    "--drop-bound": Given("0.5"), "--tau": Given("0.5"), "--target": Given("h100"), "--engine": Given("h100"),
    "--profile": Given("other"), "--shape": Given("batch=2"), "--plan": Given("vtw"), "--force": Given(None),
    "--system": Given("look"), "--mix": Given("scenes=1"), "--answer-tokens": Given("3"), "--kind-bound": Given("2"),
    "--weights": Given("int4", ("--target", "h100")), "--no-cuda-graph": Given(None, ("--target", "h100")),
    "--unpruned": Given(None, ("--dry-run",)), "--assemble": Given("whole"), "--plugins": Given("none", ("--dry-run",)),
    "--accumulate": Given("native", ("--dry-run",)),
    "--engine-weights": Given("shared", ("--dry-run",)), "--precision": Given("float16"), "--link": Given("hard"),
    "--importance": Given("mean-text"), "--spatial-metric": Given("manhattan"), "--maths": Given("float16"),
    "--dummy-weights": Given(None, ("--model", "llava-1.5-7b")),
    "--host": Given("127.0.0.2"), "--port": Given("38765"), "--name": Given("mine"), "--max-wait": Given("7"),
    "--queue": Given("7"), "--timeout": Given("7"), "--api-key-file": Given("PROMPTS"), "--allow-host": Given("robot"),
    "--allow-private": Given(None, ("--allow-http",)), "--files": Given("PICTURES"), "--max-picture": Given("7"),
    "--max-pixels": Given("7"), "--ray": Given("local"),
}  # fmt: skip
SPECIAL = {
    ("", "--model"): Given("llava-1.5-7b"),
    ("", "--profile"): Given("batch=2"),
    ("export", "--profile"): Given("batch=2"),
    ("eval", "--compression"): Given("0.5"),
    ("plan", "--model"): Given("MODEL", ("vtw",)),
    ("plan", "--compression"): Given("0.5", ("vtw", "--model", "MODEL")),
    ("plan", "--image-size"): Given("24x24", ("none", "--model", "MODEL")),
    ("plan", "--stages"): Given("1,3,4"),
    ("run", "--seed"): Given("5", ("--temperature", "1")),
    ("run", "--profile"): Given("b1-24x24-t16-n12"),
    ("", "--weights"): Given("int4-g32"), ("export", "--weights"): Given("int4-g32"),
    ("eval", "--full-weights"): Given("BUNDLE"),
}  # fmt: skip
DUMMY = {"--dummy-weights", "--dummy-layers", "--dummy-seed"}  # a model of full size, which is not made here
NOT_HERE = {
    ("run", "--system"),
    ("run", "--raw-prompt"),
    ("run", "--device"),
    ("run", "--target"),
    ("run", "--engine"),
    ("run", "--no-cuda-graph"),
}  # refused here: no GPU, no engines, another prefix
CALIBRATES = {"--keep", "--images", "--mix", "--samples", "--seed"}  # mean nothing with a preset


class Seen(BaseException):
    """The run has come to the long work."""


def plain(value: Any) -> Any:
    """What of an argument can be compared between two runs: values, and of other objects their type."""
    if isinstance(value, str | int | float | bool | Path | None):
        return value
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, BaseModel):
        return plain(dict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
    return type(value).__name__


@functools.cache
def behind_commands(file: str) -> bool:
    """Whether it is the project's, and neither a command nor what prints for them."""
    path = Path(file)
    return ROOT in path.parents and COMMANDS not in path.parents and path not in FRAME


class Watch:
    """The trace hook: every call from a command to what lies behind it. It sees calls alone, so it costs little."""

    def __init__(self, ends: set[str]) -> None:
        self.calls: list[Any] = []
        self._ends = ends

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_back is None or frame.f_back.f_code.co_filename not in COMMAND_FILES:
            return  # and the lines of the function are not traced
        code = frame.f_code
        if not behind_commands(code.co_filename):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if code.co_flags & inspect.CO_VARKEYWORDS:
            names += (code.co_varnames[len(names) + bool(code.co_flags & inspect.CO_VARARGS)],)
        self.calls.append((code.co_name, {name: plain(frame.f_locals[name]) for name in names if name != "self"}))
        if code.co_name in self._ends | LONG or ("report" in names and code.co_name not in SHORT):
            raise Seen


def options_of() -> Iterator[tuple[str, Any]]:
    """(command, option) for all there are; "" is `btp-export` without a command."""
    group: Any = typer.main.get_command(cli.make_app())
    for name, command in {"": group, **group.commands}.items():
        for option in command.params:
            if option.param_type_name == "option" and not PRINTED & set(option.opts):
                yield name, option


OPTIONS = [pytest.param(name, option, id=f"{name or 'main'} {option.opts[0]}") for name, option in options_of()]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Callable[..., Bundle]) -> "Runner":
    plan = tiny_bundle().plan
    size = {"num_layers": plan.num_layers, "image_tokens": plan.image_tokens, "grid": plan.grid, "blocks": ()}
    return Runner(tmp_path_factory, preset("pyramiddrop", model_type=plan.model_type, **size).to_json())


class Runner:
    """Runs command lines, each in a folder of its own with everything that a value above names."""

    def __init__(self, folders: pytest.TempPathFactory, plan: str) -> None:
        self._folders, self._plan = folders, plan
        self._known: dict[tuple[str, ...], Any] = {}

    def without_option(self, arguments: list[str], ends: set[str]) -> Any:
        """The same for many options: run once."""
        key = (*arguments, *ends)
        if key not in self._known:
            self._known[key] = self.run(arguments, ends)
        return self._known[key]

    def run(self, arguments: list[str], ends: set[str]) -> Any:
        """What was called with which arguments, which files there are then, and the exit code."""
        folder = self._folders.mktemp("run")
        (folder / "PICTURES").mkdir()
        Image.new("RGB", (40, 30), "red").save(folder / "PICTURES" / "red.png")
        (folder / "PROMPTS").write_text("what ?\n")
        (folder / "OLD.json").write_text(self._plan)
        (folder / "OLD.png").write_bytes(b"")
        watch, before = Watch(ends), sys.gettrace()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            sys.settrace(watch)
            try:
                code: Any = cli.main(arguments)
            except Seen:
                code = "came to the long work"
            finally:
                sys.settrace(before)
        return (watch.calls, sorted(path.name for path in folder.iterdir())), code


def command_line(command: str, flag: str, model: str, bundle: str) -> list[str]:
    """The command with what it cannot do without, and with what this option goes with."""
    picture = ["--image", "PICTURES/red.png", "--prompt", "<image> what ?" if flag == "--raw-prompt" else "what ?"]
    plan = ["--plan", "btp" if flag in CALIBRATES else "vtw" if flag == "--compression" else "none"]
    needs = {
        "": ["--model", model, *plan], "export": ["--model", model, *plan], "calibrate": ["--model", model],
        "run": [bundle, *picture], "plan": [], "doctor": [],
        "serve": [bundle, "--port", "0"],
        "build": [bundle, "--target", "jetson-orin-jp6"], "profile": [bundle, "--target", "jetson-orin-jp6"],
    }.get(command, [bundle])  # fmt: skip
    if command == "plan" and flag not in ("--model", "--compression", "--image-size"):
        needs = ["OLD.json"]
    if flag == "--force" and command in ("calibrate", "plan"):
        needs += ["--out", "OLD.json"]
    if flag == "--force" and command == "run":
        needs += ["--show", "OLD.png"]
    return [*([command] if command else []), *needs]


def given_in(command: str, option: Any) -> tuple[list[str], Given]:
    """What gives the option, and the table's entry for it."""
    flag = option.opts[0]
    given = SPECIAL.get((command, flag)) or VALUES.get(flag) or Given()
    assert option.is_flag or given.value is not None, f"this test needs a value for {flag} in VALUES"
    if option.is_flag:
        return [option.secondary_opts[0] if option.default is True else flag], given
    return [flag, str(given.value)], given


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_changes_what_it_sets(
    command: str,
    option: Any,
    runner: Runner,
    tiny_checkpoint: Path,
    tiny_bundle: Callable[..., Bundle],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, flag = str(tiny_checkpoint), option.opts[0]
    words, given = given_in(command, option)
    without = [*command_line(command, flag, model, str(tiny_bundle().root)), *given.more]
    named = {"MODEL": model, "BUNDLE": str(tiny_bundle().root)}
    without, words = ([named.get(word, word) for word in part] for part in (without, words))
    ends = {"choose_plan"} if flag in CALIBRATES else {"open_model"} if flag in DUMMY else set()
    if command == "build" and flag != "--force":  # which is not for planning the engines, but for what follows
        ends.add("plan_build")
    seen, _ = runner.without_option(without, ends)
    capsys.readouterr()
    changed, code = runner.run([*without, *words], ends)
    said = capsys.readouterr().err
    if (command, flag) not in NOT_HERE:
        assert code in (0, 1, "came to the long work"), f"{words}: {said}"  # with the option all of it is understood
    assert seen != changed, f"{' '.join(words)} reaches nothing"
