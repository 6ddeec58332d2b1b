"""What a request is refused with: a status, a message without paths, and OpenAI's words for the kind of error."""

from collections.abc import Mapping
from typing import Any

from graphs.records.errors import BtpError, shortened


class Refusal(Exception):
    """A request that gets no answer. It travels between processes, so all of it is in `args`.

    Args:
        message: one line for the caller.
        status: of HTTP.
        kind: OpenAI's `type`. code: its `code`. param: the field of the request that is wrong.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, status, kind, code, param, retry_after)
        self.message, self.status, self.kind = shortened(message), status, kind
        self.code, self.param, self.retry_after = code, param, retry_after

    def document(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        """Further headers of the answer."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def refused(error: BtpError, param: str | None = None) -> Refusal:
    """The refusal for an input that the toolkit refuses. What to do is left out: it names options of the program."""
    return Refusal(error.got + (f"; wanted: {error.wanted}" if error.wanted else ""), param=param)


def no_model(name: str) -> Refusal:
    """For a name that is not the served model's."""
    return Refusal(f"no model {name!r:.100}", 404, code="model_not_found", param="model")


def full(retry_after: int) -> Refusal:
    """For one request too many."""
    return Refusal("too many requests wait", 429, "rate_limit_error", "queue_full", retry_after=retry_after)


def defect() -> Refusal:
    """For what is nobody's input: the reason is on the server's standard error, not in the answer."""
    return Refusal("the server could not answer; its log says why", 500, "server_error", "internal_error")
