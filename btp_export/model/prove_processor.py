"""The files from which a bundle preprocesses by itself, and the proof that they do what transformers' processor does.

The proof compares pixels and token ids, on random and on odd pictures and prompts: they have to be equal, bit for bit.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from btp_export.families import Family
from btp_export.families._chat import conversation_text
from btp_export.families._describe import OWN_TOKENIZER, describe, tokenizer_text
from btp_export.preprocess.processor import Processor, read_processor
from graphs.records.errors import InputError
from graphs.records.preprocess import PREPROCESS
from graphs.records.spec import ModelSpec

SIZES = ((1, 1), (2, 90), (37, 91), (143, 40), (96, 97), (250, 250), (333, 512))  # height, width; beside the profiles'
PROMPTS = (
    "?",
    "What is there to be seen in this picture, and where?",
    "  two  spaces,\ta tab\n\nand lines \r\n",
    "don't; it's 3.14 % of 1e-5, x = {'a': [1, 2]} <b>&amp;</b>",
    "日本語 العربية हिन्दी Ελληνικά",
    "é e\u0301 ﬁ ½ ² Ǆ ß",
    "👩‍👩‍👧 🇨🇭 😀",
    "\u200b\u00a0\ufeff\x00\x1b[0m",
    "<0x0A> <s> </s> <|endoftext|> <|im_end|> ▁ Ġ ##ing",
    "a" * 300,
)
RANDOM_PROMPTS, RANDOM_ANSWERS, LENGTH = 8, 8, 24


def preprocess_files(theirs: Any, folder: Path) -> dict[str, str]:
    """Names and texts of the files that a bundle's processor/ gets beside transformers' own.

    Raises InputError for a processor that cannot be expressed.
    """
    steps = describe(theirs, folder)
    files = {PREPROCESS: steps.model_dump_json(indent=1) + "\n"}
    if steps.text.tokenizer == OWN_TOKENIZER:
        files[OWN_TOKENIZER] = tokenizer_text(theirs)
    return files


def prove_processor(theirs: Any, folder: Path, family: Family, spec: ModelSpec, sizes: list[tuple[int, int]]) -> None:
    """Raise InputError unless the files of `preprocess_files` give what `theirs` gives, transformers' of the folder.

    `sizes` are heights and widths of pictures that are compared beside SIZES.
    """
    ours = _reopened(theirs, folder)
    _compare_texts(theirs, ours)
    _compare_pictures(theirs, ours, family, spec, sizes)


def _reopened(theirs: Any, folder: Path) -> Processor:
    """The processor as a bundle reads it."""
    with tempfile.TemporaryDirectory() as name:
        for file, text in preprocess_files(theirs, folder).items():
            (Path(name) / file).write_text(text, encoding="utf-8")
        if not (Path(name) / OWN_TOKENIZER).is_file():
            (Path(name) / "tokenizer.json").symlink_to((folder / "tokenizer.json").resolve())
        return replace(read_processor(Path(name)), folder=folder)


# -- texts -----------------------------------------------------------------------------------------------------------


def _compare_texts(theirs: Any, ours: Processor) -> None:
    """Templates, token ids, and text from token ids."""
    generator = random.Random(0)
    for prompt in _prompts(ours, generator):
        for conversation in _conversations(ours, prompt):
            got = _outcome(ours.rendered, conversation)
            wanted = _outcome(partial(_rendered, theirs, ours), conversation)
            if got != wanted:
                _differ(ours, f"of the prompt {prompt!r} the text {got!r}", repr(wanted))
        text = None if ours.steps.text.template is None else _outcome(partial(conversation_text, ours), prompt)
        _compare_ids(theirs, ours, text or prompt)
    size = len(theirs.tokenizer)
    for _ in range(RANDOM_ANSWERS):
        ids = [generator.randrange(size) for _ in range(LENGTH)]
        got, wanted = ours.tokens.text(ids), theirs.tokenizer.decode(ids, skip_special_tokens=True)
        if got != wanted:
            _differ(ours, f"of the tokens {ids} the text {got!r}", repr(wanted))


def _conversations(ours: Processor, prompt: str) -> Iterator[list[dict[str, Any]]]:
    """A question, a question for templates that take text only, and one in a conversation of several turns."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    said = [{"role": role, "content": [{"type": "text", "text": "well"}]} for role in ("system", "assistant")]
    yield [question]
    yield [{"role": "user", "content": f"{ours.image_token}\n{prompt}"}]
    yield [said[0], question, said[1], {"role": "user", "content": [{"type": "text", "text": prompt}]}]


def _prompts(ours: Processor, generator: random.Random) -> Iterator[str]:
    yield from PROMPTS
    special = [token for token in ours.steps.text.special.values() if token != ours.image_token]
    yield "say " + " and ".join(special) + "," + "".join(special)
    kinds = (range(32, 127), range(0xA0, 0x2000), range(0x2000, 0xD800), range(0x1F300, 0x1FA00))
    for _ in range(RANDOM_PROMPTS):
        drawn = [chr(generator.choice(generator.choice(kinds))) for _ in range(LENGTH)]
        yield "".join(drawn)


def _rendered(theirs: Any, ours: Processor, conversation: list[dict[str, Any]]) -> str:
    template = ours.steps.text.template
    return str(
        theirs.apply_chat_template(conversation, chat_template=template, add_generation_prompt=True, tokenize=False)
    )


def _outcome(run: Callable[[Any], str], given: Any) -> str | None:
    """What it makes of what is given; None where a template refuses, in whatever way."""
    try:
        return run(given)
    except Exception:
        return None


def _compare_ids(theirs: Any, ours: Processor, text: str) -> None:
    begin = theirs.tokenizer.bos_token
    expanded = text.replace(ours.image_token, ours.image_token * 3)
    wanted = theirs.tokenizer(expanded, add_special_tokens=not (begin and text.startswith(begin)))["input_ids"]
    got = ours.ids(text, 3)
    if got != wanted:
        _differ(ours, f"of {text!r} the tokens {got}", str(wanted))


# -- pictures --------------------------------------------------------------------------------------------------------


def _compare_pictures(
    theirs: Any, ours: Processor, family: Family, spec: ModelSpec, sizes: list[tuple[int, int]]
) -> None:
    """Pixels and, with as many image tokens as the family says, the token ids of a whole prompt."""
    rng = np.random.default_rng(0)
    for height, width in dict.fromkeys([*SIZES, *sizes]):
        try:
            tokens = family.layout(spec, (height, width)).image_tokens
        except InputError:  # a picture that the model does not take
            continue
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        smooth = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize((width, height))
        for picture in (noise, smooth):
            reference = theirs(
                images=[picture], text=[ours.image_token], input_data_format="channels_last", return_tensors="np"
            )
            got, wanted = ours.pixels(picture), np.asarray(reference["pixel_values"], np.float32)
            what = f"of a picture of {height} x {width}"
            if got.shape != wanted.shape:
                _differ(ours, f"{what} the pixels {list(got.shape)}", str(list(wanted.shape)))
            if not np.array_equal(got, wanted):
                _differ(ours, f"{what} pixels that are off by up to {np.abs(got - wanted).max():.3g}", "the same")
            ids = reference["input_ids"][0]
            if ours.ids(ours.image_token, tokens) != ids.tolist():
                _differ(ours, f"{what} {tokens} image tokens", str(np.count_nonzero(ids == spec.image_token_id)))


def _differ(ours: Processor, got: str, wanted: str) -> NoReturn:
    raise InputError(
        f"the bundle's own preprocessing makes {got}",
        wanted=f"{wanted}, as transformers' processor of {ours.folder} does",
        do="use the processor files that the model was published with; report it if these are they",
    )
