"""What the functions for users check of their arguments before anything is opened: types, choices and bounds.

Python checks none of it, and what is wrong would be found late, in a library's words, or never: `force="no"` would
replace a bundle.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import SimpleNamespace, UnionType
from typing import Any, Final, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from graphs.records.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
Bounds = tuple[float, float]  # the least and the largest value, both included
_NUMBERS: Final[dict[object, type]] = {int: Integral, float: Real}  # numpy's numbers are these too
_WORDS: Final = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}


def checked(**bounds: Bounds) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose arguments are checked against its annotations, and its numbers against `bounds`, by name.

    An argument whose annotation is known to type checkers alone is left to the function.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            check_arguments(function.__qualname__, given, _hints(function), bounds)
            return function(*args, **kwargs)

        return call

    return decorate


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of its arguments. Its result's may be one that only running it loads."""
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(function).items():
        if name == "return":
            continue
        try:
            one = SimpleNamespace(__annotations__={name: annotation})
            hints |= get_type_hints(one, function.__globals__)
        except NameError:
            continue
    return hints


def check_arguments(
    called: str, given: Mapping[str, Any], hints: Mapping[str, Any], bounds: Mapping[str, Bounds]
) -> None:
    """Raise InputError for the first of `given` that is not of its type in `hints`, or not within its bounds."""
    for name, value in given.items():
        if name not in hints:
            continue
        low, high = bounds.get(name, (-math.inf, math.inf))
        outside = name in bounds and value is not None and _fits(value, float) and not low <= value <= high
        if outside or not _fits(value, hints[name]):
            range_ = f" from {low} to {high}" if name in bounds else ""
            raise InputError(
                f"{called}: {name} is {value!r}",
                wanted=" or ".join(_words(hints[name], range_)),
                do="docs/api.md lists the arguments",
            )


def _fits(value: object, hint: Any) -> bool:
    origin, within = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in within)
    if origin is Literal:
        return isinstance(value, str) and value in within
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(within) and all(map(_fits, value, within))
    if origin is Sequence:
        return _is_sequence(value) and all(_fits(each, within[0]) for each in value)  # type: ignore[attr-defined]
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    return callable(value) if _is_function(hint) else isinstance(value, hint)


def _is_sequence(value: object) -> bool:
    """Also numpy's arrays, which are no Sequence; text is one of letters, which nobody means."""
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__getitem__")
        and not isinstance(value, (str, bytes, bytearray, Mapping))
    )


def _is_function(hint: Any) -> bool:
    return get_origin(hint) is Callable or getattr(hint, "_is_protocol", False)


def _words(hint: Any, range_: str) -> list[str]:
    """What is wanted, one or several; `range_` is said of numbers."""
    origin, within = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [word for each in within for word in _words(each, range_)]
    if origin is Literal:
        return [repr(choice) for choice in within]
    if origin in (tuple, Sequence):
        parts = within if origin is tuple else within[:1]
        return [f"a sequence of {', '.join(_words(part, range_)[0] for part in parts)}"]
    if _is_function(hint):
        return ["a function"]
    return [_WORDS.get(hint, f"a {hint.__name__}") + (range_ if hint in _NUMBERS else "")]
