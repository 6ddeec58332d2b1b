"""Export: the same inputs give the same bytes, everything is checked first, and a broken-off export leaves nothing."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import btp_export
from btp_export.cli import main
from btp_export.exporting import Options, check_target, export_bundle, make_profiles
from btp_export.model.check_processor import check_processor
from btp_export.model.open_model import PROCESSOR_FILES, Model, open_model
from engines.runners.onnxruntime import OrtLoader
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from tests import plans

ROOT = Path(__file__).parents[2]
SHAPES = {"text_tokens": 16, "new_tokens": 12}


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Model:
    return open_model(str(tiny_checkpoint))


def plan_of(model: Model, *stages: Stage) -> PruningPlan:
    return plans.plan_of(model.spec, *stages)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_processor_files_are_those_of_the_checkpoint(tiny_bundle: Callable[..., Bundle], tiny_checkpoint: Path) -> None:
    kept = contents(tiny_bundle().processor)
    there = {path.name for path in tiny_checkpoint.iterdir()} & set(PROCESSOR_FILES)
    assert set(kept) == there | {"preprocess.json"}, "and what export makes of them"
    assert all(kept[name] == (tiny_checkpoint / name).read_bytes() for name in there)


def test_several_profiles_share_the_weights(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle(profiles=("batch=1,text=16,new=12", "batch=2,text=24,new=4"))
    one, two = (profile.name for profile in bundle.manifest.profiles)
    assert bundle.profile().name == one and one != two
    assert bundle.graph_path("decode", two).name == f"decode.{two}.onnx"
    used = set()
    for record in bundle.manifest.graphs:
        model = onnx.load(bundle.root / record.file, load_external_data=False)
        for tensor in model.graph.initializer:
            used |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    assert used == {"weights/model.safetensors", "weights/btp-vision.safetensors"}
    assert {tensor.shape[0] for name in ("vision", "head") for tensor in bundle.graph(name, two).inputs} == {2}


def test_sharded_checkpoint_keeps_its_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, local_files_only=True)
    shutil.copytree(tiny_checkpoint, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    opened = open_model(str(tmp_path / "sharded"))
    assert len(opened.checkpoint.files) > 2
    bundle = export_bundle(opened, plan_of(opened), tmp_path / "bundle", Options(**SHAPES))
    one = open_model(str(tiny_checkpoint)).checkpoint
    for name, ref in bundle.checkpoint().tensors.items():
        assert np.array_equal(ref.read(), one[name].read())


def test_links_of_the_hub_s_cache_are_resolved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    blobs = tmp_path / "blobs"
    shutil.copytree(tiny_checkpoint, blobs)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(blob)
    model = open_model(str(snapshot))
    bundle = export_bundle(model, plan_of(model), tmp_path / "bundle", Options(**SHAPES, link="hard"))
    weights = bundle.weights / "model.safetensors"
    assert weights.samefile(snapshot / "model.safetensors") and not weights.is_symlink()
    assert not any(path.is_symlink() for path in bundle.root.rglob("*"))


@pytest.mark.parametrize("link", ["hard", "copy"])
def test_linked_weights_are_for_onnx_runtime_alone(model_folder: Path, tmp_path: Path, link: Any) -> None:
    """onnx refuses them, which the export says with the option that helps; copies open everywhere."""
    model, notes = open_model(str(model_folder)), list[str]()
    options = Options(**SHAPES, link=link)
    bundle = export_bundle(model, plan_of(model), tmp_path / "bundle", options, note=notes.append)
    said = [text for text in notes if "onnx.load and onnx.checker refuse" in text and "--link copy" in text]
    graph = str(bundle.graph_path("prefill_0"))
    OrtLoader()(Path(graph))
    if link == "copy":
        assert not said
        onnx.checker.check_model(graph)
        assert onnx.load(graph).graph.node
        return
    assert len(said) == 1
    for opens in (onnx.load, onnx.checker.check_model):
        with pytest.raises(Exception, match="hard link"):
            opens(graph)


@pytest.mark.parametrize("with_plan", [False, True])
def test_the_processor_is_tried_once(model_folder: Path, tmp_path: Path, monkeypatch: Any, with_plan: bool) -> None:
    """It takes seconds for a large picture."""
    tried = []

    def check(*arguments: Any) -> None:
        tried.append(arguments)
        check_processor(*arguments)

    monkeypatch.setattr("btp_export.exporting.check_processor", check)
    if with_plan:
        plan = plan_of(open_model(str(model_folder)))
        shape = btp_export.Shape(text=16)
        btp_export.export(str(model_folder), plan=plan, out=tmp_path / "bundle", shapes=[shape])
    else:
        arguments = ["export", "--model", str(model_folder), "--plan", "none", "--out", str(tmp_path / "bundle")]
        assert main([*arguments, "--text-tokens", "16"]) == 0
    assert len(tried) == 1


@pytest.fixture
def model_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint on the same disk, not shared with other tests: links count."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    return folder


def test_whole_holds_one_prefill_graph(tiny: Model, tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle(plan_of(tiny, Stage(layer=3, keep=0)), assemble="whole")
    assert [graph.name for graph in bundle.graphs()] == ["vision", "prefill", "decode"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 17}, "opset 17"),
        ({"profiles": ("batch=0",)}, "profile 'batch=0'"),
        ({"profiles": ("batch=two",)}, "profile 'batch=two'"),
        ({"profiles": ("size=2",)}, "profile 'size=2'"),
        ({"profiles": ("image=24",)}, "profile 'image=24'"),
        ({"profiles": ("image=48x48",)}, "image size 48 x 48"),
        ({"profiles": ("batch=1", "batch=1")}, "the same profile twice"),
        ({"profiles": ("batch=1,batch=2",)}, "profile 'batch=1,batch=2'"),
        ({"profiles": ("batch=" + 5000 * "9",)}, "profile 'batch=9"),
        ({"profiles": ("batch=999999",)}, "b999999-24x24-t64-n128: batch: "),
        ({"text_tokens": 2**21}, "text_tokens: "),
    ],
)
def test_wrong_options_are_refused_before_work(tiny: Model, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_target(tiny, tmp_path / "b", Options(**options), force=False)


def test_defaults_of_a_profile(tiny: Model) -> None:
    (profile,) = make_profiles(tiny, Options(profiles=("batch=3,new=5",), text_tokens=20))
    assert (profile.batch, profile.text_tokens, profile.new_tokens) == (3, 20, 5)
    (profile,) = make_profiles(tiny, Options())
    assert (profile.batch, profile.text_tokens, profile.new_tokens) == (1, 64, 128)
    (profile,) = make_profiles(open_model("demo"), Options())
    assert (profile.batch, profile.text_tokens, profile.new_tokens) == (1, 32, 8)


def test_more_positions_than_the_model_has(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="positions"):
        export_bundle(tiny, plan_of(tiny), tmp_path / "b", Options(new_tokens=10_000))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_model(tiny: Model, tmp_path: Path) -> None:
    plan = plan_of(tiny).model_copy(update={"num_layers": 32})
    with pytest.raises(InputError, match="decoder layers: 32") as caught:
        export_bundle(tiny, plan, tmp_path / "b", Options(**SHAPES))
    assert caught.value.wanted.startswith("6")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_nothing(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the lights went out")

    monkeypatch.setattr("btp_export.exporting.rope_tables", fail)
    with pytest.raises(RuntimeError, match="lights"):
        export_bundle(tiny, plan_of(tiny), tmp_path / "new" / "b", Options(**SHAPES))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Other signals become the same exception (test_cli.py)."""
    command = [sys.executable, "-m", "btp_export", "export", "--model", str(tiny_checkpoint), "--plan", "none",
               "--out", str(tmp_path / "new" / "b")]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("new/.b.*.partial/graphs/weights/model.safetensors")):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 2 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's weights are larger than a file may be."""
    assert main(["export", "--model", "demo", "--plan", "none", "--out", str(tmp_path / "b")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: File too large", "  do this: free some space there, or write to another disk"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_json_names_the_bundle(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--model", str(tiny_checkpoint), "--plan", "vtw", "--out", str(tmp_path / "b")]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bundle"] == str(tmp_path / "b") and result["plan"]["format"] == "btp-plan/1"
    assert result["compression"] == pytest.approx(1 - result["average_tokens"] / 36)
    assert Bundle.open(tmp_path / "b").manifest.model.source == tiny_checkpoint.name
    assert main([*arguments, "--json"]) == 2  # it is there already
    captured = capsys.readouterr()
    assert captured.out == "" and "already holds a bundle" in captured.err
    assert main([*arguments, "--json", "--force"]) == 0
