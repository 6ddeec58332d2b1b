"""A question about one picture as the text that a model sees, by the checkpoint's own chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphs.files.paths import require_text
from graphs.records.errors import InputError
from graphs.records.refusing import at_most, refusing

MOST_SECONDS = 10.0  # of a template, which takes milliseconds
PLACEHOLDERS = {"image_token": "a picture", "video_token": "a video", "audio_token": "a sound"}


def conversation_text(
    processor: Any, prompt: str, *, later: Sequence[str] = (), system: str | None = None, folder: Path
) -> str:
    """The whole text with the image placeholder in it; `folder` is where the template is from.

    `later` is what was said after the first question, in turn an answer and the next question. `system` is a message
    before the question; None leaves that to the template. A template that takes text only gets the placeholder as part
    of it. Raises InputError for a template that is not there, is broken, refuses the question,
    writes no placeholder, or leaves the system message out.
    """
    if system is not None:
        _check_system(processor, system)
    refused: InputError | None = None
    for text_only in (False, True):
        try:
            text = _rendered(processor, _conversation(processor, (prompt, *later), system, text_only=text_only), folder)
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


def refuse_placeholders(processor: Any, prompt: str) -> None:
    """Raise InputError for a prompt with a placeholder in it: the template puts the picture in.

    Every other special token in a prompt is that token, as for transformers.
    """
    for name, meaning in PLACEHOLDERS.items():
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in prompt:
            raise InputError(
                f"the prompt holds {token}, which stands for {meaning}",
                wanted="the question alone: the chat template puts the picture in by itself",
                do=f"take it out; the whole text with {processor.image_token} in it goes with run --raw-prompt",
            )


def _check_system(processor: Any, system: str) -> None:
    if not system.strip():
        raise InputError("the system message is empty", wanted="a text", do="leave --system out")
    require_text(system, "the system message")
    for name in PLACEHOLDERS:
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in system:
            raise InputError(f"the system message holds {token}", wanted="text alone", do="take it out")


def writes_begin_token(processor: Any, text: str) -> bool:
    """Whether the template wrote the begin token, so that the tokenizer must not put a second one before it."""
    begin = processor.tokenizer.bos_token
    return bool(begin) and text.startswith(begin)


def _conversation(processor: Any, turns: Sequence[str], system: str | None, *, text_only: bool) -> list[dict[str, Any]]:
    def content(text: str, *, picture: bool) -> Any:
        if text_only:
            return f"{processor.image_token}\n{text}" if picture else text
        return [*([{"type": "image"}] if picture else []), {"type": "text", "text": text}]

    messages = [] if system is None else [{"role": "system", "content": content(system, picture=False)}]
    return messages + [
        {"role": "assistant" if number % 2 else "user", "content": content(text, picture=number == 0)}
        for number, text in enumerate(turns)
    ]


def _rendered(processor: Any, conversation: list[dict[str, Any]], folder: Path) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            f"{folder} has no chat template",
            wanted="chat_template.jinja, or a template in tokenizer_config.json",
            do=f"add it, or give the whole text with {processor.image_token} in it and --raw-prompt",
        )
    with (
        refusing(
            f"the chat template of {folder} cannot be used",
            wanted="a chat template that takes a picture and a text",
            do=f"mend it, or give the whole text with {processor.image_token} in it and --raw-prompt",
        ),
        at_most(MOST_SECONDS),
    ):
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        return str(processor.apply_chat_template(conversation, chat_template=template, **options))
