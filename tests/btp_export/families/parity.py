"""What every family must show on a small random model of transformers' real classes, through the whole pipeline.

The references are transformers' `generate` and `forward` on the whole model in memory, and for pruned plans a plain
pruned forward over transformers' own layers (`pruned_run`), which shares no code with the toolkit: selection in Python
loops, spatial seeds from fractions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from btp_export.exporting import Options, export_bundle
from btp_export.measuring.verify import verify_bundle
from btp_export.model.open_model import open_model
from btp_export.planning.plan_files import plan_for
from btp_export.running.runtime import BundleModel, load
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.records.match_plan import spec_at
from graphs.records.plan import PruningPlan, Stage
from tests.graphs.ops import oracle

WORDS = 88  # of the demo's tokenizer, which the random models use
PRESETS = ("none", "btp-paper", "fastv")
PROMPTS = (  # of several lengths, all in one bucket
    "what color is the circle ?",
    "is there a red circle ?",
    "how many squares are there ?",
)
HIDDEN, COSINE = 1e-4, 1e-9  # the most that float32 hidden states and 1 - cosine may be off


@dataclass
class Subject:
    """A checkpoint folder, and transformers' whole model and processor opened from it."""

    folder: Path
    model: Any
    processor: Any
    positions: Callable[[Any, int], torch.Tensor] = field(default=lambda inputs, count: torch.arange(count)[None])
    """The model's own position ids [1, count] (or [3, 1, count]) for the processor's inputs and what follows."""

    def inputs(self, picture: Image.Image, prompt: str) -> Any:
        """What transformers' processor makes of a picture and a prompt in the chat template."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return self.processor(images=[picture.convert("RGB")], text=[text], return_tensors="pt")

    def generate(self, picture: Image.Image, prompt: str, count: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens of `model.generate`, and the logits of the prompt's last token."""
        inputs = self.inputs(picture, prompt)
        with torch.no_grad():
            whole = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)
            logits = self.model(**inputs).logits[0, -1]
        return whole[0, inputs["input_ids"].shape[1] :].tolist(), logits.numpy()

    def features(self, inputs: Any) -> torch.Tensor:
        """Image features [V, C]."""
        arguments = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        arguments.pop("mm_token_type_ids", None)
        with torch.no_grad():
            return torch.cat(list(self.model.model.get_image_features(**arguments).pooler_output))


def random_weights(model: Any, *, seed: int = 0) -> Any:
    """Weights larger than a fresh model's, so that attention is sharp and answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("language_model" in name or "lm_head" in name):
                weight.normal_(std=0.6 if "embed" in name else 2.4 / weight.shape[1] ** 0.5 / 2)
            elif "norm" in name and "language_model" in name:
                weight.uniform_(0.5, 1.5)
    return model.float().eval()


def save(model: Any, demo: Path, folder: Path, processor: dict[str, Any]) -> None:
    """Write a checkpoint: transformers' model, and the demo's tokenizer and chat template with this processor."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(demo / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["processor_class"] = processor["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(processor))


def export(folder: Path, out: Path, *, plan: PruningPlan | None = None, **options: Any) -> Bundle:
    """The bundle, unpruned if there is no plan; other plans are derived from it."""
    model = open_model(str(folder))
    chosen = Options(**{"text_tokens": 16, "new_tokens": 8} | options)
    return export_bundle(model, plan or plan_for("none", model.spec), out, chosen)


def with_preset(bundle: Bundle, preset: str, out: Path, profile: str | None = None) -> Bundle:
    """The bundle with a preset made for a profile's image tokens; the others' plans follow from it."""
    plan = plan_for(preset, spec_at(bundle.spec, bundle.profile(profile)))
    return bundle if preset == "none" else derive(bundle, plan, out)


def check_verified(bundle: Bundle, profile: str, *, samples: int = 3) -> None:
    """Every graph against transformers' layers: hidden states, 1 - cosine, kept sets, generated tokens."""
    result = verify_bundle(bundle, samples=samples, profile=profile, threads=1)
    assert result.failures == ()
    assert result.passed and result.tokens_equal
    assert result.near_ties == ()
    assert all(share == 1.0 for share in result.kept_agreement)
    names = {graph.name for graph in result.graphs}
    assert {"vision", "prefill_0", "head", "decode"} <= names
    for graph in result.graphs:
        assert 1 - graph.cosine < COSINE, graph
        assert graph.max_abs < HIDDEN, graph


def check_unpruned(subject: Subject, model: BundleModel, pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Tokens equal `model.generate` one for one, first logits equal `forward`; gives the tokens."""
    count = model.profile.new_tokens
    answers = model.generate(list(pictures), list(PROMPTS[: len(pictures)]))
    for number, (picture, prompt, answer) in enumerate(zip(pictures, PROMPTS, answers, strict=False)):
        tokens, logits = subject.generate(picture, prompt, count)
        assert list(answer.token_ids) == tokens, prompt
        encoded = model.encode([picture], [prompt])
        got = model.prefill(encoded).logits[0]
        np.testing.assert_allclose(
            got, logits, atol=HIDDEN * max(1.0, float(np.abs(logits).max())), err_msg=str(number)
        )
    return [list(answer.token_ids) for answer in answers]


def check_pruned(subject: Subject, model: BundleModel, pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Kept sets and tokens equal those of a plain pruned forward over transformers' layers; gives the tokens."""
    answers = model.generate(list(pictures), list(PROMPTS[: len(pictures)]))
    for picture, prompt, answer in zip(pictures, PROMPTS, answers, strict=False):
        built = list(answer.token_ids)
        logits, kept = pruned_run(subject, subject.inputs(picture, prompt), model.plan, built[:-1])
        assert logits.argmax(dim=1).tolist() == built, prompt
        assert [indices.tolist() for indices in answer.kept] == [list(stage) for stage in kept], prompt
    return [list(answer.token_ids) for answer in answers]


@torch.no_grad()
def pruned_run(
    subject: Subject, inputs: Any, plan: PruningPlan, new_tokens: Sequence[int]
) -> tuple[torch.Tensor, list[list[int]]]:
    """Whole model in memory: logits [1 + N, vocabulary] after the prompt and each of N new tokens; kept tokens among V.

    Stages see the prompt only; tokens that follow are there for their own rows.
    """
    decoder = subject.model.model.language_model
    prompt = inputs["input_ids"][0]
    places = torch.nonzero(prompt == subject.model.config.image_token_id).flatten()
    assert len(places) == plan.image_tokens
    start = int(places[0])
    # A generated placeholder is a word like any other; those of the prompt may lie past the table.
    words = torch.where(prompt == prompt[start], 0, prompt)
    ids = torch.cat([words, torch.tensor(list(new_tokens), dtype=torch.int64)])
    hidden = subject.model.get_input_embeddings()(ids)[None]
    hidden[0, start : start + plan.image_tokens] = subject.features(inputs)
    cos, sin = decoder.rotary_emb(hidden, subject.positions(inputs, len(ids)))
    alive, kept = list(range(plan.image_tokens)), []
    query = key = None
    for number, layer in enumerate(decoder.layers):
        for at, stage in enumerate(plan.stages):
            if stage.layer != number:
                continue
            last = hidden.shape[1] - len(new_tokens) - 1
            picks = _picks(plan, at, stage, hidden[0], query, key, start=start, count=len(alive), last=last)
            stop = start + len(alive)
            rows = [*range(start), *(start + pick for pick in picks), *range(stop, hidden.shape[1])]
            hidden, cos, sin = hidden[:, rows], cos[:, rows], sin[:, rows]
            alive = [alive[pick] for pick in picks]
            kept.append(alive)
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (1, hidden.shape[1], -1, attention.head_dim)
        query, key = apply_rotary_pos_emb(
            attention.q_proj(normed).view(shape).transpose(1, 2),
            attention.k_proj(normed).view(shape).transpose(1, 2),
            cos,
            sin,
        )
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return subject.model.lm_head(decoder.norm(hidden))[0, -len(new_tokens) - 1 :], kept


def _picks(
    plan: PruningPlan,
    number: int,
    stage: Stage,
    hidden: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    *,
    start: int,
    count: int,
    last: int,
) -> list[int]:
    """Indices that one stage keeps among its `count` tokens; `last` is the prompt's last row."""
    if stage.keep == 0:
        return []
    scores = np.zeros(count, np.float32)
    if query is not None and key is not None:
        heads = query.shape[1] // key.shape[1]
        products = query[0, :, last : last + 1] @ key[0, :, : last + 1].repeat_interleave(heads, 0).transpose(1, 2)
        weights = torch.softmax(products / query.shape[-1] ** 0.5, -1)
        scores = weights[:, 0, start : start + count].mean(0).numpy()
    unit = torch.nn.functional.normalize(hidden[start : start + count], dim=-1)
    return oracle.select_stage(
        stage,
        scores,
        (unit @ unit.T).numpy() if stage.needs_similarity else None,
        block_seeds(plan, stage.seeds) if number == 0 else [],
    )


def block_seeds(plan: PruningPlan, count: int) -> list[int]:
    """Farthest-point selection over the tokens' places in the picture, euclidean, in exact fractions."""
    rows, columns = plan.grid
    places: list[tuple[Fraction, Fraction]] = []
    for down, right in plan.blocks or (plan.grid,):
        newline = (down, right) == (rows, columns + 1)
        tall, wide = Fraction(rows, down), Fraction(columns, right - newline)
        half = Fraction(1, 2)
        places += [((r + half) * tall, (c + half) * wide) for r in range(down) for c in range(right)]
    chosen = [0] if count else []
    gaps = [_squared(place, places[0]) for place in places]
    while len(chosen) < count:
        chosen.append(max(range(len(places)), key=lambda n: (gaps[n], -n)))
        gaps = [min(gap, _squared(place, places[chosen[-1]])) for gap, place in zip(gaps, places, strict=True)]
    return chosen


def _squared(one: tuple[Fraction, Fraction], other: tuple[Fraction, Fraction]) -> Fraction:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def profiles_of(bundle: Bundle) -> list[str]:
    """Names of a bundle's profiles."""
    return [profile.name for profile in bundle.manifest.profiles]


def open_bundle(bundle: Bundle, profile: str) -> BundleModel:
    """A profile of the bundle, on one thread."""
    return load(bundle, profile=profile, threads=1)
