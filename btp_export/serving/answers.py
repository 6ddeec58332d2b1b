"""Events as OpenAI's answers: a chat.completion, or its chunks as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from btp_export.serving.gathering import Event, Finish, Piece
from btp_export.serving.refusals import Refusal

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """What all parts of an answer say alike."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The answer in one piece. Raises Refusal as the events do."""
        text = ""
        async for event in events:
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Finish):
                message = {"role": "assistant", "content": text, "refusal": None}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
                return self._head("chat.completion") | {"choices": [choice], "usage": usage(event)} | kept(event)
        raise RuntimeError("events without an end")

    async def chunks(self, events: AsyncIterator[Event], *, with_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error after the first of them is one of them."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in events:
                if isinstance(event, Piece):
                    yield self._chunk({"content": event.text})
                elif isinstance(event, Finish):
                    yield self._chunk({}, event.reason, kept(event))
                    if with_usage:
                        yield _sent(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(event)})
        except Refusal as refusal:
            yield _sent(refusal.document())
        yield DONE

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, more: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _sent(self._head("chat.completion.chunk") | {"choices": [choice]} | (more or {}))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(finish: Finish) -> dict[str, Any]:
    """Tokens: the prompt's as it would be without pruning, and in its details what pruning left of it.

    `tokens_kept`: image tokens behind each stage. `average_image_tokens`: mean over the decoder's layers.
    `pruned_prompt_tokens`: the prompt behind the last stage.
    """
    last = finish.tokens_kept[-1] if finish.tokens_kept else finish.image_tokens
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "image_tokens": finish.image_tokens,
            "tokens_kept": list(finish.tokens_kept),
            "average_image_tokens": round(finish.average_tokens, 3),
            "pruned_prompt_tokens": finish.prompt_tokens - finish.image_tokens + last,
        },
    }


def kept(finish: Finish) -> dict[str, Any]:
    """The kept tokens of each stage, if the request asked for them."""
    return {} if finish.kept is None else {"kept": [asdict(stage) for stage in finish.kept]}


def _sent(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
