"""A question about one picture as the text that a model sees, by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graphs.files.paths import require_text
from graphs.records.errors import InputError
from graphs.records.refusing import refusing

if TYPE_CHECKING:
    from btp_export.preprocess.processor import Processor

PLACEHOLDERS = {"image_token": "a picture", "video_token": "a video", "audio_token": "a sound"}


def conversation_text(
    processor: Processor, prompt: str, *, later: Sequence[str] = (), system: str | None = None
) -> str:
    """The whole text with the image placeholder in it.

    `later` is what was said after the first question, in turn an answer and the next question. `system` is a message
    before the question; None leaves that to the template. A template that takes text only gets the placeholder as part
    of it. Raises InputError for a template that is not there, is broken, refuses the question,
    writes no placeholder, or leaves the system message out.
    """
    if system is not None:
        _check_system(processor, system)
    folder = processor.folder
    refused: InputError | None = None
    for text_only in (False, True):
        try:
            text = _rendered(processor, _conversation(processor, (prompt, *later), system, text_only=text_only))
        except InputError as error:
            refused = refused or error
            continue
        if processor.image_token in text:
            if system is not None and system.strip() not in text:
                raise InputError(
                    f"the chat template of {folder} leaves the system message out",
                    wanted="a template that writes messages of the role system",
                    do="run without --system, or change the template",
                )
            return text
    if refused is not None:
        raise refused
    raise InputError(
        f"the chat template of {folder} writes no {processor.image_token}",
        wanted="a chat template that takes a picture and a text",
        do=f"mend it, or give the whole text with {processor.image_token} in it and --raw-prompt",
    )


def refuse_placeholders(processor: Processor, prompt: str) -> None:
    """Raise InputError for a prompt with a placeholder in it: the template puts the picture in.

    Every other special token in a prompt is that token, as for transformers.
    """
    for name, token in _placeholders(processor).items():
        if token in prompt:
            raise InputError(
                f"the prompt holds {token}, which stands for {PLACEHOLDERS[name]}",
                wanted="the question alone: the chat template puts the picture in by itself",
                do=f"take it out; the whole text with {processor.image_token} in it goes with run --raw-prompt",
            )


def _placeholders(processor: Processor) -> dict[str, str]:
    return {"image_token": processor.image_token, **processor.steps.text.placeholders}


def _check_system(processor: Processor, system: str) -> None:
    if not system.strip():
        raise InputError("the system message is empty", wanted="a text", do="leave --system out")
    require_text(system, "the system message")
    for token in _placeholders(processor).values():
        if token in system:
            raise InputError(f"the system message holds {token}", wanted="text alone", do="take it out")


def _conversation(
    processor: Processor, turns: Sequence[str], system: str | None, *, text_only: bool
) -> list[dict[str, Any]]:
    def content(text: str, *, picture: bool) -> Any:
        if text_only:
            return f"{processor.image_token}\n{text}" if picture else text
        return [*([{"type": "image"}] if picture else []), {"type": "text", "text": text}]

    messages = [] if system is None else [{"role": "system", "content": content(system, picture=False)}]
    return messages + [
        {"role": "assistant" if number % 2 else "user", "content": content(text, picture=number == 0)}
        for number, text in enumerate(turns)
    ]


def _rendered(processor: Processor, conversation: list[dict[str, Any]]) -> str:
    with refusing(
        f"the chat template of {processor.folder} cannot be used",
        wanted="a chat template that takes a picture and a text",
        do=f"mend it, or give the whole text with {processor.image_token} in it and --raw-prompt",
    ):
        return processor.rendered(conversation)
