"""`btp-export serve`: a bundle answers requests over HTTP."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from btp_export import extras
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, dummy_lines, emit, note

if TYPE_CHECKING:
    from btp_export.results.serving import Serve
    from btp_export.serving.limits import Access, Limits
    from btp_export.serving.service import Service

KEY_VARIABLE = "BTP_EXPORT_API_KEY"


@dataclass(frozen=True)
class PictureOptions:
    """Where pictures may come from beside the request itself, and how large they may be."""

    heading: ClassVar[str] = "Pictures"
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Fetch pictures from http(s) addresses of the internet.")
    ] = False
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="With --allow-http: from private networks and this machine too.")
    ] = False
    files: Annotated[
        Path | None, typer.Option("--files", metavar="DIR", help="Read pictures at file: addresses below this folder.")
    ] = None
    max_picture: Annotated[
        int, typer.Option("--max-picture", metavar="MIB", help="Largest picture file."), Between(1, 1024, 20)
    ] = 20
    max_pixels: Annotated[
        int,
        typer.Option("--max-pixels", metavar="N", help="Most pixels of a picture, in millions."),
        Between(1, 178, 50),
    ] = 50

    def access(self) -> "Access":
        """Raises InputError for options that do not fit together and a folder that is none."""
        from btp_export.serving.limits import Access
        from graphs.records.errors import InputError

        if self.allow_private and not self.allow_http:
            raise InputError("--allow-private without --allow-http", wanted="both", do="add --allow-http")
        if self.files is not None and not self.files.is_dir():
            raise InputError(f"--files {self.files} is no folder", wanted="a folder", do="check the path")
        return Access(http=self.allow_http, private=self.allow_private, files=self.files)

    def limits(self, *, seconds: float, queue: int) -> "Limits":
        """All that a request may take."""
        from btp_export.serving.limits import MIB, Limits

        return Limits(
            body=(self.max_picture * 3 // 2 + 1) * MIB,  # base64 takes a third more
            picture=self.max_picture * MIB,
            pixels=self.max_pixels * 1_000_000,
            seconds=seconds,
            queue=queue,
        )


@dataclass(frozen=True)
class AddressOptions:
    """Where the server listens, and whom it answers."""

    heading: ClassVar[str] = "Address"
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: other machines may ask.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="Port; 0: any free one."), Between(0, 65535, 8000)
    ] = 8000
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Answer to this name too, besides localhost's; repeat."),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help=f"Requests need the key in this file.  [default: ${KEY_VARIABLE}]"
        ),
    ] = None

    def key(self) -> str | None:
        """The API key of the file or the environment, None if neither has one. Raises InputError for an empty one."""
        from graphs.records.errors import InputError
        from graphs.records.reading import read_text

        file = self.api_key_file
        if file is None and KEY_VARIABLE not in os.environ:
            return None
        text = os.environ[KEY_VARIABLE] if file is None else read_text(file, noun="file with one line", most=2**16)
        key = text.strip()
        if not key or not key.isascii() or not key.isprintable():
            where = KEY_VARIABLE if file is None else f"--api-key-file {file}"
            raise InputError(f"{where} holds no key", wanted="one line of printable ASCII", do="write a key into it")
        return key


@dataclass(frozen=True)
class QueueOptions:
    """How requests are gathered into batches, and how long each may take."""

    heading: ClassVar[str] = "Queue"
    max_wait: Annotated[
        float,
        typer.Option("--max-wait", metavar="MS", help="A request waits this long for others to fill the batch."),
        Between(0, 60_000, 5),
    ] = 5.0
    queue: Annotated[
        int,
        typer.Option("--queue", metavar="N", help="Requests that may wait; one more is refused (429)."),
        Between(1, 100_000, 64),
    ] = 64
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="S", help="Seconds that a request may take, waiting included."),
        Between(1, 86_400, 120),
    ] = 120.0


EXTRA = extras.CPU  # what is named where a library is missing


def command(
    bundle: options.BundleArgument,
    address: AddressOptions,
    waiting: QueueOptions,
    pictures: PictureOptions,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The model's name in requests.  [default: its own]")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            help="Shape profile; repeat for several.  [default: all]",
            autocompletion=complete.profiles,
        ),
    ] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Scale pictures that fit no profile's size.")] = False,
    threads: options.ThreadsOption = None,
    activations: options.ActivationsOption = "int8",
    device: options.DeviceOption = "cpu",
    target: options.EnginesOption = None,
    no_cuda_graph: options.NoCudaGraphOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer requests over HTTP, as OpenAI's chat completions."""
    with extras.naming(extras.SERVE):
        from btp_export.serving import server
    from btp_export.serving.service import Serving
    from graphs.files.bundle import Bundle

    access, key = pictures.access(), address.key()
    opened = Bundle.open(bundle)
    listening = server.bind(address.host, address.port)
    serving = Serving(
        name=opened.manifest.model.name if name is None else name,
        profiles=tuple(profile or ()),
        wait=waiting.max_wait / 1000,
        resize=resize,
        target=target,
        device=device,
        threads=threads,
        activations=activations,
        cuda_graphs=not no_cuda_graph,
        limits=pictures.limits(seconds=waiting.timeout, queue=waiting.queue),
        access=access,
    )
    for line in dummy_lines(opened.manifest.model.dummy_weights):
        note(line)
    if key is None and not server.is_loopback(address.host):
        note("note: other machines can send requests, and no API key is asked for")
    shown = server.address_of(listening)
    server.serve_until_stopped(
        opened,
        serving,
        listening,
        api_key=key,
        hosts=server.names_of(address.host, tuple(address.allow_host or ())),
        ready=lambda service: emit(_document(service, shown, keyed=key is not None), as_json=as_json, render=_render),
    )
    note("stopped")


def _document(service: "Service", address: str, *, keyed: bool) -> "Serve":
    from btp_export.results.serving import Serve, ServedProfile

    return Serve(
        address=address,
        model=service.name,
        api_key=keyed,
        profiles=tuple(
            ServedProfile(
                name=profile.name, batch=profile.batch, image_size=profile.image_size,
                text_tokens=profile.text_tokens, new_tokens=profile.new_tokens,
            )
            for profile in service.profiles
        ),
    )  # fmt: skip


def _render(result: "Serve") -> str:
    return f"{result.model} answers at {result.address}/v1 (Ctrl-C ends it)"
