"""The process that opens pictures and writes prompts for a server: `python -m btp_export.serving.preparing_process`.

A picture or a chat template can take all time and memory, or end the process that reads it. So it is this one: with a
limit on its memory, and an alarm for each request that ends it; btp_export/serving/preparing_client.py starts it again.
Its argument is `Options` as JSON. Frames go in by standard input and out by standard output: both lengths, a JSON head,
bytes.
"""

import json
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graphs.records.reading import parse_json

LENGTHS = struct.Struct(">IQ")


@dataclass(frozen=True)
class Options:
    """What the process is started with. seconds, memory, pixels: as btp_export/serving/limits.py has them."""

    bundle: str
    profiles: tuple[str, ...]
    resize: bool
    seconds: float
    memory: int
    pixels: int


def main(options: Options) -> None:
    """Answer requests until standard input ends."""
    out, source = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what libraries print must not get between the frames
    try:
        prepare = _Preparing(options)
    except Exception as error:
        write_frame(out, _refusal(error, options) | {"exit_code": getattr(error, "exit_code", 1)})
        return
    write_frame(out, {"ready": True})
    _limit_memory(options.memory)
    while (frame := read_frame(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, options.seconds)  # SIGALRM ends the process
        try:
            head, data = prepare(*frame)
        except Exception as error:  # whatever a library raises is this request's fault, and its alone
            head, data = _refusal(error, options), b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(out, head, data)


class _Preparing:
    """Requests to what the graphs take."""

    def __init__(self, options: Options) -> None:
        import graphs.files.pictures  # noqa: F401 - now: the first request should not wait for it
        from btp_export.model.prompting import Prompter
        from graphs.files.bundle import Bundle

        self._options, bundle = options, Bundle.open(Path(options.bundle))
        self._prompter = Prompter(bundle.processor, bundle.spec)
        self._profiles = [bundle.profile(name) for name in options.profiles]

    def __call__(self, head: dict[str, Any], picture: bytes) -> tuple[dict[str, Any], bytes]:
        from btp_export.model.pictures import fitted, profile_for
        from graphs.files.pictures import open_picture

        spec = self._prompter.spec
        opened = [open_picture(picture, most_pixels=self._options.pixels)]
        profile = profile_for(opened, spec, self._profiles, resize=self._options.resize)
        [image], _ = fitted(opened, spec, profile)
        encoded = self._prompter.conversation(
            image, head["prompt"], head["later"], system=head["system"], profile=profile
        )
        answer = {
            "profile": profile.name,
            "ids": encoded.input_ids[0].tolist(),
            "shape": encoded.pixel_values.shape,
            "prefix_tokens": encoded.prefix_tokens,
            "image_tokens": encoded.image_tokens,
            "unknown": encoded.unknown[0],
        }
        return answer, encoded.pixel_values.tobytes()


def _refusal(error: Exception, options: Options) -> dict[str, Any]:
    from graphs.records.errors import BtpError

    if isinstance(error, BtpError):
        folder = str(Path(options.bundle))
        parts = {"got": error.got, "wanted": error.wanted}
        return {name: text.replace(folder, "the bundle") for name, text in parts.items()}
    print(f"preparing a request: {type(error).__name__}: {error}"[:500], file=sys.stderr, flush=True)
    reason = "takes too much memory" if isinstance(error, MemoryError) else f"fails ({type(error).__name__})"
    return {"got": f"preparing this picture and text {reason}", "wanted": ""}


def _limit_memory(more: int) -> None:
    """No more than `more` bytes beyond what the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def read_frame(source: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next one, None at the end."""
    lengths = source.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, data = LENGTHS.unpack(lengths)
    return parse_json(source.read(head)), source.read(data)


def write_frame(target: IO[bytes], head: dict[str, Any], data: bytes = b"") -> None:
    """Write one."""
    target.write(frame(head, data))
    target.flush()


def frame(head: dict[str, Any], data: bytes = b"") -> bytes:
    """One as bytes."""
    text = json.dumps(head).encode()
    return LENGTHS.pack(len(text), len(data)) + text + data


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    given = parse_json(sys.argv[1])
    main(Options(**given | {"profiles": tuple(given["profiles"])}))
