"""`btp-export hello`: a command that the toolkit does not have."""

from typing import Annotated, Literal

import typer

from btp_export.console import JsonOption, emit
from btp_export.results.base import Result


class Greeting(Result):
    """What `--json` prints."""

    format: Literal["btp-greeting/1"] = "btp-greeting/1"
    hello: str


def command(
    name: Annotated[str, typer.Argument(help="Whom to greet.")],
    as_json: JsonOption = False,
) -> None:
    """Greet somebody. It shows that a command is one file."""
    emit(Greeting(hello=name), as_json=as_json, render=lambda result: f"hello {result.hello}")
