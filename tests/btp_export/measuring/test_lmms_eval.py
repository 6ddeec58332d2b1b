"""lmms-eval runs a bundle as one of its models: its own command line, registry, tasks and metrics."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import BundleMaker

TASK = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
"""
UTILS = """\
from PIL import Image
def pictures(doc):
    return [Image.open(path) for path in doc["images"]]
"""
EXACT = """\
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}
"""
CHOICE = """\
doc_to_choice: !function utils.choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
QUESTIONS = ["what color is the circle ?", "how many squares ?", "where is the red shape ?"]


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with lmms-eval (the extra lmms-eval), or a skip; BTP_LMMS_EVAL_PYTHON may name another one."""
    named = os.environ.get("BTP_LMMS_EVAL_PYTHON")
    if named is None and importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install 'btp-export[lmms-eval]', or set BTP_LMMS_EVAL_PYTHON")
    return named or sys.executable


def run(python: str, folder: Path, task: str, arguments: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "lmms_eval", "--model", "btp_export", "--model_args", arguments, "--tasks", task]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "WANDB_MODE": "disabled"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def results(folder: Path, task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (summary,) = folder.glob("out/**/*_results.json")
    (lines,) = folder.glob(f"out/**/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    return json.loads(summary.read_text())["results"][task], sorted(samples, key=lambda one: int(one["doc_id"]))


def write_task(folder: Path, kind: str, target: str, more: str, documents: list[dict[str, Any]]) -> str:
    name = f"btp_test_{kind}"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / f"{name}.yaml").write_text(TASK.format(data=data, name=name, kind=kind, target=target, more=more))
    (folder / "utils.py").write_text(UTILS + 'def choices(doc):\n    return ["red", "blue", "green"]\n')
    return name


@pytest.fixture
def documents(pictures: list[Image.Image], tmp_path: Path) -> list[dict[str, Any]]:
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    return [{"images": [str(tmp_path / f"{n}.png")], "question": text} for n, text in enumerate(QUESTIONS)]


def test_answers_are_those_of_the_bundle(
    python: str, tiny_bundle: BundleMaker, documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two of three targets are what the bundle itself says, so lmms-eval must find 2/3."""
    import btp_export

    bundle = tiny_bundle()
    model = btp_export.load(bundle)
    said = [
        model.generate(document["images"][0], document["question"], max_new_tokens=4)[0].text for document in documents
    ]
    for document, text, right in zip(documents, said, (True, True, False), strict=True):
        document["answer"] = text if right else "no such answer"
    task = write_task(tmp_path, "generate_until", "{{answer}}", EXACT, documents)
    done = run(python, tmp_path, task, f"bundle={bundle.root},threads=1")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    summary, samples = results(tmp_path, task)
    assert summary["exact_match,none"] == pytest.approx(2 / 3)
    assert [sample["filtered_resps"] for sample in samples] == [text.strip() for text in said]


def test_choices_are_judged_by_their_probability(
    python: str, tiny_bundle: BundleMaker, documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The choice whose tokens transformers' own model finds likeliest is the one that scores."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    bundle = tiny_bundle()
    processor = AutoProcessor.from_pretrained(bundle.processor)
    config = LlavaForConditionalGeneration.config_class.from_pretrained(bundle.processor)
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=_weights(bundle.weights), dtype=torch.float32
    )
    for document in documents:
        losses = [_loss(model, processor, document, choice) for choice in ("red", "blue", "green")]
        document["answer"] = losses.index(min(losses))
        document["losses"] = losses
    task = write_task(tmp_path, "multiple_choice", "{{answer}}", CHOICE, documents)
    done = run(python, tmp_path, task, f"bundle={bundle.root},threads=1")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    summary, samples = results(tmp_path, task)
    assert summary["acc,none"] == 1.0
    for sample, document in zip(samples, documents, strict=True):
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(document["losses"], abs=1e-4)


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _loss(model: Any, processor: Any, document: dict[str, Any], choice: str) -> float:
    import torch

    content = [{"type": "image"}, {"type": "text", "text": document["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with Image.open(document["images"][0]) as picture:
        inputs = processor(images=[picture.convert("RGB")], text=[text], return_tensors="pt")
    answer = torch.tensor([processor.tokenizer(choice, add_special_tokens=False)["input_ids"]])
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].double()
    rows = logits[-answer.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(rows, answer[0]))


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], "", "0 pictures"),
        (["0.png", "1.png"], "", "2 pictures"),
        (["0.png"], ",plan=nonsense", "nonsense"),
        (["0.png"], ",batch_size=3", "batch_size 3"),
    ],
)
def test_what_a_bundle_cannot_answer_is_refused(
    python: str,
    tiny_bundle: BundleMaker,
    documents: list[dict[str, Any]],
    tmp_path: Path,
    images: list[str],
    arguments: str,
    message: str,
) -> None:
    document = documents[0] | {"images": [str(tmp_path / name) for name in images], "answer": "red"}
    task = write_task(tmp_path, "generate_until", "{{answer}}", EXACT, [document])
    batch = ["--batch_size", "3"] if "batch_size" in arguments else []
    arguments = "" if batch else arguments
    done = run(python, tmp_path, task, f"bundle={tiny_bundle().root}{arguments}", *batch)
    assert message in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
