"""The runtime against transformers: the unpruned bundle must be `model.generate`, a pruned one a plain torch loop."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import btp_export
from btp_export.running.runtime import BundleModel
from engines.runners.onnxruntime import OrtLoader
from graphs.records.errors import CheckError, InputError, UnavailableError
from graphs.records.plan import PruningPlan, Stage
from tests.graphs.ops import oracle
from tests.plans import tiny_plan

PROMPTS = ["what colour is the star?", "is there a red circle?", "where is the ring?", "how many objects are there?"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def transformers_inputs(folder: Path, image: Image.Image, prompt: str) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


def transformers_generate(model: Any, folder: Path, image: Image.Image, prompt: str, count: int) -> list[int]:
    inputs = transformers_inputs(folder, image, prompt)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"opset": 18}, {"assemble": "whole"}], ids=str)
def test_unpruned_is_transformers_generate(
    options: dict[str, Any], reference: Any, tiny_checkpoint: Path, tiny_bundle: Any, pictures: list[Image.Image]
) -> None:
    answers = btp_export.load(tiny_bundle(**options), threads=1).generate(pictures, PROMPTS)
    for image, prompt, answer in zip(pictures, PROMPTS, answers, strict=True):
        assert list(answer.token_ids) == transformers_generate(reference, tiny_checkpoint, image, prompt, 12)
    assert len({answer.token_ids for answer in answers}) > 1, "the model says the same to everything: no test"


@pytest.mark.parametrize("batch", [1, 3])
def test_several_questions_about_one_picture(batch: int, tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    """The vision graph runs where the pictures are not those of the batch before; answers are as one by one."""
    bundle = tiny_bundle(tiny_plan(), **({"batch": batch} if batch > 1 else {}))
    alone = [
        btp_export.load(bundle, threads=1).generate(picture, prompt)[0]
        for picture in pictures[:2]
        for prompt in PROMPTS
    ]
    model = btp_export.load(bundle, threads=1)
    answers = [*model.generate(pictures[0], PROMPTS), *model.generate(pictures[1], PROMPTS)]
    for got, wanted in zip(answers, alone, strict=True):
        assert got.token_ids == wanted.token_ids
        assert all(map(np.array_equal, got.kept, wanted.kept))
    ran = [answer.vision_ms is not None for answer in answers]
    assert ran == [place % len(PROMPTS) < batch for place in range(len(answers))]
    assert model.prefill(model.encode(pictures[1:2], PROMPTS[:1])).vision_ms is not None  # to be measured


def test_unpruned_demo_is_transformers_generate(
    demo_checkpoint: Path, demo_bundle: Any, pictures: list[Image.Image]
) -> None:
    reference = LlavaForConditionalGeneration.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    answers = btp_export.load(demo_bundle(), threads=1).generate(pictures, PROMPTS)
    for image, prompt, answer in zip(pictures, PROMPTS, answers, strict=True):
        assert list(answer.token_ids) == transformers_generate(reference, demo_checkpoint, image, prompt, 8)


PLAN = tiny_plan(  # two stages that choose, with every part of the rules, and one that drops all
    Stage(layer=1, keep=20, attention_quota=6, pool=14, boundary=20, diversity_quota=6, seeds=9),
    Stage(layer=3, keep=9, attention_quota=7, pool=10, boundary=9, diversity_quota=2),
    Stage(layer=5, keep=0),
)


class PrunedReference:
    """The pruned model as plainly as possible: no caches, no padding, transformers' layers, one sample at a time."""

    def __init__(self, model: Any, plan: PruningPlan, prefix: int) -> None:
        self.model, self.plan, self.prefix = model, plan, prefix
        self.text = model.model.language_model

    @torch.no_grad()
    def generate(self, inputs: Any, count: int) -> tuple[list[int], list[list[int]]]:
        """Greedy token ids, and the kept indices of each stage among the tokens it chose from."""
        ids = inputs["input_ids"]
        features = self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        image = torch.cat(list(features)).reshape(self.plan.image_tokens, -1)
        prompt, kept, end = ids.shape[1], None, self.model.generation_config.eos_token_id
        new: list[int] = []
        while len(new) < count and (not new or new[-1] != end):
            hidden = self.text.embed_tokens(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1))
            hidden[0, self.prefix : self.prefix + len(image)] = image
            logits, kept = self._forward(hidden, kept, prompt)
            new.append(int(logits.argmax()))
        return new, [indices.tolist() for indices in kept or []]

    def _forward(self, hidden: torch.Tensor, kept: list[torch.Tensor] | None, prompt: int) -> Any:
        """Logits of the last row. `kept` are earlier choices; without, the stages choose from the prompt's rows."""
        positions = torch.arange(hidden.shape[1])
        cos, sin = self.text.rotary_emb(hidden, positions[None])
        chosen: list[torch.Tensor] = []
        stages = {stage.layer: (number, stage) for number, stage in enumerate(self.plan.stages)}
        scores = None
        for index, layer in enumerate(self.text.layers):
            if index in stages:
                number, stage = stages[index]
                count = self.plan.tokens_before(number)
                if kept is not None:
                    indices = kept[number]
                elif stage.keep == 0:
                    indices = torch.empty(0, dtype=torch.long)
                else:
                    indices = self._select(stage, hidden[:, self.prefix : self.prefix + count], scores)
                chosen.append(indices)
                rows = torch.cat(
                    [
                        torch.arange(self.prefix),
                        self.prefix + indices,
                        torch.arange(self.prefix + count, hidden.shape[1]),
                    ]
                )
                hidden, cos, sin = hidden[:, rows], cos[:, rows], sin[:, rows]
            scores = self._last_attention(layer, hidden, cos, sin, index)
            mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            out = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
            hidden = out[0] if isinstance(out, tuple) else out
        return self.model.lm_head(self.text.norm(hidden))[0, -1], chosen

    def _last_attention(self, layer: Any, hidden: torch.Tensor, cos: Any, sin: Any, index: int) -> torch.Tensor:
        """Attention from the last row to every row, mean over heads."""
        attention, normal = layer.self_attn, layer.input_layernorm(hidden)
        split = (1, hidden.shape[1], -1, attention.head_dim)
        query = attention.q_proj(normal).view(split).transpose(1, 2)
        key = attention.k_proj(normal).view(split).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        weights = (query[:, :, -1:] @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
        return weights.mean(1)[0, 0]

    def _select(self, stage: Stage, image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(image[0].float(), dim=-1)
        picks = oracle.select_stage(
            stage,
            scores[self.prefix : self.prefix + image.shape[1]].numpy(),
            (unit @ unit.T).numpy() if stage.needs_similarity else None,
            oracle.grid_seeds(self.plan.grid, stage.seeds),
        )
        return torch.tensor(picks)


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"opset": 18}, {"assemble": "whole"}], ids=str)
def test_pruned_is_the_plain_reference(
    options: dict[str, Any], reference: Any, tiny_checkpoint: Path, tiny_bundle: Any, pictures: list[Image.Image]
) -> None:
    model = btp_export.load(tiny_bundle(PLAN, **options), threads=1)
    answers = model.generate(pictures, PROMPTS)
    plain = PrunedReference(reference, PLAN, prefix=8)
    for image, prompt, answer in zip(pictures, PROMPTS, answers, strict=True):
        ids, kept = plain.generate(transformers_inputs(tiny_checkpoint, image, prompt), 12)
        first, second = np.array(kept[0]), np.array(kept[0])[kept[1]]
        np.testing.assert_array_equal(answer.kept[0], first)
        np.testing.assert_array_equal(answer.kept[1], second)
        assert list(answer.token_ids) == ids
        assert answer.tokens_kept == (20, 9, 0)
    assert len({answer.kept[0].tobytes() for answer in answers}) > 1


@pytest.mark.parametrize("keep", [0, 12])
def test_a_stage_before_the_first_layer(keep: int, tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    stage = Stage(layer=0, keep=keep, **({"diversity_quota": keep} if keep else {}))
    answer = btp_export.load(tiny_bundle(tiny_plan(stage)), threads=1).generate(pictures[0], PROMPTS[0])[0]
    assert answer.tokens_kept == (keep,)
    assert [len(indices) for indices in answer.kept] == [keep]
    assert len(answer.select_ms) == 1


def test_batches_do_not_change_answers(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    """Three samples in a batch of two: one batch is filled up; each row stops by itself; streams do not mix."""
    single = btp_export.load(tiny_bundle(PLAN), threads=1)
    double = btp_export.load(tiny_bundle(PLAN, batch=2), threads=1)
    settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    streamed: dict[int, str] = {}

    def collect(sample: int, piece: str) -> None:
        assert piece
        streamed[sample] = streamed.get(sample, "") + piece

    one = single.generate(pictures[:3], PROMPTS[:3], **settings)
    two = double.generate(pictures[:3], PROMPTS[:3], on_text=collect, **settings)
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in two]
    assert streamed == {sample: answer.text for sample, answer in enumerate(two) if answer.text}
    again = single.generate(pictures[:3], PROMPTS[:3], **settings)
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in again]
    other = single.generate(pictures[:3], PROMPTS[:3], temperature=0.8, top_p=0.9, seed=6)
    assert [answer.token_ids for answer in one] != [answer.token_ids for answer in other]


def test_one_picture_serves_all_prompts(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    shared = model.generate(pictures[0], PROMPTS)
    repeated = model.generate([pictures[0]] * 4, PROMPTS)
    assert [answer.token_ids for answer in shared] == [answer.token_ids for answer in repeated]
    assert len(model.generate(pictures, PROMPTS[0])) == 4


def test_an_answer_stops_at_the_end_token(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    free = model.generate(pictures[0], PROMPTS[0])[0].token_ids
    stop = next(token for token in free if free.index(token) > 0)
    model.spec = model.spec.model_copy(update={"eos_token_ids": (stop,)})
    stopped = model.generate(pictures[0], PROMPTS[0])[0]
    assert stopped.token_ids == free[: free.index(stop) + 1]
    short = model.generate(pictures[0], PROMPTS[0], max_new_tokens=1)[0]
    assert short.token_ids == free[:1]
    assert short.decode_ms_per_token is None


def test_caches_stay_where_they_are(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    """Decoding writes one row of each cache in place: same addresses, other rows untouched, no copy of the cache."""
    model = btp_export.load(tiny_bundle(PLAN, batch=2), threads=1)
    prefill = model.prefill(model.encode(pictures[:2], [PROMPTS[0], "how many objects are there in the picture?"]))
    caches = {layer: tuple(buffer.array for buffer in pair) for layer, pair in model.chain.caches.items()}
    before = {layer: tuple(array.copy() for array in pair) for layer, pair in caches.items()}
    addresses = {layer: tuple(b.pointer for b in pair) for layer, pair in model.chain.caches.items()}
    lengths = [values.copy() for values in prefill.lengths]
    assert lengths[0][0] != lengths[0][1]
    model.decode_step(prefill, [7, 8])
    for segment, length in zip(model.chain.segments, lengths, strict=True):
        for layer in range(segment.start, segment.stop):
            for old, new in zip(before[layer], caches[layer], strict=True):
                changed = np.argwhere((old != new).any(axis=(1, 3)))
                assert changed.tolist() == [[0, length[0]], [1, length[1]]]
    assert addresses == {layer: tuple(b.pointer for b in pair) for layer, pair in model.chain.caches.items()}
    assert [values.tolist() for values in model.chain.lengths] == [(values + 1).tolist() for values in lengths]
    capacities = {layer: pair[0].shape[2] for layer, pair in model.chain.caches.items()}
    room = 8 + 16 + 12
    assert list(capacities.values()) == [36 + room, 20 + room, 20 + room, 9 + room, 9 + room, room]


def test_the_graph_reads_the_cache_itself(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    """A row changed in the buffer changes the next logits, a row beyond the valid length does not."""
    model = btp_export.load(tiny_bundle(), threads=1)
    encoded = model.encode(pictures[:1], PROMPTS[:1])

    def logits(row: int | None) -> Any:
        prefill = model.prefill(encoded)
        if row is not None:
            model.chain.caches[2][1].array[:, :, row] += 1.0
        return model.decode_step(prefill, [7])

    length = encoded.lengths[0]
    assert not np.array_equal(logits(None), logits(length - 1))
    np.testing.assert_array_equal(logits(None), logits(length + 3))


def test_wrong_use_is_told(tiny_bundle: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    with pytest.raises(InputError, match="13 new tokens"):
        model.generate(pictures[0], PROMPTS[0], max_new_tokens=13)
    with pytest.raises(InputError, match="0 new tokens"):
        model.generate(pictures[0], PROMPTS[0], max_new_tokens=0)
    with pytest.raises(InputError, match="3 pictures and 2 prompts"):
        model.generate(pictures[:3], PROMPTS[:2])
    for other in (np.zeros((8, 8, 3), np.uint8), b"\x89PNG", None):
        with pytest.raises(
            InputError, match=r"a picture of type (ndarray|bytes|NoneType)\nwanted: the name of a file or a PIL image"
        ):
            model.generate(other, ["red ?"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"prompts is \[b'red \?'\]\nwanted: text or a sequence of text"):
        model.generate(pictures[0], [b"red ?"])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"activations is 'int4'\nwanted: 'int8' or 'float32'"):
        btp_export.load(model.bundle, activations="int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 pictures and 0 prompts"):
        model.generate([], [])
    with pytest.raises(InputError, match="2 samples"):
        model.prefill(model.encode(pictures[:2], PROMPTS[:2]))
    with pytest.raises(InputError, match=r"25 tokens after the image(.|\n)*at most 16(.|\n)*--text-tokens 32"):
        model.generate(pictures[0], "red " * 24)
    encoded = model.encode(pictures[:1], PROMPTS[:1])
    first = model.prefill(encoded)
    second = model.prefill(encoded)
    with pytest.raises(InputError, match="later batch"):
        model.decode_step(first, [7])
    with pytest.raises(InputError, match="2 token ids"):
        model.decode_step(second, [7, 7])
    words = model.bundle.spec.decoder.vocab_size
    with pytest.raises(InputError, match=f"token ids from {words}"):
        model.decode_step(second, [words])
    for _ in range(16 - encoded.text_lengths[0] + 12):
        model.decode_step(second, [7])
    with pytest.raises(InputError, match="caches are full"):
        model.decode_step(second, [7])
    with pytest.raises(InputError, match="no profile big"):
        btp_export.load(tiny_bundle(), profile="big")
    with pytest.raises(InputError, match="no bundle at"):
        btp_export.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("stage", "words"),
    [(0, "pruning did not happen"), (1, "stage 1 kept the wrong tokens"), (2, "cannot run head.onnx")],
)
def test_pruning_that_did_not_happen_is_a_failure(
    stage: int, words: str, tiny_bundle: Any, pictures: list[Image.Image]
) -> None:
    """A stage that tells a wrong length, one that keeps a token again and again, and a kernel that fails."""
    model = BundleModel(tiny_bundle(PLAN), OrtLoader(threads=1, joins=False))
    damage = {
        0: lambda: model.chain._last[1].write(np.array([30], np.int32)),
        1: lambda: model.chain._kept[1].write(np.full((1, 9), 3, np.int32)),
        2: lambda: model.chain._last[3].write(np.array([10**6], np.int32)),
    }[stage]
    steps = model.chain._steps
    place = next(n for n, step in enumerate(steps) if step.name == f"select_{stage}")
    steps[place] = replace(steps[place], copies=damage)
    with pytest.raises(CheckError, match=words):
        model.prefill(model.encode(pictures[:1], PROMPTS[:1]))


def test_graphs_of_another_plan_are_refused(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(PLAN)
    stages = (*PLAN.stages[:2], Stage(layer=4, keep=0))
    with pytest.raises(InputError, match=r"does not fit the plan|no graph|is float32"):
        btp_export.load(replace(bundle, plan=tiny_plan(*stages)))
    with pytest.raises(InputError, match=r"does not fit the plan|no graph|is float32"):
        btp_export.load(replace(bundle, plan=tiny_plan()))


def test_float16_bundle_is_close_to_float32(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    wide = btp_export.load(tiny_bundle(), threads=1)
    narrow = btp_export.load(tiny_bundle(precision="float16"), threads=1)
    assert (wide.chain.dtype, narrow.chain.dtype) == (np.float32, np.float16)
    encoded = wide.encode(pictures[:1], PROMPTS[:1])
    one, two = wide.prefill(encoded), narrow.prefill(encoded)
    assert two.logits.dtype == np.float32
    np.testing.assert_allclose(two.logits, one.logits, atol=0.05 * np.abs(one.logits).max())
    np.testing.assert_allclose(
        narrow.decode_step(two, [7]), wide.decode_step(one, [7]), atol=0.05 * np.abs(one.logits).max()
    )


def test_bfloat16_does_not_run_on_the_cpu(tiny_bundle: Any) -> None:
    with pytest.raises(UnavailableError, match=r"cannot open(.|\n)*--device cuda, or export with --precision float32"):
        btp_export.load(tiny_bundle(precision="bfloat16"), threads=1)


# -- threads ---------------------------------------------------------------------------------------------------------


def test_threads_wait_for_each_other(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    calls = [(picture, prompt) for picture in pictures for prompt in PROMPTS] * 2
    alone = [model.generate([picture], [prompt])[0].token_ids for picture, prompt in calls]
    assert len(set(alone)) > 4, "the model says the same to everything: no test"
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: model.generate([call[0]], [call[1]])[0].token_ids, calls))
    assert together == alone


def test_a_thread_whose_caches_are_gone_is_told(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    model = btp_export.load(tiny_bundle(), threads=1)
    result = model.prefill(model.encode(pictures[:1], PROMPTS[:1]))
    other = threading.Thread(target=lambda: model.prefill(model.encode(pictures[1:2], PROMPTS[:1])))
    other.start()
    other.join()
    with pytest.raises(InputError, match="hold a later batch"):
        model.decode_step(result, [5])


def test_weights_that_are_links_out_of_the_bundle(tiny_bundle: Any, tmp_path: Path) -> None:
    """As `cp -rs` and stores of files make them; ONNX Runtime follows none."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle().root, copy)
    for file in (copy / "graphs" / "weights").iterdir():
        shutil.move(file, tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    with pytest.raises(InputError, match=r"symbolic links that lead out(.|\n)*cp -rL"):
        btp_export.load(copy)
    shutil.copytree(copy, tmp_path / "whole")
    assert btp_export.load(tmp_path / "whole").bundle.plan
