"""What a request asks of the model: one picture, a conversation about it, and how the answer is chosen."""

import secrets
from dataclasses import dataclass

from btp_export.running.sampling import Sampling
from btp_export.serving.refusals import Refusal
from btp_export.serving.schemas import ChatRequest, ImagePart, Message


@dataclass(frozen=True)
class Question:
    """The picture's address, the first question, then in turn answers and questions; `system` None: the bundle's."""

    picture: str
    prompt: str
    later: tuple[str, ...]
    system: str | None


@dataclass(frozen=True)
class Settings:
    """How the answer is chosen. room: most tokens, None as many as the profile has room for."""

    sampling: Sampling
    room: int | None
    stops: tuple[str, ...]
    include_kept: bool


def question_of(request: ChatRequest) -> Question:
    """Raises Refusal for a conversation that no bundle can be asked: see docs/serving.md."""
    turns = list(enumerate(request.messages))
    system = None
    if turns[0][1].role in ("system", "developer"):
        system = _words(*turns.pop(0))
    for place, (number, message) in enumerate(turns):
        if message.role != ("assistant" if place % 2 else "user"):
            raise _wrong(number, f"a message of the role {message.role}", "user and assistant in turn, user first")
        pictures = len(_pictures(message))
        if pictures != (place == 0):
            wanted = "one picture in the first message of the user, none later"
            raise _wrong(number, f"{pictures} picture{'s' * (pictures != 1)} in this message", wanted)
    if len(turns) % 2 == 0:
        raise _wrong(len(request.messages) - 1, "the conversation ends here", "a question of the user at its end")
    prompt, *later = (_words(*turn) for turn in turns)
    return Question(_pictures(turns[0][1])[0], prompt, tuple(later), system)


def settings_of(request: ChatRequest) -> Settings:
    """Greedy unless the request names a temperature; without a seed sampling begins anywhere."""
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise Refusal("max_tokens and max_completion_tokens; wanted: one of them", param="max_tokens")
    return Settings(
        Sampling(
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(48) if request.seed is None else request.seed,
        ),
        request.max_tokens or request.max_completion_tokens,
        request.stops,
        request.include_kept,
    )


def _words(number: int, message: Message) -> str:
    """A message's text, its parts on lines of their own. Raises Refusal if there is none."""
    parts = [message.content] if isinstance(message.content, str) else message.content
    words = "\n".join(part if isinstance(part, str) else part.text for part in parts if not isinstance(part, ImagePart))
    if not words.strip():
        raise _wrong(number, "a message without text", "words in every message")
    return words


def _pictures(message: Message) -> list[str]:
    parts = () if isinstance(message.content, str) else message.content
    return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def _wrong(number: int, got: str, wanted: str) -> Refusal:
    return Refusal(f"messages.{number}: {got}; wanted: {wanted}", param=f"messages.{number}")
