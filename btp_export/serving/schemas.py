"""Requests, as OpenAI's clients send them to /v1/chat/completions.

What would change the answer and is not there is refused, never ignored: other values of `n`, `tools`, penalties and the
like, and fields that nobody knows. What changes nothing (`user`, `metadata`, ...) is taken.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from btp_export.serving.refusals import Refusal
from graphs.records.reading import parse_json
from graphs.records.record import Record

MOST_STOPS, LONGEST_STOP = 4, 1000
ONE, MANY = "text", "list"


class TextPart(Record):
    """Words."""

    type: Literal["text"]
    text: str


class ImageAddress(Record):
    """Where the picture is: a data: URI, or another address if the server allows it. `detail` changes nothing here."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Record):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _one_or_many(value: Any) -> str:
    return ONE if isinstance(value, str) else MANY


# Which of the two a value is decides its type alone, so that an error speaks of that one.
ByType = Discriminator(_one_or_many)


class Message(Record):
    """What somebody said. The last fields are those of an earlier answer that is sent back, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag(ONE)] | Annotated[tuple[Part, ...], Tag(MANY)], ByType]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: tuple[()] | None = None
    annotations: tuple[()] | None = None


class StreamOptions(Record):
    """include_usage: a last piece with the usage. include_obfuscation: taken, and nothing is."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Record):
    """Plain text."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Several = Annotated[tuple[Stop, ...], Field(max_length=MOST_STOPS)]
Stops = Annotated[Annotated[Stop, Tag(ONE)] | Annotated[Several, Tag(MANY)], ByType]


class ChatRequest(Record):
    """A request. `include_kept` is not OpenAI's: the answer says then which image tokens each stage kept."""

    model: str
    messages: tuple[Message, ...] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Stops | None = None
    include_kept: bool = False

    # Taken with the values that change nothing
    n: Annotated[int, Field(ge=1, le=1)] | None = None  # as Literal[1] it would take true
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[()] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises Refusal that names the field and what was wrong with it."""
    try:
        parse_json(body)  # keys that are there twice, numbers without end: what readers understand differently
    except ValueError as error:
        raise Refusal(f"the body is no JSON: {error}") from error
    try:
        return ChatRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in (ONE, MANY))
        kind = "not a field of this server" if first["type"] == "extra_forbidden" else first["msg"]
        kind = kind.replace("Tuple should have", "it should have").replace(" after validation", "")
        raise Refusal(f"{where or 'the body'}: {kind}", param=where[:200] or None) from error
