"""`btp-export serve`: "btp-serve/1"."""

from typing import Literal

from btp_export.results.base import Result
from graphs.records.record import Record


class ServedProfile(Record):
    """A shape profile that requests may use."""

    name: str
    batch: int
    image_size: tuple[int, int]  # height, width
    text_tokens: int
    new_tokens: int


class Serve(Result):
    """Printed once requests are answered; `address` is without a path."""

    format: Literal["btp-serve/1"] = "btp-serve/1"
    address: str
    model: str
    api_key: bool  # whether requests need one
    profiles: tuple[ServedProfile, ...]
