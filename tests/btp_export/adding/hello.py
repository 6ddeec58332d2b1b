"""`btp-export hello`: a command that the toolkit does not have."""

from typing import Annotated

import typer

from btp_export.console import JsonOption, emit


def command(
    name: Annotated[str, typer.Argument(help="Whom to greet.")],
    as_json: JsonOption = False,
) -> None:
    """Greet somebody. It shows that a command is one file."""
    emit({"hello": name}, as_json=as_json, render=lambda result: f"hello {result['hello']}")
