"""The model's own answers against transformers' `generate`, with everything in memory and with keys kept on disk."""

from pathlib import Path

import pytest
import torch

from calibrate.place.counts import Shape
from calibrate.reference.answers import greedy_answers
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.resume import work_folder
from tests.calibrate.models import checkpoint, make_input, make_llava

LAYERS, SIDE, TOKENS = 5, 4, 7
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    # Two lengths, so that batches of one length and of several samples both occur.
    collected = [make_input(model, text=3 + seed % 2, seed=seed) for seed in range(5)]
    wanted = []
    for prompt, pixels in collected:
        ids = prompt.input_ids[None]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        wanted.append(tuple(out[0, ids.shape[1] :].tolist()))
    return checkpoint(folder), [prompt for prompt, _ in collected], wanted


def test_answers_are_generates(setup) -> None:
    files, inputs, wanted = setup
    steps: list[tuple[int, int]] = []
    got = greedy_answers(
        StreamedReference(files),
        inputs,
        SHAPE.plan(()),
        tokens=TOKENS,
        progress=lambda done, all_, text="": steps.append((done, all_)),
    )
    assert got == wanted and len({token for answer in wanted for token in answer}) > 5
    assert steps == sorted(steps) and steps[-1] == (LAYERS * TOKENS, LAYERS * TOKENS)


def test_an_answer_ends_with_its_end_token(setup) -> None:
    files, inputs, wanted = setup
    end = wanted[0][2]
    got = greedy_answers(StreamedReference(files), inputs, SHAPE.plan(()), tokens=TOKENS, ends=(end,))
    for answer, whole in zip(got, wanted, strict=True):
        assert answer == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert got[0][-1] == end and len(got[0]) <= 3


def test_keys_on_disk_in_half_precision_give_the_same_answers(setup, tmp_path: Path) -> None:
    files, inputs, wanted = setup
    with work_folder(tmp_path, "0" * 32, lambda text: None) as work:
        reference = StreamedReference(files, work=work, spill_above=0)
        got = greedy_answers(reference, inputs, SHAPE.plan(()), tokens=TOKENS)
        kept = list(work.folder.glob("answer-*.npy"))
    assert got == wanted
    assert len(kept) == len(inputs) * LAYERS * 2, "keys and values of every layer lie on disk"


def test_teacher_forcing_the_answer_finds_it_again(setup) -> None:
    """The answers' tokens ride behind the prompt, and the logits there have them as their likeliest."""
    files, inputs, wanted = setup
    forced = [
        ReferenceInput(prompt.input_ids, prompt.image_features, new_tokens=answer[:-1])
        for prompt, answer in zip(inputs, wanted, strict=True)
    ]
    runs = StreamedReference(files).run(forced, SHAPE.plan(()))
    assert [tuple(run.next_tokens) for run in runs] == wanted
