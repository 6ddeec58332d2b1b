"""Options in groups: a command takes dataclasses, and each field of one is an option on the command line.

Typer reads options from a function's signature. `as_command` gives it a function whose signature has, in place of
every parameter that is a dataclass, that dataclass's fields; called, it puts the dataclasses together and calls the
command with them. A dataclass's `heading` stands above its options in `--help`. What an annotation says beside typer's
own words is followed too:

    Annotated[int, typer.Option("--samples"), Between(1, 4096, example=64)]    numbers have bounds
    Annotated[str, typer.Option("--target"), Formerly("--engine")]             the former name works, and says so
"""

import copy
import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from btp_export import extras
from btp_export.commands._model_names import model_names
from btp_export.console import note
from graphs.files.paths import expanded
from graphs.records.errors import InputError

# Stands in help for the models' names until it is shown: to know them the families' files are read.
MODELS = "{models}"
DebugOption = Annotated[bool, typer.Option("--debug", help="After an error, show where in the code it came from.")]


class Between(NamedTuple):
    """The bounds of a number, both included; `example` is what the error message suggests."""

    low: float
    high: float
    example: float


class Formerly(NamedTuple):
    """The option's name in earlier versions: accepted, with a note, until the next version."""

    flag: str


def as_command(
    function: Callable[..., int | None], around: Callable[[], AbstractContextManager[None]], extra: str = extras.EXPORT
) -> Callable[..., int | None]:
    """What typer takes in place of `function`: flat parameters, checked numbers, former names, `--debug`.

    `around` is entered for the time that the function runs; `extra` is named where a library is missing.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _fields(hints[name])
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))
    parameters.append(_parameter("debug", DebugOption, False))
    former = {_former_name(parameter): parameter for parameter in parameters if _metadata(parameter, Formerly)}
    signature = inspect.Signature([*parameters, *map(_former_parameter, former.values())])

    def run(**values: Any) -> int | None:
        with around(), extras.naming(extra):
            _take_former(values, former)
            for parameter in parameters:
                _check_bounds(parameter, values)
                values[parameter.name] = _with_home(values[parameter.name])
            values.pop("debug")  # cli.main looks for it, the command does not
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            return function(**values)

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__dict__["__signature__"] = signature
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return run


class GroupedCommand(TyperCommand):
    """A command whose help has a heading above each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        return _with_shown_help(super().shell_complete(ctx, incomplete))


class GroupedCommands(TyperGroup):
    """The same for the program, whose help lists the commands too."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        return _with_shown_help(super().shell_complete(ctx, incomplete))


def _write_options(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any) -> None:
    """Arguments, the command's own options, then each group under its heading; hidden options have no record."""
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            section = sections.setdefault(getattr(parameter, "rich_help_panel", None) or own, [])
            section.append((record[0], _shown(record[1])))
    for heading, records in sections.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def _with_shown_help(offered: list[Any]) -> list[Any]:
    """What a shell is offered; some show the help beside it."""
    for item in offered:
        item.help = _shown(item.help or "") or None
    return offered


def _shown(text: str) -> str:
    """Help as it is shown."""
    if MODELS not in text:
        return text
    return text.replace(MODELS, ", ".join(model_names()))


def _fields(group: Any) -> list[inspect.Parameter]:
    """The parameters that a dataclass stands for."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _parameter(
            field.name,
            _under(group.heading, hints[field.name]),
            inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(group)
    ]


def _under(heading: str, annotation: Any) -> Any:
    """The annotation with its option under a heading. The option is copied: commands without the group may have it."""
    entries = [
        copy.copy(entry) if isinstance(entry, typer.models.OptionInfo) else entry for entry in get_args(annotation)
    ]
    for entry in entries:
        if isinstance(entry, typer.models.OptionInfo):
            entry.rich_help_panel = heading
    return operator.getitem(Annotated, tuple(entries))  # Annotated[*entries], which Python 3.10 cannot write


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Keyword only, so that required ones may follow others."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _metadata(parameter: inspect.Parameter, kind: type) -> Any:
    """What of that kind the parameter's annotation says, or None."""
    return next((entry for entry in get_args(parameter.annotation)[1:] if isinstance(entry, kind)), None)


def option_flag(parameter: inspect.Parameter) -> str:
    """How the option is written."""
    return str(_metadata(parameter, typer.models.OptionInfo).default)


def _former_name(parameter: inspect.Parameter) -> str:
    return f"former_{parameter.name}"


def _former_parameter(parameter: inspect.Parameter) -> inspect.Parameter:
    """The hidden option of the former name."""
    option = typer.Option(_metadata(parameter, Formerly).flag, hidden=True)
    kind = get_args(parameter.annotation)[0]
    return _parameter(_former_name(parameter), Annotated[kind, option], None)


def _take_former(values: dict[str, Any], former: Mapping[str, inspect.Parameter]) -> None:
    """Move what was given under a former name to the option's own, and tell the user."""
    for name, parameter in former.items():
        value = values.pop(name)
        if not value:
            continue
        old, new = _metadata(parameter, Formerly).flag, option_flag(parameter)
        if values[parameter.name]:
            raise InputError(f"both {old} and {new}", wanted=f"{new} alone", do=f"leave {old} out")
        note(f"note: {old} is now {new}; this version still takes {old}, the next one will not")
        values[parameter.name] = value


def _with_home(value: Any) -> Any:
    """The same with `~` resolved in paths: a shell leaves that of `--out=~/bundle` to us."""
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return expanded(value) if isinstance(value, Path) else value


def _check_bounds(parameter: inspect.Parameter, values: Mapping[str, Any]) -> None:
    """Raise InputError for a number outside the option's bounds, nan included."""
    bounds, value = _metadata(parameter, Between), values[parameter.name]
    if bounds is None or value is None or bounds.low <= value <= bounds.high:  # false for a value that is no number
        return
    flag = option_flag(parameter)
    raise InputError(f"{flag} {value}", wanted=f"{bounds.low} to {bounds.high}", do=f"{flag} {bounds.example}")
