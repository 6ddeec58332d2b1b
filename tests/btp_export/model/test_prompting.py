"""Prompter: what the model sees is what transformers' processor makes; everything else is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from btp_export.model.open_model import open_model
from btp_export.model.prompting import Encoded, Prompter
from graphs.records.errors import InputError


@pytest.fixture(scope="module")
def prompter(demo_checkpoint: Path) -> Prompter:
    return Prompter(demo_checkpoint, open_model("demo").spec)


def test_encode_is_the_processor(prompter: Prompter, demo_checkpoint: Path, pictures: list[Image.Image]) -> None:
    prompts = ["is there a red circle?", "what colour is the star?", "how many rings?", "where is the blue square?"]
    encoded = prompter.encode(pictures, prompts)
    processor = AutoProcessor.from_pretrained(demo_checkpoint)
    for place, (image, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        wanted = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        np.testing.assert_array_equal(encoded.input_ids[place], wanted["input_ids"][0])
        np.testing.assert_array_equal(encoded.pixel_values[place], wanted["pixel_values"][0])
    assert (encoded.prefix_tokens, encoded.image_tokens) == (8, 576)
    assert [8 + 576 + text for text in encoded.text_lengths] == list(encoded.lengths)
    assert encoded.part(range(1, 3)).lengths == encoded.lengths[1:3]


def test_a_picture_stands_wherever_it_is_asked_about(prompter: Prompter, pictures: list[Image.Image]) -> None:
    """The same object, an equal one and others, in any order."""
    first, other = pictures[:2]
    asked = [first, other, first, first.copy(), other]
    prompts = [f"question {place} ?" for place in range(len(asked))]
    together = prompter.encode(asked, prompts)
    alone = Encoded.joined([prompter.encode([one], [text]) for one, text in zip(asked, prompts, strict=True)])
    np.testing.assert_array_equal(together.pixel_values, alone.pixel_values)
    assert all(map(np.array_equal, together.input_ids, alone.input_ids))
    assert not np.array_equal(together.pixel_values[0], together.pixel_values[1])


def test_raw_prompt_is_the_whole_text(prompter: Prompter, pictures: list[Image.Image]) -> None:
    text = prompter.text("is there a red circle?")
    assert text.count("<image>") == 1
    raw, plain = (
        prompter.encode(pictures[:1], [text], raw=True),
        prompter.encode(pictures[:1], ["is there a red circle?"]),
    )
    np.testing.assert_array_equal(raw.input_ids[0], plain.input_ids[0])


def test_begin_token_is_not_doubled(prompter: Prompter, pictures: list[Image.Image]) -> None:
    text = prompter.text("is there a red circle?")
    ids = prompter.encode(pictures[:1], [f"<s>{text}"], raw=True).input_ids[0]
    np.testing.assert_array_equal(ids, prompter.encode(pictures[:1], [text], raw=True).input_ids[0])


def test_a_conversation_is_the_chat_template_s(prompter: Prompter, pictures: list[Image.Image]) -> None:
    turns = ["is there a red circle?", "yes", "where is it?"]
    encoded = prompter.conversation(pictures[0], turns[0], turns[1:])
    processor = AutoProcessor.from_pretrained(prompter.folder)
    messages = [
        {"role": role, "content": [*([{"type": "image"}] if number == 0 else []), {"type": "text", "text": text}]}
        for number, (role, text) in enumerate(zip(["user", "assistant", "user"], turns, strict=True))
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    wanted = processor(images=[pictures[0]], text=[text], return_tensors="np")
    np.testing.assert_array_equal(encoded.input_ids[0], wanted["input_ids"][0])
    with pytest.raises(InputError, match="stands for a picture"):
        prompter.conversation(pictures[0], turns[0], ["yes", "and <image>"])


def test_samples_join_to_the_batch_they_would_be(prompter: Prompter, pictures: list[Image.Image]) -> None:
    prompts = ["is there a red circle?", "zebra?"]
    whole = prompter.encode(pictures[:2], prompts)
    joined = Encoded.joined([prompter.encode([image], [text]) for image, text in zip(pictures, prompts, strict=False)])
    np.testing.assert_array_equal(joined.pixel_values, whole.pixel_values)
    assert joined.lengths == whole.lengths and joined.unknown == whole.unknown == (0, 1)


def test_unknown_words_are_counted(prompter: Prompter, pictures: list[Image.Image]) -> None:
    assert prompter.encode(pictures[:2], ["is there a red circle?", "zebra xylophone?"]).unknown == (0, 2)


@pytest.mark.parametrize(
    ("prompt", "raw", "words"),
    [
        ("", False, "prompt is empty"),
        (" \n", True, "prompt is empty"),
        ("no picture here", True, "0 times"),
        ("look at the picture below. USER: <image> <image> what ASSISTANT:", True, "2 times"),
        ("what is <image>", False, "stands for a picture"),
        ("USER: <image> what ASSISTANT:", True, "tokens before the image"),
        ("look at the picture below. USER: <image>", True, "no text after the image"),
    ],
)
def test_prompts_that_do_not_fit(
    prompter: Prompter, pictures: list[Image.Image], prompt: str, raw: bool, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        prompter.encode(pictures[:1], [prompt], raw=raw)
    assert caught.value.exit_code == 2
    assert len(caught.value.lines()) <= 3


def test_counts_must_agree(prompter: Prompter, pictures: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="2 pictures and 1 prompts"):
        prompter.encode(pictures[:2], ["what?"])
    with pytest.raises(InputError, match="0 pictures"):
        prompter.encode([], [])


def test_profile_of_other_shapes(prompter: Prompter, pictures: list[Image.Image]) -> None:
    from btp_export.exporting import Options, make_profiles

    profile = make_profiles(open_model("demo"), Options())[0]
    encoded = prompter.encode(pictures[:1], ["what?"], profile=profile)
    with pytest.raises(InputError, match="576 image tokens"):
        encoded.check(profile.model_copy(update={"image_tokens": 144, "grid": (12, 12)}))
    with pytest.raises(InputError, match="576 image tokens from 96 x 96"):
        encoded.check(profile.model_copy(update={"image_size": (336, 336)}))


def test_folder_without_processor(tmp_path: Path, demo_checkpoint: Path) -> None:
    spec = open_model("demo").spec
    with pytest.raises(InputError, match="holds no usable processor"):
        Prompter(tmp_path, spec)
    shutil.copyfile(demo_checkpoint / "config.json", tmp_path / "config.json")
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"processor_config\.json is not JSON"):
        Prompter(tmp_path, spec)


def test_folder_without_chat_template(tmp_path: Path, demo_checkpoint: Path, pictures: list[Image.Image]) -> None:
    for file in demo_checkpoint.glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    plain = Prompter(tmp_path, open_model("demo").spec)
    with pytest.raises(InputError, match="--raw-prompt"):
        plain.encode(pictures[:1], ["what?"])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no pictures, please') }}")
    with pytest.raises(InputError, match="no pictures, please"):
        Prompter(tmp_path, open_model("demo").spec).encode(pictures[:1], ["what?"])
    (tmp_path / "chat_template.jinja").write_text("USER: {{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(InputError, match="writes no <image>"):
        Prompter(tmp_path, open_model("demo").spec).encode(pictures[:1], ["what?"])


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 300)])
def test_tiny_pictures_keep_their_colour(prompter: Prompter, size: tuple[int, int]) -> None:
    """Three pixels in a row must not be taken for three channels."""
    pixels = prompter.encode([Image.new("RGB", size, (200, 100, 50))], ["what?"]).pixel_values[0]
    wanted = (np.array([200, 100, 50]) / 255 - 0.35) / 0.25
    np.testing.assert_allclose(pixels.reshape(3, -1), np.broadcast_to(wanted[:, None], (3, 96 * 96)), atol=1e-5)
