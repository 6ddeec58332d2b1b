"""The boundary around libraries: one error for all of theirs; ours, interruptions and the machine's pass."""

import errno
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from tokenizers import Tokenizer

from btp_export.families._processor import load_processor
from btp_export.model.open_model import open_model
from graphs.records.errors import CheckError, InputError
from graphs.records.refusing import at_most, refusing


class Panic(BaseException):  # as Rust's PanicException, which cannot be made in Python
    pass


FOREIGN = [
    KeyError("image_token"), AttributeError("no x"), ZeroDivisionError("division by zero"), RecursionError("deep"),
    MemoryError(), OverflowError("cannot fit 'int'"), SecurityError("unsafe"), Exception("data did not match"),
    TemplateSyntaxError("unexpected end", lineno=3), Panic("no entry found for key"),
    OSError(errno.ENOENT, "no file", "tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_what_a_library_raises_is_the_file_s_fault(error: BaseException) -> None:
    with pytest.raises(InputError, match=r"^the file: \S") as caught, refusing("the file", wanted="a", do="b"):
        raise error
    assert caught.value.__cause__ is error and (caught.value.wanted, caught.value.do) == ("a", "b")
    assert "memory" in caught.value.got or not isinstance(error, MemoryError)
    assert "line 3" in caught.value.got or not isinstance(error, TemplateSyntaxError)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(2),
        CheckError("a check"),
        InputError("ours"),
        OSError(errno.ENOSPC, "no space"),
        OSError(errno.ENOENT, "the current folder is gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_rest_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, refusing("the file", wanted="", do=""):
        raise error
    assert caught.value is error


def test_a_panic_in_rust_is_no_exception_and_is_refused() -> None:
    broken = json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                           "pair": [], "special_tokens": {}}})  # fmt: skip
    with pytest.raises(InputError, match=r"^the tokenizer: "), refusing("the tokenizer", wanted="", do=""):
        Tokenizer.from_str(broken).encode("a")


def test_what_goes_on_for_ever_is_ended() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    loops = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(3)) + "{% endfor %}" * 3
    start, before = time.monotonic(), sys.gettrace()
    template = ImmutableSandboxedEnvironment().from_string(loops)
    with pytest.raises(InputError, match="more than 1 seconds"), refusing("it", wanted="", do=""), at_most(1.0):
        template.render()
    assert time.monotonic() - start < 30 and sys.gettrace() is before
    with at_most(1.0):
        assert ImmutableSandboxedEnvironment().from_string("{{ 1 + 1 }}").render() == "2"


# -- a checkpoint's files through what opens them --------------------------------------------------------------------


def _change(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / name).write_text(json.dumps(document))

    return change


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a strict field": _change("config.json", "text_config", "bos_token_id", value="5.23.0"),
    "heads that do not divide": _change("config.json", "text_config", "hidden_size", value=255),
    "a list for an object": _change("config.json", "text_config", value=[1]),
    "text for an object": _change("config.json", "vision_config", value="vision"),
    "a number for a list": _change("processor_config.json", "image_processor", "image_mean", value=5),
    "a size that takes all memory": _change("processor_config.json", "image_processor", "crop_size", value=10**9),
    "no pattern": _change("tokenizer.json", "pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "("}}),
    "another type": _change("tokenizer.json", "post_processor", value={"type": "x"}),
    "a template of the wrong type": _change("tokenizer_config.json", "extra_special_tokens", value=5),
    "a template that fails": lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}") and None,
    "a template without end": lambda folder: (folder / "chat_template.jinja").write_text("{% if %}") and None,
    "a template that calls itself": lambda folder: (
        (folder / "chat_template.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}") and None
    ),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_model_of_hostile_files_is_refused_or_opened(change: str, tmp_path: Path) -> None:
    from btp_export.demo import checkpoint_path

    folder = tmp_path / "model"
    shutil.copytree(checkpoint_path(), folder)
    HOSTILE[change](folder)
    try:
        open_model(str(folder))
    except InputError as error:
        assert str(folder) in error.got or "config.json" in error.got or "text_config" in error.got
    else:
        assert change in ("a size that takes all memory", "a number for a list", "a template of the wrong type")


def test_a_processor_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    from btp_export.demo import checkpoint_path

    folder = tmp_path / "model"
    shutil.copytree(checkpoint_path(), folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: it is a pipe"):
        load_processor(folder)
