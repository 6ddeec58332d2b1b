"""What a hostile chat template or picture does to the process that meets it, and not to the server."""

import asyncio
import io
import json
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export.running.runtime import BundleModel
from btp_export.serving.preparing_client import PreparingClient
from btp_export.serving.preparing_process import Options
from btp_export.serving.questions import Question
from btp_export.serving.refusals import Refusal
from graphs.files.atomic import record
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from tests.graphs.files.test_bundle import sealed

HOSTILE = (
    "{% set words = messages[0]['content'] | string %}"
    "{% if 'endless' in words %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
    "{% if 'memory' in words %}{% set n = namespace(x='a' * 1000) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}{% endif %}{% if 'broken' in words %}{{ words.nothing.more }}{% endif %}"
)


@pytest.fixture(scope="module")
def hostile(served_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The served bundle with a template that is kind to some questions only, by somebody who knows its digest."""
    root = Path(shutil.copytree(served_bundle.root, tmp_path_factory.mktemp("hostile") / "bundle"))
    path = root / "processor" / "preprocess.json"
    document = json.loads(path.read_text())
    document["text"]["template"] = HOSTILE + document["text"]["template"]
    path.write_text(json.dumps(document))
    files = [
        record(root, entry.file) if entry.file.endswith(path.name) else entry
        for entry in served_bundle.manifest.processor
    ]
    bundle = Bundle(root, served_bundle.manifest, served_bundle.plan, served_bundle.profile_plans)
    sealed(bundle, processor=tuple(files))
    return Bundle.open(root)


def options(bundle: Bundle) -> Options:
    profiles = tuple(profile.name for profile in bundle.manifest.profiles)
    return Options(str(bundle.root), profiles, resize=False, seconds=20.0, memory=2**29, pixels=10**6)


def with_process(chosen: Options, work: Callable[[PreparingClient], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        client = PreparingClient(chosen)
        await client.start()
        try:
            await work(client)
        finally:
            await client.stop()

    asyncio.run(whole())


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def question(text: str) -> Question:
    return Question("", text, (), None)


def test_what_it_takes_is_what_the_model_takes(
    served_bundle: Bundle, alone: dict[str, BundleModel], square: Image.Image, wide: Image.Image
) -> None:
    async def work(client: PreparingClient) -> None:
        for picture in (square, wide):
            profile, encoded = await client.prepare(question("where is it ?"), png(picture))
            wanted = alone[profile].encode([picture], ["where is it ?"])
            assert alone[profile].profile.image_size == (picture.height, picture.width)
            np.testing.assert_array_equal(encoded.input_ids[0], wanted.input_ids[0])
            np.testing.assert_array_equal(encoded.pixel_values, wanted.pixel_values)
            rest = [(one.prefix_tokens, one.image_tokens, one.unknown) for one in (encoded, wanted)]
            assert rest[0] == rest[1]

    with_process(options(served_bundle), work)


def test_hostile_templates(hostile: Bundle, square: Image.Image, capfd: pytest.CaptureFixture[str]) -> None:
    async def work(client: PreparingClient) -> None:
        async def refusal(text: str) -> Refusal:
            with pytest.raises(Refusal) as caught:
                await client.prepare(question(text), png(square))
            assert caught.value.status == 400 and str(hostile.root) not in caught.value.message
            return caught.value

        first = client.process_id
        assert "the bundle" in (await refusal("broken ?")).message
        assert "more than 1000000 characters" in (await refusal("memory ?")).message
        await client.prepare(question("where is it ?"), png(square))
        assert client.process_id == first
        # The alarm comes before the template's own limit. Who waits behind gets an answer, from a new process.
        endless = asyncio.ensure_future(refusal("endless ?"))
        behind = asyncio.ensure_future(client.prepare(question("where is it ?"), png(square)))
        assert "takes longer than 1.5 s" in (await endless).message
        await behind
        assert client.process_id != first

    with_process(replace(options(hostile), seconds=1.5), work)
    assert "ended its process" in capfd.readouterr().err


def test_a_caller_that_goes_away_leaves_nothing_half_done(served_bundle: Bundle, square: Image.Image) -> None:
    async def work(client: PreparingClient) -> None:
        leaving = asyncio.ensure_future(client.prepare(question("is there a star ?"), png(square)))
        await asyncio.sleep(0)
        leaving.cancel()
        _, encoded = await client.prepare(question("where ?"), png(square))
        _, again = await client.prepare(question("where ?"), png(square))
        np.testing.assert_array_equal(encoded.input_ids[0], again.input_ids[0])

    with_process(options(served_bundle), work)


def test_a_broken_processor_is_said_at_the_start(served_bundle: Bundle, tmp_path: Path) -> None:
    async def start() -> None:
        await PreparingClient(replace(options(served_bundle), bundle=str(tmp_path / "nowhere"))).start()

    with pytest.raises(InputError, match="the bundle"):
        asyncio.run(start())
