"""Answers over HTTP, asked with OpenAI's own client, are those of the model that is asked alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from btp_export.running.runtime import BundleModel, Generation
from tests.btp_export.families import parity
from tests.btp_export.serving.conftest import KEY
from tests.btp_export.serving.running import Server, question

if TYPE_CHECKING:
    import openai  # takes a second, which only the process that runs these tests need spend

PROMPT = "what color is the circle ?"


@pytest.fixture(scope="module")
def client(serving: Server) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{serving.addresses[0]}/v1", api_key="none", max_retries=0)


def expected(alone: dict[str, BundleModel], picture: Image.Image, prompt: str, **settings: Any) -> Generation:
    for model in alone.values():
        if model.profile.image_size == (picture.height, picture.width):
            return model.generate(picture, prompt, **settings)[0]
    raise AssertionError(picture.size)


def asked(client: openai.OpenAI, picture: Image.Image, *turns: str, **settings: Any) -> Any:
    messages: Any = question(picture, *turns)
    return client.chat.completions.create(model="tiny", messages=messages, **settings)


def test_answers_and_usage(
    client: openai.OpenAI, alone: dict[str, BundleModel], square: Image.Image, wide: Image.Image
) -> None:
    """Each picture gets the profile of its size."""
    for picture, tokens in ((square, 192), (wide, 114)):
        wanted = expected(alone, picture, PROMPT)
        got = asked(client, picture, PROMPT)
        [choice] = got.choices
        assert choice.message.content == wanted.text and len(wanted.text) > 10
        assert choice.finish_reason == "length" and got.usage.completion_tokens == len(wanted.token_ids) == 12
        details = got.usage.prompt_tokens_details
        assert (details.image_tokens, tuple(details.tokens_kept)) == (tokens, wanted.tokens_kept)
        text = got.usage.prompt_tokens - tokens
        assert 10 < text < 60 and details.pruned_prompt_tokens == text + wanted.tokens_kept[-1]
        assert got.usage.total_tokens == got.usage.prompt_tokens + 12


def test_the_same_picture_again(
    client: openai.OpenAI, serving: Server, alone: dict[str, BundleModel], square: Image.Image
) -> None:
    """The vision graph does not run for a question about the picture of the batch before, and the answer is right."""
    other = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    asked(client, other, PROMPT)
    before = serving.number("btp_same_pictures_total")
    for picture, prompt, times in ((square, PROMPT, 0), (square, "where is the ring?", 1), (other, PROMPT, 1)):
        wanted = expected(alone, picture, prompt)
        assert asked(client, picture, prompt).choices[0].message.content == wanted.text
        assert serving.number("btp_same_pictures_total") - before == times


def test_a_stream_is_the_same_text_and_more_than_one_piece(client: openai.OpenAI, square: Image.Image) -> None:
    whole = asked(client, square, PROMPT)
    chunks = list(asked(client, square, PROMPT, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices[0].delta.content]
    assert "".join(texts) == whole.choices[0].message.content and len(texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"


def test_stop_texts(client: openai.OpenAI, square: Image.Image) -> None:
    text = asked(client, square, PROMPT).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    settings = {"stop": ["nowhere to be found", stop]}
    got = asked(client, square, PROMPT, **settings)
    assert got.choices[0].message.content == text.partition(stop)[0] != text
    assert got.choices[0].finish_reason == "stop" and got.usage.completion_tokens < 12
    pieces = [chunk.choices[0].delta.content or "" for chunk in asked(client, square, PROMPT, stream=True, **settings)]
    assert "".join(pieces) == text.partition(stop)[0]


def test_the_tokens_that_were_kept(client: openai.OpenAI, alone: dict[str, BundleModel], wide: Image.Image) -> None:
    wanted = expected(alone, wide, PROMPT)
    for stream in (False, True):
        got = asked(client, wide, PROMPT, stream=stream, extra_body={"include_kept": True})
        document = next(chunk for chunk in got if hasattr(chunk, "kept")) if stream else got
        stages = document.kept
        assert [tuple(stage["tokens"]) for stage in stages] == [tuple(indices.tolist()) for indices in wanted.kept]
        assert [len(stage["cells"]) for stage in stages] == [alone[wanted_profile(alone, wide)].plan.grid[0]] * len(
            stages
        )
    assert not hasattr(asked(client, wide, PROMPT), "kept")


def wanted_profile(alone: dict[str, BundleModel], picture: Image.Image) -> str:
    return next(name for name, model in alone.items() if model.profile.image_size == (picture.height, picture.width))


def test_a_conversation(client: openai.OpenAI, alone: dict[str, BundleModel], square: Image.Image) -> None:
    import openai

    turns = ("what color is the circle ?", "red", "is there a blue square ?")
    model = alone[wanted_profile(alone, square)]
    encoded = model.prompter.conversation(square, turns[0], turns[1:], profile=model.profile)
    [wanted] = model.greedy(model.prefill(encoded), encoded, 12)
    got = asked(client, square, *turns)
    assert got.choices[0].message.content == model.prompter.decode(wanted.ids)
    assert got.choices[0].message.content != asked(client, square, turns[0]).choices[0].message.content
    assert got.usage.prompt_tokens == encoded.lengths[0]
    with pytest.raises(openai.BadRequestError, match="at most 48") as caught:
        asked(
            client, square, *turns, "yes", *["where is it and what color has the square there ?", "left"] * 3, "why ?"
        )
    assert "text bucket" in str(caught.value)


def test_requests_of_a_batch_do_not_know_of_each_other(
    serving: Server, client: openai.OpenAI, alone: dict[str, BundleModel]
) -> None:
    """Twelve at a time, of two sizes, each with settings of its own: what each would get alone."""
    cases = [
        (
            parity.picture(*(((48, 48), (40, 72))[number % 3 == 0]), seed=number),
            ["where is it ?", PROMPT, "is there a star ?"][number % 3],
            {"temperature": [0.0, 0.7, 1.5][number % 3], "top_p": [1.0, 0.9][number % 2], "seed": number},
            1 + number,
        )
        for number in range(12)
    ]
    before = serving.number("btp_batch_requests_sum"), serving.number("btp_batch_requests_count")
    with ThreadPoolExecutor(12) as threads:
        got = list(threads.map(lambda case: retried(client, case), cases))
    for (picture, prompt, settings, room), answer in zip(cases, got, strict=True):
        wanted = expected(alone, picture, prompt, max_new_tokens=room, **settings)
        assert answer.choices[0].message.content == wanted.text
        assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert serving.number("btp_batch_requests_count") == before[1] + 12
    assert serving.number("btp_batch_requests_sum") > before[0] + 12, "some shared a batch"


def retried(client: openai.OpenAI, case: Any) -> Any:
    """The queue of the tests' server is short: its 429 says to come again."""
    picture, prompt, settings, room = case
    patient = client.with_options(max_retries=20)
    return asked(patient, picture, prompt, max_tokens=room, **settings)


def test_models_and_the_key(serving: Server, client: openai.OpenAI, square: Image.Image) -> None:
    import openai

    [model] = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    assert [profile["image_size"] for profile in model.profiles] == [[48, 48], [40, 72]]  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    address = f"{serving.addresses[1]}/v1"
    keyed = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    assert asked(keyed, square, PROMPT, max_tokens=1).usage.completion_tokens == 1
    with pytest.raises(openai.AuthenticationError):
        asked(openai.OpenAI(base_url=address, api_key=f"{KEY}!", max_retries=0), square, PROMPT)
