"""Exact match of a demo checkpoint on held-out scenes, through its processor and `generate`, as a user would ask.

`python -m btp_export.demo.evaluate --count 500` prints the table of the shipped checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from btp_export.demo import checkpoint_path
from calibrate.data import scenes


def evaluate(folder: Path, samples: Sequence[scenes.SceneSample], *, batch: int = 20) -> dict[str, Any]:
    """Ask every sample and compare: per kind the number of samples, the exact match and the majority baseline.

    The majority baseline of a kind is the share of its most frequent right answer: what a model that never looks
    would reach.
    """
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    given: list[str] = []
    for start in range(0, len(samples), batch):
        given += answers(model, processor, samples[start : start + batch])
    return score(samples, given)


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[scenes.SceneSample]
) -> list[str]:
    """The model's greedy answers to a batch of samples, as text."""
    prompts = [prompt(processor, sample.question) for sample in samples]
    inputs = processor(text=prompts, images=[sample.image for sample in samples], return_tensors="pt", padding=True)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The chat template around one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def score(samples: Sequence[scenes.SceneSample], given: Sequence[str]) -> dict[str, Any]:
    """Compare answers with the right ones, per kind and overall."""
    right: dict[str, list[bool]] = defaultdict(list)
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    for sample, answer in zip(samples, given, strict=True):
        right[sample.kind].append(answer == sample.answer)
        wanted[sample.kind][sample.answer] += 1
    kinds = {
        kind: {
            "samples": len(marks),
            "exact_match": round(sum(marks) / len(marks), 4),
            "majority": round(wanted[kind].most_common(1)[0][1] / len(marks), 4),
        }
        for kind, marks in right.items()
    }
    total = sum(sum(marks) for marks in right.values())
    return {"samples": len(samples), "exact_match": round(total / max(len(samples), 1), 4), "kinds": kinds}


def main() -> None:
    """Command line: print the table as JSON."""
    parser = argparse.ArgumentParser(prog="python -m btp_export.demo.evaluate")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    held_out = scenes.samples(arguments.count, seed=arguments.seed, split="eval")
    print(json.dumps(evaluate(arguments.checkpoint, held_out), indent=1))


if __name__ == "__main__":
    main()
