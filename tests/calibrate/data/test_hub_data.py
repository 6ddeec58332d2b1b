"""Pictures from Hugging Face data sets; without the library only what is said."""

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibrate.data import hub_data, samples, sources
from graphs.records.errors import InputError, UnavailableError

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the library `datasets` is not installed"
)


def png(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "png")
    return stream.getvalue()


def saved(folder: Path, rows: dict[str, list[Any]], **features: Any) -> Path:
    import datasets

    image = {"picture": datasets.Image()} if "picture" in rows else {}
    kinds = datasets.Features({**image, **{name: datasets.Value("string") for name in rows if name != "picture"}})
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(folder))
    return folder


def test_without_the_library_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError) as caught:
        sources.calibration_samples("hf:owner/name:train", count=4, seed=0)
    assert "btp-export[data]" in str(caught.value) and caught.value.exit_code == 3


@needs_datasets
@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:/", "hf:a/b/c", "hf: "])
def test_what_names_no_data_set(source: str) -> None:
    with pytest.raises(InputError, match=f"^{source} names no data set"):
        sources.calibration_samples(source, count=4, seed=0)


@needs_datasets
def test_a_saved_set_with_its_own_questions(tmp_path: Path) -> None:
    rows = {
        "picture": [{"bytes": png(n), "path": None} for n in range(6)],
        "question": [f"what is {n}?" for n in range(6)],
    }
    folder = saved(tmp_path / "set", rows)
    first, again = (sources.calibration_samples(str(folder), count=5, seed=1) for _ in range(2))
    other = sources.calibration_samples(str(folder), count=5, seed=2)
    assert first.digest() == again.digest() != other.digest() and len(first.samples) == 5
    assert first.source == "data set set, column question" and str(tmp_path) not in first.source
    for sample in first.samples:
        number = int(sample.prompt.split()[2][:-1])
        assert sample.image.tobytes() == Image.open(io.BytesIO(png(number))).tobytes(), "picture and question together"


@needs_datasets
def test_unreadable_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    pictures = [{"bytes": png(n) if n % 3 else b"broken", "path": None} for n in range(9)]
    folder = saved(tmp_path / "set", {"picture": pictures})
    said: list[str] = []
    found = sources.calibration_samples(str(folder), count=9, seed=0, note=said.append)
    assert len(found.samples) == 6 and len(found.skipped) == len(said) == 3
    assert all(name.startswith("row ") for name in found.skipped)
    assert {one.prompt for one in found.samples} == set(samples.DEFAULT_PROMPTS)
    with pytest.raises(InputError, match=r"0 usable .*\(5 skipped, 5 found\)"):
        sources.calibration_samples(str(saved(tmp_path / "bad", {"picture": pictures[:1] * 5})), count=9, seed=0)


@needs_datasets
def test_what_is_no_set_of_pictures_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "words", {"text": ["a", "b", "c", "d"]})
    with pytest.raises(InputError, match="no column of pictures: text"):
        sources.calibration_samples(str(folder), count=4, seed=0)


@needs_datasets
def test_a_folder_of_splits(tmp_path: Path) -> None:
    import datasets

    def part(count: int) -> Any:
        rows = {"picture": [{"bytes": png(n), "path": None} for n in range(count)]}
        return datasets.Dataset.from_dict(rows, features=datasets.Features({"picture": datasets.Image()}))

    datasets.DatasetDict({"validation": part(4), "train": part(7)}).save_to_disk(str(tmp_path / "splits"))
    found = sources.calibration_samples(str(tmp_path / "splits"), count=64, seed=0)
    assert len(found.samples) == 7 and found.source.endswith("split train")


@needs_datasets
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UnavailableError, match="cannot reach the hub for owner/name"):
        hub_data.samples(f"{hub_data.PREFIX}owner/name", samples.Choice(count=4, seed=0))


@needs_datasets
def test_a_streamed_set_is_only_read_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read: list[int] = []

    def rows() -> Any:
        for number in range(10_000):
            read.append(number)
            yield {"picture": {"bytes": png(number % 5), "path": None}, "prompt": str(number)}

    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.Value("string")})
    made = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: {"train": made, "test": made})
    found = hub_data.samples("hf:owner/name:train", samples.Choice(count=8, seed=3))
    again = hub_data.samples("hf:owner/name:train", samples.Choice(count=8, seed=3))
    assert found.digest() == again.digest() and found.source == "data set owner/name, split train, column prompt"
    assert len(read) < 2_000
    with pytest.raises(InputError, match="no split 'dev'"):
        hub_data.samples("hf:owner/name:dev", samples.Choice(count=8, seed=3))
