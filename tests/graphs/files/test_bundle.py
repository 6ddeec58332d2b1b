"""A bundle is checked when it is opened, says what is wrong with it, and can be derived with another plan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle, listed_files
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle().root, root)
    return Bundle.open(root)


def other_plan(bundle: Bundle) -> PruningPlan:
    return bundle.plan.model_copy(update={"stages": (Stage(layer=3, keep=0),)})


def refusal(root: Path, check: str = "quick") -> InputError:
    with pytest.raises(InputError) as caught:
        Bundle.open(root, check=check)  # type: ignore[arg-type]
    assert len(caught.value.lines()) == 3
    return caught.value


def test_layout_and_manifest(bundle: Bundle) -> None:
    manifest = json.loads((bundle.root / "manifest.json").read_text())
    assert manifest["format"] == "btp-bundle/1"
    assert [graph["name"] for graph in manifest["graphs"]] == ["vision", "prefill_0", "head", "decode"]
    on_disk = {p.relative_to(bundle.root).as_posix() for p in bundle.root.rglob("*") if p.is_file()}
    assert on_disk == {entry.file for entry in listed_files(bundle.manifest)} | {"manifest.json"}
    assert str(bundle.root.parent) not in (bundle.root / "manifest.json").read_text()


def test_recorded_shapes_are_those_of_the_files(bundle: Bundle) -> None:
    for graph in bundle.graphs():
        model = onnx.load(bundle.root / graph.file, load_external_data=False)
        for recorded, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            for record, value in zip(recorded, values, strict=True):
                dims = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                assert (record.name, record.shape, record.dtype) == (value.name, dims, str(dtype))


def test_checkpoint_has_the_model_s_own_bytes(bundle: Bundle, tiny_checkpoint: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    stored = load_file(tiny_checkpoint / "model.safetensors")
    checkpoint = bundle.checkpoint()
    assert "language_model.layers.0.self_attn.q_proj.weight" in checkpoint.tensors
    assert {ref.stored_name for ref in checkpoint.tensors.values()} == set(stored)
    for ref in checkpoint.tensors.values():
        assert np.array_equal(ref.read(), stored[ref.stored_name])


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.root / "graphs" / "decode.onnx").unlink()
    assert "graphs/decode.onnx is missing" in refusal(bundle.root).got


def test_another_size_is_named(bundle: Bundle) -> None:
    path = bundle.root / "graphs" / "head.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    error = refusal(bundle.root)
    assert f"{path} has {path.stat().st_size} bytes" in error.got
    assert f"{path.stat().st_size + 1} bytes" in error.wanted


@pytest.mark.parametrize(
    "file",
    ["plan.json", "graphs/vision.onnx", "graphs/weights/model.safetensors", "graphs/weights/btp-rope.safetensors",
     "processor/tokenizer.json"],
)  # fmt: skip
def test_a_flipped_byte_is_named_with_both_hashes(bundle: Bundle, file: str) -> None:
    recorded = {entry.file: entry.sha256 for entry in listed_files(bundle.manifest)}[file]
    flip(bundle.root / file)
    error = refusal(bundle.root)
    assert file in error.got and recorded in error.wanted
    assert recorded not in error.got and "sha256" in error.got


def test_quick_leaves_big_weights_to_full(bundle: Bundle) -> None:
    flip(bundle.root / "graphs" / "weights" / "model.safetensors")
    Bundle.open(bundle.root, small=1000)
    assert "model.safetensors was changed" in refusal(bundle.root, "full").got


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "the document: Invalid JSON"),
        (lambda text: text.replace('"format": "btp-bundle/1"', '"format": "btp-bundle/9"'), "format"),
        (lambda text: text.replace('"format": "btp-bundle/1",', '"more": 1, "format": "btp-bundle/1",'), "more"),
        (lambda text: text.replace("graphs/head.onnx", "../head.onnx"), "not a path inside the bundle"),
        (lambda text: text.replace('"file": "plan.json"', '"file": "/etc/passwd"'), "not a path inside the bundle"),
        (lambda text: "[]", "the document"),
    ],
)
def test_a_damaged_manifest_names_the_key(bundle: Bundle, damage: Callable[[str], str], said: str) -> None:
    path = bundle.root / "manifest.json"
    path.write_text(damage(path.read_text()))
    error = refusal(bundle.root)
    assert str(path) in error.got and said in error.got


def test_a_plan_of_another_model_is_refused(bundle: Bundle) -> None:
    from graphs.files.bundle import write_manifest, write_plan

    entry = write_plan(bundle.root, bundle.plan.model_copy(update={"num_layers": 7}))
    fields = {name: getattr(bundle.manifest, name) for name in type(bundle.manifest).model_fields if name != "format"}
    write_manifest(bundle.root, **(fields | {"plan": entry}))
    assert "llava with 7 layers" in refusal(bundle.root).got


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "no bundle at" in refusal(tmp_path / "nothing").got
    assert "no bundle at" in refusal(tmp_path).got


def test_unknown_profile_and_graph(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="no profile big"):
        bundle.profile("big")
    with pytest.raises(InputError, match="no graph prefill_7"):
        bundle.graph("prefill_7")


def test_derived_bundle_has_the_other_plan_and_the_same_weights(bundle: Bundle, tmp_path: Path) -> None:
    plan = other_plan(bundle)
    derived = derive(bundle, plan, tmp_path / "derived")
    assert derived.plan == plan
    assert [graph.name for graph in derived.graphs()] == [
        "vision",
        "prefill_0",
        "select_0",
        "prefill_1",
        "head",
        "decode",
    ]
    assert derived.manifest.weights == bundle.manifest.weights
    assert derived.graph("vision") == bundle.graph("vision")
    assert derived.graph("decode").sha256 != bundle.graph("decode").sha256


def test_deriving_back_gives_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    back = derive(derive(bundle, other_plan(bundle), tmp_path / "one"), bundle.plan, tmp_path / "two")
    assert (back.root / "manifest.json").read_bytes() == (bundle.root / "manifest.json").read_bytes()


def test_deriving_with_a_plan_that_does_not_fit_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="decoder layers: 7"):
        derive(bundle, bundle.plan.model_copy(update={"num_layers": 7}), tmp_path / "out" / "derived")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the file may be a hard link to another bundle's
    path.write_bytes(data)
