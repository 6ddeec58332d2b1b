"""Texts that end an answer, however the text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from btp_export.serving.stops import Until

TEXT = st.text("abc", max_size=12)


def passed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    until = Until(stops)
    text = "".join(until.add(piece) for piece in pieces)
    return text + until.finish(), until.found


@given(st.lists(TEXT, max_size=6), st.text("abc", min_size=1, max_size=4))
def test_one_stop_text(pieces: list[str], stop: str) -> None:
    whole = "".join(pieces)
    assert passed(pieces, [stop]) == (whole.partition(stop)[0], stop in whole)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_several(pieces: list[str], stops: list[str]) -> None:
    """The text ends before a stop text, holds none, and is the beginning of the whole."""
    whole = "".join(pieces)
    text, result = passed(pieces, stops)
    assert result == any(stop in whole for stop in stops)
    assert not any(stop in text for stop in stops) and whole.startswith(text)
    assert any(whole[len(text) :].startswith(stop) for stop in stops) if result else text == whole


def test_nothing_is_held_back_that_is_certain() -> None:
    until = Until(["stop"])
    assert [until.add(piece) for piece in ("we s", "to", "re", " s")] == ["we ", "", "store", " "]
