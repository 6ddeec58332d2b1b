"""Chat templates, rendered as transformers renders them, within limits on time and memory.

A template is a program of a stranger. jinja2's sandbox keeps it from the rest of the process; here it also may not run
longer than SECONDS, make a text longer than LONGEST in one operation, nor let memory grow by more than GROWTH:

1. A trace function looks at the clock at every line and call of Python that the template runs, and at the memory of the
   process every few of them (`at_most`).
2. Operators, filters and methods whose result can be far longer than what goes in are asked for its length first, so
   that memory does not grow by much between two looks at it.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, Final

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from graphs.records.refusing import at_most, reason

SECONDS: Final = 2.0  # of the processor, so that a busy machine stops no honest template
GROWTH: Final = 256 * 2**20  # bytes of the whole process: other threads have some of it, a conversation little
LONGEST: Final = 1_000_000  # characters of a text, elements of a list
WIDEST: Final = 10_000  # numbers that say how wide something is written
BITS: Final = 4096  # of an integer
JOINS: Final = ("str_join", "markup_join")  # of jinja2.runtime: what becomes of the operator ~
_WIDTH: Final = re.compile(r"\d{5,}|\*|:[^}]*\{")  # in a format: a number, or a place for one

Guard = Callable[[Sequence[Any], Mapping[str, Any]], int]  # arguments -> about how long the result is


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """The text of the messages, up to where the answer begins; `special` are tokens that the template knows by name.

    Raises jinja2.TemplateError for a template that is broken, refuses the messages, or goes beyond the limits; and what
    its own mistakes raise: TypeError, ValueError, KeyError, AttributeError.
    """
    values = {**special, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    pieces, length = [], 0
    try:
        compiled = _compiled(template)
        with at_most(SECONDS, _watch, growth=GROWTH):
            for piece in compiled.generate(**values):
                pieces.append(piece)
                length += len(piece)
                _require(length)
        return "".join(pieces)
    except TimeoutError as error:
        raise SecurityError(str(error)) from error
    except MemoryError as error:
        raise SecurityError(f"it takes more than {GROWTH // 2**20} MB of memory") from error
    except (RecursionError, ArithmeticError) as error:
        raise SecurityError(reason(error)) from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    _require(len(template))
    return _environment().from_string(template)


def _watch(frame: FrameType) -> None:
    """What the operator ~ is going to make."""
    if frame.f_code.co_name in JOINS:
        parts = frame.f_locals.get("seq")
        _require(sum(map(_length, parts)) if isinstance(parts, (tuple, list)) else 0)


def _require(length: float, most: int = LONGEST) -> None:
    if length > most:
        raise SecurityError(f"it makes a text of more than {most} characters")


def _length(value: Any) -> int:
    """Of a text or a list; of anything else that of a number."""
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 20


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a look at what operators, filters and methods are going to make."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _guard_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            _guard(name, (owner, *args), kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja2 puts a function of its own in the place of a text's `format`; `call` does not see whose it was."""
        wrapped: Callable[..., str] | None = super().wrap_str_format(value)
        if wrapped is not None:
            _refuse_widths(value.__self__)
        return wrapped


def _guard_operator(operator: str, left: Any, right: Any) -> None:
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if len(numbers) == 2:
        bits = {"*": sum(number.bit_length() for number in numbers), "**": left.bit_length() * max(right, 0)}
        _require(bits.get(operator, 0), BITS)
    elif operator == "*" and numbers:
        text = right if isinstance(left, int) else left
        _require(_length(text) * max(numbers[0], 0))
    elif operator == "+":
        _require(_length(left) + _length(right))
    elif operator == "%" and isinstance(left, str):
        _refuse_widths(left)


def _guard(name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise SecurityError if a filter, or a method of a text, would make too much of its arguments."""
    if name == "format":
        _refuse_widths(str(arguments[0]))
        return
    for value in (*arguments[1:], *named.values()):
        if isinstance(value, int) and abs(value) > WIDEST:
            raise SecurityError(f"{name} with the number {value}")
    if name in _GROWTH:
        _require(_GROWTH[name](arguments, named))


def _refuse_widths(text: str) -> None:
    if _WIDTH.search(text):
        raise SecurityError("it formats a number wider than any text")


def _replaced(arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    text, *rest = map(_length, (*arguments[:3], *named.values()))
    return text + (text + 1) * max(rest, default=0)


def _joined(arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Both "-".join(list) and list | join("-"); an iterator is made a list by nobody, so it is counted as empty."""
    lists = [value for value in arguments if isinstance(value, (list, tuple))]
    texts = [value for value in (*arguments, *named.values()) if isinstance(value, str)]
    return sum(sum(map(_length, one)) + len(one) * max(map(len, texts), default=0) for one in lists)


def _indented(arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    text, *rest = (*arguments, *named.values())
    widths = [value if isinstance(value, int) else _length(value) for value in rest]
    return _length(text) + (str(text).count("\n") + str(text).count("\t") + 1) * max(widths, default=8)


_GROWTH: Final[dict[str, Guard]] = {
    "replace": _replaced,
    "join": _joined,
    "indent": _indented,
    "expandtabs": _indented,
    "wordwrap": _replaced,
}


class _Generation(Extension):
    """{% generation %} marks what the model has said; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dictionary:
    """`dict` for templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """As of `dict`."""
        return dict.fromkeys(keys, value)


class _Names(Namespace):
    """`namespace` for templates, which takes no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores the attribute {name!r}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    _refuse_widths(form)
    return datetime.now().strftime(form)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which looks at its arguments first; jinja2 passes some an environment or context before them."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _guard(name, args[first:], kwargs)
        return function(*args, **kwargs)

    return guarded


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """What transformers gives templates. Nothing is computed while one is compiled, where no guard would see it."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    for name, function in environment.filters.items():
        environment.filters[name] = _guarded(name, function)
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dictionary(), "namespace": _Names}
    return environment
