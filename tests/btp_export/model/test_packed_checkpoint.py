"""A checkpoint in four bits opens like any other, and its reference is transformers with the numbers it stands for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlavaForConditionalGeneration

from btp_export.model.open_model import open_model
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.errors import InputError
from tests.conftest import unpruned
from tests.packed import pack_folder, write_record


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("packed") / "model"
    return folder, pack_folder(tiny_checkpoint, folder, input_scales=True)


def test_it_opens_as_the_model_it_was_made_of(packed: tuple[Path, Any], tiny_checkpoint: Path) -> None:
    model, plain = open_model(str(packed[0])), open_model(str(tiny_checkpoint))
    assert model.spec == plain.spec
    assert plain.checkpoint.quantization is None
    assert model.checkpoint.quantization is not None
    assert model.checkpoint.quantization.groups == {16: 7 * 6}


def test_the_reference_is_transformers_with_the_numbers_that_the_codes_stand_for(
    packed: tuple[Path, dict[str, np.ndarray]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, meanings = packed
    columns = {k: np.linspace(0.5, 2, k).astype(np.float32).astype(np.float64) for k in (64, 96)}
    plain = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint, plain)
    tensors = load_file(plain / "model.safetensors")
    for module, matrix in meanings.items():
        tensors[f"{module}.weight"] = (matrix * columns[matrix.shape[1]]).astype(np.float32)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    whole = LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    model = open_model(str(folder))
    token, tokens = model.spec.image_token_id, model.spec.vision.image_tokens
    words = [word for word in (5, 9, 11, 4, 7) if word != token]
    ids = torch.tensor([words[0], *[token] * tokens, *words[1:]])
    pixels = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        expected = whole(input_ids=ids[None], pixel_values=pixels).logits[0, -1]
        features = model.family.vision_module(model.checkpoint)(pixels)[0]
    run = StreamedReference(model.checkpoint).run([ReferenceInput(ids, features)], unpruned(model.spec))[0]
    np.testing.assert_allclose(run.logits[0], expected.numpy(), atol=2e-4, rtol=1e-4)
    assert run.logits[0].std() > 0.1, "otherwise anything agrees"


@pytest.fixture
def damaged(packed: tuple[Path, Any], tmp_path: Path) -> Any:
    """`damaged(changes)`: the packed folder with tensors changed, or taken out (None)."""

    def make(**changes: np.ndarray | None) -> str:
        folder = tmp_path / "damaged"
        shutil.copytree(packed[0], folder)
        tensors = load_file(folder / "model.safetensors")
        module = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.qweight"))[: -len("qweight")]
        for part, array in changes.items():
            tensors.pop(module + part, None)
            tensors |= {} if array is None else {module + part: array}
        save_file(tensors, folder / "model.safetensors")
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": None}, r"no tensor .*q_proj\.qweight"),
        ({"scales": None}, r"no tensor .*q_proj\.scales"),
        ({"scales": np.ones((64, 3), np.float32)}, r"q_proj\.scales is F32 \[64, 3\]"),
        ({"weight": np.ones((64, 64), np.float32)}, "and its weight is there too"),
        (
            {
                "qweight": np.ones((32, 4, 8), np.uint8),
                "scales": np.ones((32, 4), np.float32),
                "zeros": np.ones((32, 2), np.uint8),
            },
            r"q_proj\.qweight is of a matrix \[32, 64\]",
        ),
    ],
)
def test_what_is_not_whole_is_refused(damaged: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_model(damaged(**changes))


def test_codes_without_a_record_are_refused(packed: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "unrecorded"
    shutil.copytree(packed[0], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"which config\.json does not mention"):
        open_model(str(folder))
    write_record(folder, {"method": "read"})
    with pytest.raises(InputError, match="not a valid record of packed weights: source"):
        open_model(str(folder))
