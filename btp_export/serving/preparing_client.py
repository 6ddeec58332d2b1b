"""The server's side of the process that opens pictures and writes prompts (btp_export/serving/preparing_process.py)."""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from signal import SIGALRM
from typing import Any

import numpy as np

from btp_export.console import note
from btp_export.model.prompting import Encoded
from btp_export.serving import preparing_process
from btp_export.serving.deadlines import within
from btp_export.serving.preparing_process import LENGTHS, Options, frame
from btp_export.serving.questions import Question
from btp_export.serving.refusals import Refusal
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError
from graphs.records.reading import parse_json

SLACK = 5.0  # seconds after which a process that its own alarm did not end is killed
ERRORS: dict[int, type[BtpError]] = {1: CheckError, 2: InputError, 3: UnavailableError}


class PreparingClient:
    """Requests go through one at a time. A request that ends the process is refused, and the next gets a new one."""

    def __init__(self, options: Options) -> None:
        self._options, self._lock = options, asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process. Raises BtpError if the bundle's processor cannot be used."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", preparing_process.__name__, json.dumps(asdict(self._options)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        try:
            head, _ = await self._read()
        except asyncio.IncompleteReadError:
            head = {"got": "the process that prepares requests ended", "wanted": "one that runs", "exit_code": 1}
        if "got" in head:
            await self.stop()
            raise ERRORS.get(head["exit_code"], CheckError)(head["got"], wanted=head["wanted"])

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    @property
    def process_id(self) -> int | None:
        """Of the process that is there now."""
        return None if self._process is None else self._process.pid

    async def prepare(self, question: Question, picture: bytes) -> tuple[str, Encoded]:
        """The profile that the picture fits, and what its graphs take. Raises Refusal."""
        # A caller that goes away must not leave half an exchange behind: the next would read this one's answer.
        return await asyncio.shield(asyncio.ensure_future(self._exchanged(question, picture)))

    async def _exchanged(self, question: Question, picture: bytes) -> tuple[str, Encoded]:
        async with self._lock:
            if self._process is None or self._process.returncode is not None:
                await self.start()
            head = {"prompt": question.prompt, "later": question.later, "system": question.system}
            try:
                answer, data = await within(self._options.seconds + SLACK, self._ask(frame(head, picture)))
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError) as error:
                raise await self._ended() from error
        if "got" in answer:
            raise Refusal(answer["got"] + (f"; wanted: {answer['wanted']}" if answer["wanted"] else ""))
        return answer["profile"], _encoded(answer, data)

    async def _ask(self, asked: bytes) -> tuple[dict[str, Any], bytes]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(asked)
        await self._process.stdin.drain()
        return await self._read()

    async def _read(self) -> tuple[dict[str, Any], bytes]:
        assert self._process is not None and self._process.stdout is not None
        head, data = LENGTHS.unpack(await self._process.stdout.readexactly(LENGTHS.size))
        return parse_json(await self._process.stdout.readexactly(head)), await self._process.stdout.readexactly(data)

    async def _ended(self) -> Refusal:
        """What a request is told that ended the process."""
        process = self._process
        if process is not None and process.returncode is None:
            await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=1)
        code = None if process is None else process.returncode
        await self.stop()
        note(f"preparing a request ended its process ({'still running' if code is None else code}); a new one follows")
        if code in (None, -SIGALRM):
            return Refusal(f"preparing this picture and text takes longer than {self._options.seconds:g} s")
        return Refusal("preparing this picture and text fails")


def _encoded(answer: dict[str, Any], data: bytes) -> Encoded:
    return Encoded(
        input_ids=(np.array(answer["ids"], np.int64),),
        pixel_values=np.frombuffer(data, np.float32).reshape(answer["shape"]),
        prefix_tokens=answer["prefix_tokens"],
        image_tokens=answer["image_tokens"],
        unknown=(answer["unknown"],),
    )
