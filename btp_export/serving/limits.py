"""How much a request may take, and where its picture may come from."""

from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The most that one request may take, and how many may wait.

    body, picture: bytes. pixels: of a picture. seconds: from the request's first byte to the end of its answer.
    prepare_seconds, prepare_memory: for opening the picture and writing the prompt; bytes beyond what the process has.
    fetch_seconds: for a picture at an address. queue: requests that wait beside the batch that runs.
    """

    body: int = 32 * MIB
    picture: int = 20 * MIB
    pixels: int = 50_000_000
    seconds: float = 120.0
    prepare_seconds: float = 10.0
    prepare_memory: int = 4096 * MIB
    fetch_seconds: float = 10.0
    queue: int = 64


@dataclass(frozen=True)
class Access:
    """Where pictures may come from beside the request itself.

    http: addresses of http and https. private: also those of this machine and its networks. files: a folder.
    """

    http: bool = False
    private: bool = False
    files: Path | None = None
