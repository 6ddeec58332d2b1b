"""A bundle is checked when it is opened, says what is wrong with it, and can be derived with another plan."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphs.building.derived_bundles import derive
from graphs.files import atomic, bundle_checks
from graphs.files.bundle import Bundle, _read_manifest, write_manifest
from graphs.files.bundle_checks import listed_files
from graphs.files.folders import exchange
from graphs.records.errors import InputError
from graphs.records.manifest import GraphRecord, Manifest
from graphs.records.plan import PruningPlan, Stage


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle().root, root)
    return Bundle.open(root)


def other_plan(bundle: Bundle) -> PruningPlan:
    return bundle.plan.model_copy(update={"stages": (Stage(layer=3, keep=0),)})


def sealed(bundle: Bundle, **changes: Any) -> None:
    """Write the manifest again with changes, as somebody who knows how its digest is made."""
    kept = {name: getattr(bundle.manifest, name) for name in Manifest.model_fields}
    del kept["format"], kept["manifest_sha256"]
    write_manifest(bundle.root, **(kept | changes))


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
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: text.replace('"format": "btp-bundle/1"', '"format": "btp-bundle/9"'), "format"),
        (lambda text: text.replace('"format": "btp-bundle/1",', '"more": 1, "format": "btp-bundle/1",'), "more"),
        (lambda text: text.replace("graphs/head.onnx", "../head.onnx"), "not a path inside the bundle"),
        (lambda text: text.replace('"file": "plan.json"', '"file": "/etc/passwd"'), "not a path inside the bundle"),
        (lambda text: "[]", "Input should be an object"),
    ],
)
def test_a_damaged_manifest_names_the_key(bundle: Bundle, damage: Callable[[str], str], said: str) -> None:
    path = bundle.root / "manifest.json"
    path.write_text(damage(path.read_text()))
    error = refusal(bundle.root)
    assert str(path) in error.got and said in error.got


def test_a_plan_of_another_model_is_refused(bundle: Bundle) -> None:
    from graphs.files.bundle import write_plan

    sealed(bundle, plan=write_plan(bundle.root, bundle.plan.model_copy(update={"num_layers": 7})))
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


# -- what is not listed, and the manifest itself ---------------------------------------------------------------------


def test_one_flipped_bit_of_the_manifest_is_noticed(bundle: Bundle) -> None:
    """Every byte, each time another bit: none passes, whether it is JSON afterwards or not."""
    path = bundle.root / "manifest.json"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        for place, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(InputError):
                _read_manifest(bundle.root)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert Bundle.open(bundle.root).manifest == bundle.manifest


@pytest.mark.parametrize("change", [("1e-06", "1e-02"), ("1e-06", "1E-06"), ("\n}\n", "\n}\n\n"), ("{\n", "{ \n")])
def test_a_manifest_edited_by_hand_is_named(bundle: Bundle, change: tuple[str, str]) -> None:
    path = bundle.root / "manifest.json"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    assert "manifest.json was changed" in refusal(bundle.root).got


def test_a_bundle_of_an_earlier_version_has_no_digest_and_opens(bundle: Bundle) -> None:
    path = bundle.root / "manifest.json"
    document = json.loads(path.read_text())
    del document["manifest_sha256"]
    path.write_text(json.dumps(document, indent=1) + "\n")
    assert Bundle.open(bundle.root, check="full").manifest.manifest_sha256 is None


@pytest.mark.parametrize(
    "file", ["processor/chat_template.json", "graphs/weights/extra.safetensors", "graphs/extra.onnx", "processor/a/b"]
)
def test_a_file_that_is_not_listed_is_refused(bundle: Bundle, file: str) -> None:
    path = bundle.root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    error = refusal(bundle.root)
    assert str(path) in error.got and error.do == "remove it"


def test_a_folder_behind_a_link_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.root / "processor" / "more").symlink_to(tmp_path / "elsewhere")
    assert "does not belong" in refusal(bundle.root).got


def test_what_is_put_beside_them_is_the_user_s(bundle: Bundle) -> None:
    (bundle.root / "notes.txt").write_text("mine")
    (bundle.root / "graphs" / ".DS_Store").write_text("a file manager's")
    assert Bundle.open(bundle.root).manifest == bundle.manifest


def test_an_index_that_comes_later_is_not_read(bundle: Bundle) -> None:
    before = {name: ref.offset for name, ref in bundle.checkpoint().tensors.items()}
    (bundle.weights / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert {name: ref.offset for name, ref in bundle.checkpoint().tensors.items()} == before


def test_graphs_must_be_as_the_manifest_says(bundle: Bundle) -> None:
    graphs = list(bundle.manifest.graphs)
    first = graphs[1].inputs[0]
    for change in ({"name": "other"}, {"dtype": "float16"}, {"shape": (1, 2)}):
        inputs = (first.model_copy(update=change), *graphs[1].inputs[1:])
        sealed(bundle, graphs=[graphs[0], graphs[1].model_copy(update={"inputs": inputs}), *graphs[2:]])
        assert graphs[1].file in refusal(bundle.root).got
    sealed(bundle, graphs=[graphs[0], graphs[1].model_copy(update={"outputs": ()}), *graphs[2:]])
    assert graphs[1].file in refusal(bundle.root).got


@pytest.mark.parametrize("location", ["../../outside.safetensors", "/etc/passwd", "weights/unknown.safetensors"])
def test_external_data_must_be_listed(bundle: Bundle, location: str) -> None:
    graph = bundle.manifest.graphs[1]
    model = onnx.load(bundle.root / graph.file, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    replaced(bundle, graph, model.SerializeToString())
    assert location in refusal(bundle.root).got


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x0a\x3a\xff\xff"], ids=["empty", "noise", "cut"])
def test_a_damaged_graph_is_named(bundle: Bundle, content: bytes) -> None:
    graph = bundle.manifest.graphs[1]
    replaced(bundle, graph, content)
    assert graph.file in refusal(bundle.root).got


def replaced(bundle: Bundle, graph: GraphRecord, content: bytes) -> None:
    """Another graph with its size and hash in the manifest."""
    (bundle.root / graph.file).write_bytes(content)
    entry = graph.model_copy(update=atomic.record(bundle.root, graph.file).model_dump())
    sealed(bundle, graphs=[entry if record.file == graph.file else record for record in bundle.manifest.graphs])


def test_a_bundle_that_is_replaced_while_it_is_opened(bundle: Bundle, tmp_path: Path) -> None:
    """The reader that saw the old manifest and the new files looks again."""
    other = derive(bundle, other_plan(bundle), tmp_path / "other")
    if not exchange(bundle.root, other.root):
        pytest.skip("this file system cannot exchange folders")
    opened = bundle_checks.check_unlisted
    exchanged = []

    def meanwhile(root: Path, manifest: Manifest) -> None:
        if not exchanged:
            exchanged.append(exchange(bundle.root, other.root))
        opened(root, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphs.files.bundle.check_unlisted", meanwhile)
        assert Bundle.open(bundle.root).plan == bundle.plan
    assert exchanged == [True]


def test_an_old_bundle_that_was_set_aside_is_named(bundle: Bundle) -> None:
    aside = bundle.root.rename(bundle.root.with_name(".bundle.0123abcd.old"))
    assert str(aside) in refusal(bundle.root).do
