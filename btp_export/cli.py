"""The command line: finds the command modules, and turns errors, Ctrl-C and closed pipes into messages and exit codes.

Exit codes: 0 done; 1 a check did not hold (or a defect of the toolkit); 2 bad input or usage; 3 something needed is
not installed or not reachable; 130 interrupted (Ctrl-C, SIGTERM, SIGHUP).
"""

import contextlib
import errno
import functools
import gc
import importlib
import os
import pkgutil
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

import typer

from btp_export import commands, console, extras
from btp_export.commands._groups import GroupedCommand, GroupedCommands, as_command
from graphs.records.errors import BtpError, shortened

ORDER = (
    "calibrate", "export", "verify", "run", "eval", "bench", "serve", "build", "profile", "plan", "report", "doctor",
)  # fmt: skip
OURS = ("btp_export", "calibrate", "engines", "graphs")
NO_MEMORY = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "bad_alloc", "Failed to allocate memory")
USAGE = {
    "Input should be a valid integer, unable to parse string as an integer": "it takes a whole number",
    "Input should be a valid number, unable to parse string as a number": "it takes a number",
    "Value error, ": "",
}
INTERRUPTED = 130  # as shells report a process that SIGINT ended: 128 + 2
PIPE_CLOSED = 141  # the same of SIGPIPE, 13


def make_app(only: str | None = None) -> typer.Typer:
    """The typer application: one command for each module in btp_export/commands, `main` for no command.

    With `only` that command alone, which is quicker.
    """
    app = typer.Typer(
        name="btp-export",
        cls=GroupedCommands,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    for name in command_names() if only is None else [only]:
        module = _module(name)
        command = as_command(module.command, console.stdout_for_results, getattr(module, "EXTRA", extras.EXPORT))
        app.command(name, cls=GroupedCommand, short_help=_first_sentence(command.__doc__))(command)
    app.callback(invoke_without_command=True)(as_command(_module("main").command, console.stdout_for_results))
    return app


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name}")


def _program(only: str | None) -> Any:
    """What typer runs, for all commands or `only` one. A process that calls `main` often builds it once."""
    names = command_names() if only is None else [only]
    return _built(only, tuple((name, _module(name).command) for name in [*names, "main"]))


@functools.cache
def _built(only: str | None, functions: tuple[tuple[str, Any], ...]) -> Any:
    """The same, by all that it is built from: commands come and go where a process changes them."""
    return typer.main.get_command(make_app(only))


def _first_sentence(text: str | None) -> str:
    """What the list of commands shows: up to the first full stop or colon."""
    return re.split(r"[.:](?:\s|$)", " ".join((text or "").split()), maxsplit=1)[0]


def command_names() -> list[str]:
    """Names of the command modules, in the order of the help page; new ones come last."""
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    names = {name for name in modules if not name.startswith("_")} - {"main"}
    return [name for name in ORDER if name in names] + sorted(names - set(ORDER))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = _wants_debug(words)
    _occupy_standard_descriptors()
    if "_BTP_EXPORT_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "1000"  # typer wraps the descriptions that it gives to zsh
    _set_up_libraries(debug)
    with _signals_interrupt() as interrupted:
        return _run(words, debug, interrupted)


def _wants_debug(words: Sequence[str]) -> bool:
    """Whether `--debug` stands there by itself, and not as the value of an option such as --prompt.

    Every command takes it; it is needed before the command line is understood.
    """
    places = [at for at, word in enumerate(words) if word == "--debug"]
    if not places:
        return False
    main_command = _program(None)
    parameters = [
        *main_command.params,
        *(each for command in main_command.commands.values() for each in command.params),
    ]
    takes = {name for parameter in parameters if not getattr(parameter, "is_flag", False) for name in parameter.opts}
    return any(at == 0 or words[at - 1] not in takes for at in places)


def _run(arguments: list[str], debug: bool, interrupted: threading.Event) -> int:
    try:
        known = "_BTP_EXPORT_COMPLETE" not in os.environ and arguments[:1] and arguments[0] in command_names()
        program = _program(arguments[0] if known else None)
        code = program(arguments, prog_name="btp-export", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns KeyboardInterrupt into this
            return _say_interrupted()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _say_interrupted()
    except SystemExit as left:  # so typer ends when it has printed completions, and when a pipe is closed
        if not isinstance(left.__context__, BrokenPipeError):
            return left.code if isinstance(left.code, int) else 0
        _discard_stdout()
        return PIPE_CLOSED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except Exception as error:
        if interrupted.is_set():  # pydantic makes an error of its own of what is raised while it writes a record
            return _say_interrupted()
        if debug:
            # A line can hold a value of any length, as the name of a file that is not there.
            console.note("\n".join(map(shortened, traceback.format_exc().splitlines())))
        lines, code = describe(error)
        console.show_lines(lines)
        return code


def _say_interrupted() -> int:
    console.show_lines(["interrupted"], prefix="")
    return INTERRUPTED


def describe(error: BaseException) -> tuple[list[str], int]:
    """One to three lines for an error, and its exit code."""
    if isinstance(error, BtpError):
        return error.lines(), error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "btp-export"
        return [shortened(_usage(error.format_message())), f"do this: {path} --help"], 2
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OURS:
        return [f"{error.name} is not installed", "do this: btp-export doctor shows what belongs to btp-export"], 3
    surroundings = _describe_surroundings(error)
    if surroundings is not None:
        return surroundings
    return [
        shortened(f"{type(error).__name__}: {error}"),
        "this is a defect of btp-export; --debug shows where it happened",
    ], 1


def _usage(message: str) -> str:
    """Typer's message without the words of the validation library beneath it."""
    for theirs, ours in USAGE.items():
        message = message.replace(theirs, ours)
    return message


def _describe_surroundings(error: BaseException) -> tuple[list[str], int] | None:
    """The same for what the machine refuses: disk, memory, open files, folders. None for anything else."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(text in str(error) for text in NO_MEMORY):
        return ["not enough memory", "do this: btp-export doctor shows how much there is; close other programs"], 3
    if number in (errno.EMFILE, errno.ENFILE):
        return ["too many open files", "do this: ulimit -n 4096 raises the limit of this shell"], 3
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        return [f"{error.strerror}{where}", "do this: free some space there, or write to another disk"], 2
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):  # Python's words
        return [f"{error.strerror}", "wanted: one with space to write", "do this: free some space, or set TMPDIR"], 3
    if isinstance(error, FileNotFoundError) and error.filename is None and not _in_a_folder():
        return ["the current folder was removed", "do this: cd to a folder that exists"], 2
    if number == errno.ELOOP or (isinstance(error, RuntimeError) and "Symlink loop" in str(error)):  # pathlib's words
        return [f"{error}", "wanted: links that lead somewhere", "do this: ls -l shows where they lead"], 2
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # Python's words where there is none
        return ["there is no home folder", "wanted: HOME, or a user the system knows", "do this: export HOME=..."], 2
    if isinstance(error, OSError) and error.filename:
        return [f"{os.fsdecode(error.filename)}: {error.strerror}", "do this: check the path and its permissions"], 2
    return None


def _in_a_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _set_up_libraries(debug: bool) -> None:
    """Threads that wait asleep, and no progress bars or warnings of other libraries; what the user has set stays."""
    # Loading PyTorch and transformers makes a million objects that stay. Python would look through them for garbage
    # each time that 700 more are there: a seventh of the time of a small export.
    gc.set_threshold(5000)
    # By default PyTorch's OpenMP threads wait in a loop. Where another process has a core too, every short operation
    # then waits for a time slice: calibration of the demo took 171 s so, and 9 s with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # it would look through every installed package for them
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C, by a type of our own.

    A plain KeyboardInterrupt that passes through an `exec` of text, as libraries use it, makes CPython kill itself with
    SIGINT at exit even if it was caught, and the exit code would not be 130.
    """


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[threading.Event]:
    """SIGTERM and SIGHUP act like Ctrl-C, so that every `finally` that cleans up runs; `nohup` keeps its meaning.

    Gives what says whether one has come.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise _Interrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere somebody else owns the signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _occupy_standard_descriptors() -> None:
    """Open 0, 1 and 2 if they are closed: the next file opened would get the number, and be printed into."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it stays open until the process ends


def _discard_stdout() -> None:
    """Nobody reads any more: let the interpreter's last flush go nowhere instead of failing."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
