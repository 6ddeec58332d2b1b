"""engines/<target>/ for a device without Python: files, scripts of valid options, real inputs, and all or nothing."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from btp_export.engine_inputs import record_calibration
from engines.targets import find_target, known_targets
from engines.tensorrt.kit import scripts
from engines.tensorrt.kit.device_kit import is_engines, plugin_sources
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from engines.tensorrt.prepare.lint import lint
from engines.tensorrt.records import EnginesRecord
from engines.tensorrt.versions import traits
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError, InputError, UnavailableError
from tests.engines.native import builds
from tests.engines.tensorrt.kit.fake_trtexec import calls, fake_tool, run
from tests.engines.tensorrt.plans import prepared, staged_bundle

LISTS = Path(__file__).parents[1] / "trtexec"
VERSIONS = {"jetson-orin-jp6": "10.3", "jetson-orin-jp7": "10.16", "h100": "11.1"}


def copied(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle elsewhere, so that others do not see its engines."""
    shutil.copytree(bundle.root, folder, copy_function=os.link)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def kit(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`kit(target, **wishes)`: the folder, made once for each."""
    collected: dict[str, Path] = {}

    def make(target: str, **wishes: Any) -> Path:
        key = f"{target} {wishes}"
        if key not in collected:
            bundle = copied(staged_bundle(tiny_bundle), tmp_path_factory.mktemp("kit") / "bundle")
            plan = plan_build(bundle, find_target(target), Wishes(**wishes))
            collected[key] = prepared(plan, recorder=record_calibration)
        return collected[key]

    return make


def options_of(folder: Path) -> set[str]:
    """Every option that the scripts of a kit give the tool: on lines of their own, or beside "$TOOL"."""
    texts = [path.read_text() for path in folder.rglob("*.sh") if path.name in ("build.sh", "profile.sh")]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("    --") or '"$TOOL"' in line]
    return {option for line in lines for option in re.findall(r"(?<![\w-])--[A-Za-z]\w*", line)}


# -- what is there ---------------------------------------------------------------------------------------------------


def test_the_folder_is_whole(kit: Any, tiny_bundle: Any) -> None:
    folder = kit("jetson-orin-jp6")
    record, bundle = EnginesRecord.load(folder), Bundle.open(folder.parents[1])
    assert (record.target, record.tensorrt, record.compute_capability) == ("jetson-orin-jp6", "10.3", "8.7")
    assert [graph.name for graph in record.graphs] == [graph.name for graph in bundle.graphs()]
    assert record.plugins.form == "library" and record.plugins.sha256 is None and is_engines(folder)
    for graph, own in zip(record.graphs, bundle.graphs(), strict=True):
        assert (graph.inputs, graph.outputs) == (own.inputs, own.outputs) and graph.engine is None
        assert (folder / graph.onnx.file).stat().st_size == graph.onnx.size
        assert graph.samples.keys() == {tensor.name for tensor in graph.inputs}
        sizes = {"float32": 4, "int32": 4}
        for tensor in graph.inputs:
            assert graph.samples[tensor.name].size == sizes[tensor.dtype] * int(np.prod(tensor.shape))
    assert [g.custom_nodes for g in record.graphs if g.name.startswith("select")] == [4, 4, 4, 0]
    weights = folder / "graphs" / "weights" / "model.safetensors"
    assert weights.samefile(bundle.weights / "model.safetensors")  # linked, not copied
    assert len((folder / "README.md").read_text().splitlines()) == 5
    assert not [path for path in folder.rglob(".*")]
    assert EnginesRecord.load(folder).to_json() == (folder / "engines.json").read_text()


def test_inputs_are_those_of_a_real_run(kit: Any) -> None:
    """What goes into a segment is what comes out of the selection before it, in ONNX Runtime on the bundle's graphs."""
    import onnxruntime

    folder = kit("jetson-orin-jp6")
    bundle = Bundle.open(folder.parents[1])

    def recorded(graph: str) -> dict[str, Any]:
        entry = next(g for g in EnginesRecord.load(folder).graphs if g.name == graph)
        return {
            t.name: np.fromfile(folder / entry.samples[t.name].file, f"<{np.dtype(t.dtype).str[1:]}").reshape(t.shape)
            for t in entry.inputs
        }

    def run_graph(graph: str) -> dict[str, Any]:
        session = onnxruntime.InferenceSession(str(bundle.graph_path(graph)))
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, recorded(graph)), strict=True))

    selected = run_graph("select_0")
    after = recorded("prefill_1")
    for name in ("hidden", "cos", "sin", "last"):
        np.testing.assert_allclose(after[name], selected[f"{name}_out"], rtol=1e-4, atol=1e-5)
    keys, caches = run_graph("prefill_0"), recorded("decode")
    length = int(caches["length_0"][0])
    np.testing.assert_allclose(caches["past_key_0"][:, :, :length], keys["key_0"][:, :, :length], rtol=1e-4, atol=1e-5)
    pixels = recorded("vision")["pixel_values"]
    assert 0.2 < pixels.std() < 3 and len(np.unique(pixels)) > 10  # a picture, not noise and not zeros


def test_several_profiles_have_their_own_files(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle(profiles=("text=16,new=12", "batch=2,text=20,new=4")), tmp_path / "bundle")
    folder = prepared(
        plan_build(bundle, find_target("h200"), Wishes(engine_weights="shared")), recorder=record_calibration
    )
    record = EnginesRecord.load(folder)
    first, second = (profile.name for profile in bundle.manifest.profiles)
    assert (folder / f"graphs/decode.{second}.onnx").is_file() and (folder / f"inputs/head.{first}/last.bin").is_file()
    assert record.graph("head", second).samples["last"].size == 2 * 4
    texts = (folder / "build.sh").read_text()
    assert f"build decode.{first} " in texts and f"=prefill_0.{second}.engine.partial " in texts


# -- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "version"), VERSIONS.items())
@pytest.mark.parametrize("weights", ["baked", "shared"])
def test_every_option_exists_in_that_version(
    tiny_bundle: Any, tmp_path: Path, target: str, version: str, weights: Any
) -> None:
    """Against the lists of the public tags; and none that does nothing there."""
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")
    wishes = Wishes(tensorrt=version, engine_weights=weights)
    folder = prepared(plan_build(bundle, find_target(target), wishes), recorder=None)
    used, known = options_of(folder), set((LISTS / f"{version}.txt").read_text().split())
    assert used <= known, used - known
    assert {"--onnx", "--saveEngine", "--loadEngine", "--exportTimes", "--dynamicPlugins"} <= used
    assert not used & traits("tensorrt", version).useless
    assert ("--stronglyTyped" in used) == (version != "11.1") and not used & {"--fp16", "--bf16", "--best", "--plugins"}
    assert ("--useManagedMemory" in used) == (weights == "shared" and target.startswith("jetson"))


@pytest.mark.parametrize("target", known_targets())
def test_scripts_are_sound_for_every_target(tiny_bundle: Any, tmp_path: Path, target: str) -> None:
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")
    folder = prepared(plan_build(bundle, find_target(target), Wishes()), recorder=None)
    texts = sorted(folder.rglob("*.sh"))
    assert {"build.sh", "profile.sh"} <= {path.name for path in texts}
    subprocess.run(["bash", "-n", *texts], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *(path for path in texts if path.name != "weights.sh")], check=True)
    chosen = find_target(target)
    assert options_of(folder) <= traits(chosen.flavour, chosen.version()).options
    assert all(os.access(path, os.X_OK) for path in texts if path.name != "weights.sh")


def test_build_and_profile_run_with_a_tool(kit: Any, tmp_path: Path) -> None:
    source = kit("jetson-orin-jp6", unpruned=True)
    folder = tmp_path / "engines"
    shutil.copytree(source, folder)
    environment = fake_tool(tmp_path / "bin") | {"PLUGINS": str(Path(__file__))}
    done = run(folder / "build.sh", environment)
    assert (done.returncode, done.stderr) == (0, "")
    record = EnginesRecord.load(folder)
    built = calls(tmp_path / "bin")
    assert [call[0] for call in built] == [
        *(f"--onnx={graph.onnx.file}" for graph in record.graphs),
        *(f"--onnx=graphs/{name}.onnx" for name in ("vision", "prefill_0", "head", "decode")),
    ]
    assert all(f"--dynamicPlugins={Path(__file__)}" in call for call in built if "select_0" in call[0])
    assert (folder / "decode.engine").is_file() and (folder / "unpruned" / "decode.engine").is_file()
    assert not list(folder.rglob("*.partial"))
    (tmp_path / "bin" / "log").unlink()
    assert "up to date" in run(folder / "build.sh", environment).stdout and not (tmp_path / "bin" / "log").exists()
    done = run(folder / "profile.sh", environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "profile" / "select_0.times.json").is_file()
    assert "tool: TensorRT v100300" in (folder / "profile" / "system.txt").read_text()
    check_inputs(folder, record, calls(tmp_path / "bin"))


def check_inputs(folder: Path, record: EnginesRecord, profiled: list[list[str]]) -> None:
    """Every input of every graph has a file of exactly its size; weights have the safetensors file's bytes."""
    sizes = {"float32": 4, "int32": 4}
    with safe_open(folder / "graphs/weights/model.safetensors", "np") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for graph, call in zip(record.graphs, profiled, strict=False):
        (given,) = [option.removeprefix("--loadInputs=") for option in call if option.startswith("--loadInputs=")]
        files = dict(pair.rsplit(":", 1) for pair in given.split(","))
        wanted = {tensor.name: tensor for tensor in (*graph.inputs, *graph.weight_inputs)}
        assert files.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (folder / files[name]).stat().st_size == sizes[tensor.dtype] * int(np.prod(tensor.shape)), name
    packed = next(w for g in record.graphs for w in g.weight_inputs if ".layers.2." in w.name and "q_proj" in w.name)
    got = np.fromfile(folder / scripts.weight_file(packed), "<f4").reshape(packed.shape)
    parts = [name for kind in "qkv" for name in stored if name.endswith(f"layers.2.self_attn.{kind}_proj.weight")]
    np.testing.assert_array_equal(got, np.concatenate([stored[name] for name in parts]))


def test_named_graphs_and_random_weights(kit: Any, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(kit("jetson-orin-jp6"), folder)
    environment = fake_tool(tmp_path / "bin") | {"PLUGINS": str(Path(__file__)), "WEIGHTS": "random"}
    assert run(folder / "build.sh", environment, "head", "select_1").returncode == 0
    assert sorted(path.name for path in folder.glob("*.engine")) == ["head.engine", "select_1.engine"]
    (tmp_path / "bin" / "log").unlink()
    assert run(folder / "profile.sh", environment, "head").returncode == 0
    (call,) = calls(tmp_path / "bin")
    assert "--loadInputs=hidden:inputs/head/hidden.bin,last:inputs/head/last.bin" in call
    assert not list((folder / "inputs" / "weights").glob("*.bin"))
    done = run(folder / "profile.sh", environment, "decode")
    assert (done.returncode, "no engine for decode" in done.stderr) == (3, True)


@pytest.mark.parametrize(
    ("environment", "digits", "message"),
    [
        ({"FAIL": "1"}, "100300", "something went wrong"),
        ({"NO_FILE": "1"}, "100300", "wrote no engine for vision"),
        ({}, "101600", "is of TensorRT v101600"),
        ({"TRTEXEC": "/nowhere/trtexec"}, "100300", "no trtexec: /nowhere/trtexec"),
        ({"PLUGINS": "/nowhere/plugin.so", "NVCC": "/nowhere/nvcc"}, "100300", "no nvcc: /nowhere/nvcc"),
    ],
)
def test_a_failed_build_says_so_and_leaves_no_engine(
    kit: Any, tmp_path: Path, environment: dict[str, str], digits: str, message: str
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(kit("jetson-orin-jp6"), folder)
    tool = fake_tool(tmp_path / "bin", digits)
    done = run(folder / "build.sh", {"PLUGINS": str(Path(__file__)), **tool, **environment})
    assert done.returncode == 3 and message in done.stderr and len(done.stderr.splitlines()) <= 3
    assert not [path for path in folder.iterdir() if ".engine" in path.name]


def test_plugin_sources_compile(kit: Any, tmp_path: Path) -> None:
    """The one command of nvcc, for Orin, against headers named by TENSORRT_INCLUDE_DIR."""
    headers = builds.tensorrt_headers()
    if not headers:
        pytest.skip("TENSORRT_INCLUDE_DIR names no folder of NvInferRuntime.h")
    folder = tmp_path / "plugins"
    shutil.copytree(kit("jetson-orin-jp6") / "plugins", folder)
    done = run(folder / "build.sh", {**os.environ, "NVCC": builds.nvcc(), "TENSORRT_INCLUDE": str(headers[0])})
    assert (done.returncode, done.stderr) == (0, "")
    library = folder / "libbtp_trt_dynamic.so"
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert "getCreators" in symbols and "setLoggerFinder" in symbols


def test_plugin_sources_include_only_what_is_there(kit: Any) -> None:
    folder = kit("jetson-orin-jp6") / "plugins"
    assert not [str(path) for path in plugin_sources() if "ort" in path.name]
    for path in plugin_sources():
        for include in set(re.findall(r'#include "(.*)"', (folder / path).read_text())) - {"simt.h"}:  # of our tests
            assert ((folder / path).parent / include).is_file(), f"{path} includes {include}"
    named = shlex.split((folder / "build.sh").read_text().rsplit('"$NVCC" -shared', 1)[1], comments=True)
    units = {part for part in named if part.endswith((".cu", ".cpp"))}
    assert units == {str(path) for path in plugin_sources() if path.suffix in (".cu", ".cpp")}


def test_without_custom_nodes_no_plugin_is_asked_for(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle(), tmp_path / "bundle")
    folder = prepared(plan_build(bundle, find_target("l4"), Wishes()), recorder=None)
    assert not (folder / "plugins").exists() and "plugins/build.sh" not in (folder / "build.sh").read_text()
    assert run(folder / "build.sh", fake_tool(tmp_path / "bin", "101600")).returncode == 0


# -- all or nothing --------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_current_stays(tiny_bundle: Any, tmp_path: Path) -> None:
    """Without force nothing is written anew; with it all is, but what is no engines folder is never touched."""
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")
    plan = plan_build(bundle, find_target("l4"), Wishes())
    folder = prepared(plan, recorder=None)
    (folder / "notes.txt").write_text("mine")
    before, script = files_of(bundle.root), (folder / "build.sh").stat()
    prepared(plan, recorder=None)
    assert before == files_of(bundle.root) and (folder / "build.sh").stat().st_ino == script.st_ino
    prepared(plan, force=True, recorder=None)
    assert not (folder / "notes.txt").exists() and (folder / "build.sh").stat().st_ino != script.st_ino
    Bundle.open(bundle.root, check="full")
    stranger = bundle.root / "engines" / "h100"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no folder of engines"):
        prepared(plan_build(bundle, find_target("h100"), Wishes()), force=True, recorder=None)
    assert (stranger / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")
    plan = plan_build(bundle, find_target("l4"), Wishes())

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(plan, recorder=interrupted)
    assert not (bundle.root / "engines").exists()


def test_without_inputs_a_note_says_why(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")

    def unable(*arguments: Any) -> None:
        raise UnavailableError("the machine is too small")

    folder = prepared(plan_build(bundle, find_target("l4"), Wishes()), recorder=unable)
    assert "the machine is too small" in EnginesRecord.load(folder).notes[-1]
    assert not (folder / "inputs").exists() and "--loadInputs=$inputs" in (folder / "profile.sh").read_text()


def test_findings_stop_the_kit(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(staged_bundle(tiny_bundle), tmp_path / "bundle")
    plan = plan_build(bundle, find_target("l4"), Wishes())
    (bundle.root / "graphs" / "weights" / "model.safetensors").unlink()
    findings = tuple(lint(plan.graphs, plan.traits, folder=bundle.root / "graphs", plugins=True))
    with pytest.raises(CheckError, match=r"will not take .*model\.safetensors is missing"):
        prepared(replace(plan, findings=findings), recorder=None)
    assert not (bundle.root / "engines").exists()


def test_words_of_a_record_are_words_in_the_scripts(kit: Any, tmp_path: Path) -> None:
    """The records refuse such names; should one get past them, the shell still sees one word."""
    folder = kit("jetson-orin-jp6", engine_weights="shared")
    record, target = EnginesRecord.load(folder), find_target("jetson-orin-jp6")
    evil = "x'$(touch owned)`touch owned`; touch owned #\""
    graph = record.graphs[1]
    onnx = graph.onnx.model_copy(update={"file": f"graphs/{evil}.onnx"})
    sample = next(iter(graph.samples.values())).model_copy(update={"file": f"inputs/{evil}"})
    source = graph.weight_inputs[0].sources[0].model_copy(update={"file": evil})
    weight = graph.weight_inputs[0].model_copy(update={"name": evil, "sources": (source,)})
    graph = graph.model_copy(update={"onnx": onnx, "samples": {evil: sample}, "weight_inputs": (weight,)})
    record = record.model_copy(update={"graphs": (graph,)})
    written = {
        "build": scripts.build_script(record, target, traits("tensorrt", "10.3")),
        "profile": scripts.profile_script(record, target, traits("tensorrt", "10.3")),
        "weight": scripts.weights_script(record),
    }
    for function, script in written.items():
        call = script[script.rindex(f"\n{function} ") :]
        stub = f'{function}() {{ printf "%s\\n" "$@"; }}\nPLUGINS=p\n{call}'
        said = subprocess.run(["bash", "-c", stub], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert any(evil in line for line in said.splitlines()), function
    assert not list(tmp_path.iterdir())


def test_an_input_name_that_is_a_path_is_refused(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle(), tmp_path / "bundle")
    path = bundle.graph_path("vision")
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].name = "/../../../owned"
    for node in model.graph.node:
        node.input[:] = ["/../../../owned" if name == "pixel_values" else name for name in node.input]
    path.unlink()
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"a tensor is called '/\.\./\.\./\.\./owned'"):
        plan_build(bundle, find_target("jetson-orin-jp6"), Wishes())
