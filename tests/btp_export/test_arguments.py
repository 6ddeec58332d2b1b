"""What the Python functions are given is checked before anything is opened, in words of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import btp_export
from btp_export.arguments import checked

WRONG: dict[str, list[dict[str, Any]]] = {
    "load": [{"bundle": None}, {"threads": 10**9}, {"threads": "2"}, {"device": None}, {"cuda_graphs": "no"}],
    "export": [
        {"model": None}, {"out": 3}, {"plan": None}, {"compression": "x"}, {"shapes": None}, {"shapes": ["batch=2"]},
        {"opset": "23"}, {"precision": "fp16"}, {"link": "soft"}, {"assemble": None}, {"force": "no"}, {"report": 3},
        {"shapes": btp_export.Shape()}, {"system": 3}, {"note": None},
    ],
    "calibrate": [
        {"keep": "10,5"}, {"keep": 5}, {"keep": [1.5]}, {"stages": ["a"]}, {"image_size": 96}, {"image_size": "96x96"},
        {"image_size": (1, 2, 3)}, {"importance": "x"}, {"maths": "float8"}, {"samples": 0}, {"samples": True},
        {"seed": -1}, {"mix": {"scenes": 1}}, {"answer_tokens": 0}, {"tau": "x"},
    ],
    "verify": [{"seed": -1}, {"maths": "float8"}, {"samples": 10**12}, {"samples": "4"}, {"tokens": 1.5}],
    "evaluate": [{"plans": "none"}, {"plans": [3]}, {"samples": 0}, {"compression": "a"}, {"seed": 2**24}],
    "bench": [{"rounds": 0}, {"rounds": "x"}, {"threads": 0}],
    "build": [{"tensorrt": 10.3}, {"plugins": "x"}, {"memory_bytes": 1}, {"target": None}],
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "export": {"model": "demo", "out": "nowhere"}, "calibrate": {"model": "demo"},
    "build": {"bundle": "nowhere", "target": "l4"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_ in WRONG.items() for given in all_])
def test_wrong_arguments(name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the function, the argument, its value and what is wanted; nothing was begun."""
    monkeypatch.chdir(tmp_path)
    [(argument, value)] = given.items()
    with pytest.raises(btp_export.InputError) as raised:
        getattr(btp_export, name)(**{**NEEDED.get(name, {"bundle": "nowhere"}), **given})
    assert raised.value.got == f"{name}: {argument} is {value!r}" and raised.value.wanted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sizes", [{"image": "96x96"}, {"image": (96,)}, {"batch": 0}, {"batch": "2"}, {"batch": 2.0}, {"text": 0}]
)
def test_shapes_are_checked_where_they_are_made(sizes: dict[str, Any]) -> None:
    """`image="96x96"` was a picture of 9 x 6 pixels."""
    with pytest.raises(btp_export.InputError, match=f"Shape: {next(iter(sizes))} is"):
        btp_export.Shape(**sizes)


@pytest.mark.parametrize(
    "given", [{"max_new_tokens": "3"}, {"max_new_tokens": True}, {"temperature": "x"}, {"seed": 1.5}]
)
def test_settings_of_an_answer(tiny_bundle: Callable[..., btp_export.Bundle], given: dict[str, Any]) -> None:
    model = btp_export.load(tiny_bundle())
    with pytest.raises(btp_export.InputError, match=f"generate: {next(iter(given))} is"):
        model.generate("nowhere.png", "what?", **given)
    for picture in (b"png", None, bytearray(b"png")):
        with pytest.raises(btp_export.InputError, match=f"a picture of type {type(picture).__name__}"):
            model.generate(picture, "what?")  # type: ignore[arg-type]
    with pytest.raises(btp_export.InputError, match="generate: prompts is None"):
        model.generate("nowhere.png", None)  # type: ignore[arg-type]


def test_a_check_of_another_name_is_refused(tiny_bundle: Callable[..., btp_export.Bundle]) -> None:
    """It would have been the quick one."""
    with pytest.raises(btp_export.InputError, match="check 'ful'"):
        btp_export.Bundle.open(tiny_bundle().root, check="ful")  # type: ignore[arg-type]


def test_a_path_with_a_null_byte() -> None:
    with pytest.raises(btp_export.InputError, match="null byte"):
        btp_export.load("bundle\0")


def test_numbers_of_numpy_and_what_python_says_itself() -> None:
    @checked(count=(1, 9))
    def function(count: int, *, share: float = 0.0) -> float:
        return count + share

    assert function(np.int64(2), share=np.float32(0.5)) == 2.5 and function(count=1, share=1) == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'shares'"):
        function(1, shares=2)  # type: ignore[call-arg]
    with pytest.raises(btp_export.InputError, match="count is 10"):
        function(10)
    with pytest.raises(btp_export.InputError, match="share is nan") as raised:
        checked(share=(0, 1))(function)(1, share=float("nan"))
    assert raised.value.wanted == "a number from 0 to 1"
