"""The pydantic base of every record that is written to disk: immutable, unknown keys are errors."""

from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from graphs.records.errors import InputError

FROM_FILE: Final = {"from_file": True}  # the validation context of what is read from a file


class Record(BaseModel):
    """Validated, immutable record; an unknown or missing key is an error, never dropped in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


Parsed = TypeVar("Parsed", bound=Record)


def parse_record(kind: type[Parsed], text: str | bytes, *, source: Path | str, noun: str) -> Parsed:
    """Parse JSON into `kind`.

    Raises InputError that names the file, the key and what was wrong with it.
    """
    try:
        record = kind.model_validate_json(text, context=FROM_FILE)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise InputError(
            f"{source} is not a valid {noun}: {where}: {first['msg']}",
            wanted=f"a {noun} as written by btp-export",
            do="restore the file or make it again",
        ) from error
    if "format" in kind.model_fields and "format" not in record.model_fields_set:
        raise InputError(
            f"{source} is not a valid {noun}: format: Field required",
            wanted=f"a {noun} as written by btp-export",
            do="restore the file or make it again",
        )
    return record
