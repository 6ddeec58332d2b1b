"""The pydantic base of every record that is written to disk: immutable, unknown keys are errors."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from graphs.records.errors import InputError, with_article
from graphs.records.reading import parse_json, read_file

FROM_FILE: Final = {"from_file": True}  # the validation context of what is read from a file
NAME_RULE: Final = "letters, digits, '.', '_' and '-', the first a letter or digit, at most 200"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_name(text: str) -> bool:
    """Whether a name from a file may become part of a path or of a command: NAME_RULE."""
    return _NAME.fullmatch(text) is not None


def require_name(text: str, what: str, source: Path | str) -> str:
    """`text`, the name of `what` in the file `source`. Raises InputError unless it follows NAME_RULE."""
    if not is_name(text):
        raise InputError(f"{source}: {what} is called {text!r}", wanted=NAME_RULE, do="rename it, or get it again")
    return text


def _checked_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"the name {text!r} is not made of {NAME_RULE}")
    return text


# A name that is read from a file and becomes part of a path or of a command.
Name = Annotated[str, AfterValidator(_checked_name)]


# No model has more, and work over what a file says of them ends.
MOST_LAYERS: Final = 10_000
MOST_TOKENS: Final = 2**20
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Size = Annotated[int, Field(ge=1, le=2**31)]


class Record(BaseModel):
    """Validated, immutable record; an unknown or missing key is an error, never dropped in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


Parsed = TypeVar("Parsed", bound=Record)


def parse_record(kind: type[Parsed], text: str | bytes, *, source: Path | str, noun: str) -> Parsed:
    """Parse JSON into `kind`, within the limits of graphs/records/reading.py.

    Raises InputError that names the file, the key and what was wrong with it.
    """
    try:
        parse_json(text)
        record = kind.model_validate_json(text, context=FROM_FILE)
    except ValidationError as error:
        raise _invalid(source, noun, first_error(error)) from error
    except ValueError as error:  # not JSON; a ValidationError is one too
        raise _invalid(source, noun, f"Invalid JSON: {error}") from error
    if "format" in kind.model_fields and "format" not in record.model_fields_set:
        raise _invalid(source, noun, "format: Field required")
    return record


def first_error(error: ValidationError) -> str:
    """What pydantic found first: the key, what is wrong with it, and its value where that is a single one."""
    first: Any = error.errors(include_url=False)[0]
    where = "".join(f"{part}." for part in first["loc"])[:-1]
    said, got = first["msg"].removeprefix("Value error, "), first["input"]
    if first["type"] not in ("value_error", "extra_forbidden") and (got is None or isinstance(got, (str, int, float))):
        said = f"{said}; it is {json.dumps(got, ensure_ascii=False)}"
    return f"{where}: {said}" if where else said


def _invalid(source: Path | str, noun: str, reason: str) -> InputError:
    return InputError(
        f"{source} is not a valid {noun}: {reason}",
        wanted=f"{with_article(noun)} as written by btp-export",
        do="correct or restore the file, or make it again",
    )


def read_record(kind: type[Parsed], path: Path, *, noun: str) -> Parsed:
    """The record in a file. Raises InputError as read_file and parse_record."""
    return parse_record(kind, read_file(path, noun=noun), source=path, noun=noun)
