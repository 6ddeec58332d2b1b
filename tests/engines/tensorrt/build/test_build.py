"""The whole `build`: what is rebuilt, what a failed or interrupted one leaves, what is refused before it begins."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from btp_export.cli import main
from engines.native import libraries
from engines.targets import find_target
from engines.tensorrt import installed
from engines.tensorrt.build.build import Result, build
from engines.tensorrt.build.machine import choose_plugins, machine_for
from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.build_plan import BuildPlan, Wishes, plan_build
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from engines.tensorrt.records import EnginesRecord
from graphs.files.atomic import RESERVE
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError, InputError, UnavailableError
from graphs.records.plan import Stage
from tests.btp_export.results.examples import verification
from tests.engines.native import rtx
from tests.engines.tensorrt import building
from tests.engines.tensorrt.plans import RULES, STAGES, staged_bundle, staged_plan

WHOLE = Wishes(assemble="whole")
ONE_STAGE = (Stage(layer=2, keep=6, attention_quota=6, pool=6),)


@pytest.fixture
def bundle(short_bundle: Any, tmp_path: Path) -> Bundle:
    """A copy of a small bundle with one stage, as tests add engines to it."""
    original = short_bundle(staged_plan(short_bundle().spec, *ONE_STAGE))
    shutil.copytree(original.root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def run(bundle: Bundle, wishes: Wishes = WHOLE, **options: Any) -> Result:
    building.need_rtx()
    builder = machine_for(find_target("rtx-ada"), wishes)
    plan = plan_build(bundle, find_target("rtx-ada"), builder.wishes)
    return build(plan, builder.library, wish=wishes.plugins, **options)


@pytest.fixture(scope="module")
def built_once(short_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with its two engines."""
    original = short_bundle(staged_plan(short_bundle().spec, *ONE_STAGE))
    root = Path(shutil.copytree(original.root, tmp_path_factory.mktemp("built") / "bundle"))
    first = run(Bundle.open(root))
    assert first.built == ("prefill.engine", "decode.engine") and first.kept == ()
    return root


@pytest.fixture
def with_engines(built_once: Path, tmp_path: Path) -> Bundle:
    """A copy of it."""
    shutil.copytree(built_once, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def engines(folder: Path) -> dict[str, tuple[int, str]]:
    """Every engine file there: when it was written, and its hash."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.glob("*.engine*"))
    }


def check_folder(folder: Path) -> EnginesRecord:
    """No engine is there but those that engines.json names, and each is the one it means; nothing is half done."""
    record = EnginesRecord.load(folder)
    named = {graph.engine.file: graph.engine.sha256 for graph in record.graphs if graph.engine is not None}
    assert {name: digest for name, (_, digest) in engines(folder).items()} == named
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    return record


# -- what is rebuilt -------------------------------------------------------------------------------------------------


def test_only_what_changed_is_rebuilt(with_engines: Bundle) -> None:
    bundle, folder = with_engines, with_engines.root / "engines" / "rtx-ada"
    before = engines(folder)
    assert run(bundle).built == () and engines(folder) == before

    whole = (folder / "decode.engine").read_bytes()
    (folder / "decode.engine").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(bundle).built == ("decode.engine",)
    after = engines(folder)
    assert after["prefill.engine"] == before["prefill.engine"]

    text = (folder / "engines.json").read_text()
    version = check_folder(folder).graphs[0].engine.tensorrt_version  # type: ignore[union-attr]
    (folder / "engines.json").write_text(text.replace(version, "1.7.0.1", 1))
    assert run(bundle).built == ("prefill.engine",)
    assert check_folder(folder).graphs[0].engine.tensorrt_version == version  # type: ignore[union-attr]

    before = engines(folder)
    assert run(bundle, force=True).built == ("prefill.engine", "decode.engine")
    assert all(engines(folder)[name][0] != written for name, (written, _) in before.items())


def test_other_choices_rebuild_what_they_change_and_keep_what_is_the_users(bundle: Bundle) -> None:
    """The form of the plugins concerns the selection alone; profile/ and notes survive the new kit."""
    segments = Wishes(assemble="segments", engine_weights="shared")
    first = run(bundle, replace(segments, plugins="none"))
    (first.folder / "notes.txt").write_text("mine")
    (first.folder / "profile").mkdir()
    (first.folder / "profile" / "decode.json").write_text("{}")
    (first.folder / "old.engine").write_bytes(b"of nobody")
    second = run(bundle, replace(segments, plugins="python"))
    assert second.built == ("select_0.engine",) and len(second.kept) == len(first.built) - 1
    (first.folder / "old.engine").unlink()  # still there: nobody knows who made it
    assert check_folder(second.folder).plugins.form == "python"
    assert (second.folder / "notes.txt").read_text() == "mine"
    assert (second.folder / "profile" / "decode.json").read_text() == "{}"


# -- stages that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", ["python", "none"])
def test_one_engine_of_stages_with_different_rules(tiny_bundle: Any, tmp_path: Path, plugins: Any) -> None:
    original = staged_bundle(tiny_bundle, *RULES)
    shutil.copytree(original.root, tmp_path / "bundle")
    result = run(Bundle.open(tmp_path / "bundle"), replace(WHOLE, plugins=plugins))
    assert result.built == ("prefill.engine", "decode.engine")


def test_the_parser_warns_of_no_attribute_of_a_prepared_selection(tiny_bundle: Any, tmp_path: Path) -> None:
    building.need_rtx()
    for number, stages in enumerate((STAGES, RULES)):
        graphs = prepare(staged_bundle(tiny_bundle, *stages), Choices(23, plugins=True))
        models = {graph.name: ir.serde.serialize_model(graph.model) for graph in graphs if graph.custom_nodes}
        folder = tmp_path / str(number)
        folder.mkdir()
        built = rtx.build(models, folder, "python")
        assert len(built) == 3 and all(result["parsed"] and result["log"] == [] for result in built.values()), built


# -- failed and interrupted ------------------------------------------------------------------------------------------


def test_a_failed_build_leaves_whole_engines_alone(bundle: Bundle) -> None:
    """The second graph has an operator that nobody knows; what was built before stays, and is gone on from."""
    building.need_rtx()
    builder = machine_for(find_target("rtx-ada"), WHOLE)
    plan = plan_build(bundle, find_target("rtx-ada"), builder.wishes)
    broken = ir.serde.deserialize_model(ir.serde.serialize_model(plan.graphs[1].model))
    next(iter(broken.graph)).op_type = "NoSuchOperator"
    wrong = replace(plan, graphs=(plan.graphs[0], replace(plan.graphs[1], model=broken)))
    with pytest.raises(CheckError, match=r"decode: TensorRT refuses node .* \(NoSuchOperator\)"):
        build(wrong, builder.library)
    record = check_folder(bundle.root / "engines" / "rtx-ada")
    assert [graph.engine is not None for graph in record.graphs] == [True, False]
    assert run(bundle).built == ("decode.engine",)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_is_gone_on_with(number: signal.Signals, bundle: Bundle) -> None:
    building.need_rtx()
    folder = bundle.root / "engines" / "rtx-ada"
    options = ["--target", "rtx-ada", "--assemble", "whole"]
    code = (
        "import btp_export.engine_inputs; btp_export.engine_inputs.record_calibration = None\n"  # takes seconds
        "import time; from engines.tensorrt.build import build; build_in_child = build.build_in_child\n"
        "def slow(job, scratch, log, report):\n"  # the second engine takes until we interrupt it
        "    wait = report if job.graph == 'prefill' else lambda share: time.sleep(60)\n"
        "    return build_in_child(job, scratch, log, wait)\n"
        "build.build_in_child = slow\n"
        f"from btp_export.cli import main; raise SystemExit(main({['build', str(bundle.root), *options]!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (folder / "prefill.engine").is_file() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, said.decode()
        assert b"interrupted" in said
        assert [graph.engine is not None for graph in check_folder(folder).graphs] == [True, False]
    else:
        assert process.returncode == -signal.SIGKILL
        record = EnginesRecord.load(folder)
        named = [graph.engine.file for graph in record.graphs if graph.engine is not None]
        assert named in ([], ["prefill.engine"]) and not (folder / "decode.engine").exists()
    assert "decode.engine" in run(bundle).built
    check_folder(folder)


def test_two_builds_at_a_time_are_refused(bundle: Bundle) -> None:
    handle = os.open(bundle.root, os.O_RDONLY)  # engines/ is not there yet
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another build works in"):
            run(bundle)
    finally:
        os.close(handle)
    assert not (bundle.root / "engines").exists()


# -- refused before anything is written ------------------------------------------------------------------------------


def test_a_folder_of_the_user_is_not_touched(bundle: Bundle) -> None:
    folder = bundle.root / "engines" / "rtx-ada"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is no folder of engines"):
            run(bundle, force=force)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_too_little_memory_is_said_with_what_would_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTP_MEMORY_GIB", str(2**20 / 2**30))
    with pytest.raises(InputError, match="building the largest engine needs about") as caught:
        run(bundle, Wishes(engine_weights="baked"))
    assert "1.0 MiB" in caught.value.wanted and not (bundle.root / "engines").exists()


def test_too_little_disk_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=RESERVE))
    with pytest.raises(InputError, match="the folder rtx-ada needs"):
        run(bundle)
    assert not (bundle.root / "engines").exists()


def test_another_version_than_the_installed_one_is_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    building.need_rtx()
    library = installed.load("rtx")
    older = f"{library.version.split('.')[0]}.6.0"
    assert main(["build", str(bundle.root), "--target", "rtx-ada", "--tensorrt", older]) == 3
    assert f"{library.title} is installed here" in capsys.readouterr().err
    assert not (bundle.root / "engines").exists()


def test_a_missing_plugin_library_is_refused_where_it_was_asked_for(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    building.need_rtx()
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    assert main(["build", str(bundle.root), "--target", "rtx-ada", "--plugins", "library"]) == 3
    assert "libbtp_trt_dynamic.so was not found" in capsys.readouterr().err
    assert not (bundle.root / "engines").exists()


# -- what this machine can build -------------------------------------------------------------------------------------


def test_without_tensorrt_the_kit_is_written_and_said(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda flavour: False)
    command = ["build", str(bundle.root), "--target", "rtx-ada", "--assemble", "whole", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert "btp-export[rtx]" in result["not_built"] and result["built"] == []
    assert [entry["state"] for entry in result["engines"]] == ["not built", "not built"]
    folder = Path(result["folder"])
    assert (folder / "build.sh").is_file() and engines(folder) == {}


def test_engines_built_elsewhere_are_kept_where_nothing_can_be_built(
    with_engines: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_engines
    before = engines(bundle.root / "engines" / "rtx-ada")
    monkeypatch.setattr(installed, "is_installed", lambda flavour: False)
    builder = machine_for(find_target("rtx-ada"), WHOLE)
    result = build(plan_build(bundle, find_target("rtx-ada"), builder.wishes), builder.library)
    assert (
        builder.library is None
        and result.kept == ("prefill.engine", "decode.engine")
        and engines(result.folder) == before
    )


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`jetson(version, capability, machine)`: this machine as a Jetson Orin with TensorRT would show itself."""

    def make(version: str = "10.3.0.30", capability: str | None = "8.7", machine: str = "aarch64") -> None:
        monkeypatch.setattr(installed, "is_installed", lambda flavour: True)
        monkeypatch.setattr(installed, "load", lambda flavour: Library(flavour, version, None))
        monkeypatch.setattr(installed, "gpu_capability", lambda: capability)
        monkeypatch.setattr("platform.machine", lambda: machine)

    return make


def test_the_installed_version_is_taken(jetson: Callable[..., None]) -> None:
    jetson("10.16.1.11")
    builder = machine_for(find_target("jetson-orin-jp7"), Wishes())
    assert builder.library is not None and builder.wishes.tensorrt == "10.16"


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"capability": None}, "this machine is aarch64 with no GPU"),
        ({"capability": "9.0", "machine": "x86_64"}, "this machine is x86_64 with a GPU of compute capability 9.0"),
    ],
)
def test_another_machine_prepares_the_kit(jetson: Callable[..., None], here: dict[str, Any], reason: str) -> None:
    jetson(**here)
    builder = machine_for(find_target("jetson-orin-jp6"), Wishes())
    assert builder.library is None and builder.reason.startswith(reason) and "8.7" in builder.reason


def test_a_wrong_tensorrt_on_the_device_is_refused(jetson: Callable[..., None]) -> None:
    jetson("8.6.2.3")
    with pytest.raises(InputError, match="has no IPluginV3"):
        machine_for(find_target("jetson-orin-jp6"), Wishes())
    jetson("10.16.1.11")
    with pytest.raises(UnavailableError, match=r"TensorRT 10\.16\.1\.11 is installed here"):
        machine_for(find_target("jetson-orin-jp6"), Wishes(tensorrt="10.3"))


def planned(bundle: Bundle, **wishes: Any) -> BuildPlan:
    return plan_build(bundle, find_target("jetson-orin-jp6"), Wishes(**wishes))


def test_the_plugin_library_must_be_for_the_gpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is taken with its hash; where it does not suit the Python plugins stand in for it, and that is said."""
    file = tmp_path / "libbtp_trt_dynamic.so"
    file.write_bytes(b"a library")
    found = libraries.NativeLibrary("btp_trt_dynamic", file, ("87",))
    monkeypatch.setattr(libraries, "find", lambda name: file)
    monkeypatch.setattr(libraries, "inspect", lambda name, path: found)
    plan = planned(bundle)
    taken = choose_plugins(plan, "auto")
    assert (taken.record.form, taken.path) == ("library", file)
    assert taken.record.sha256 == hashlib.sha256(b"a library").hexdigest()

    found = replace(found, architectures=("90",))
    stand_in = choose_plugins(plan, "auto")
    assert stand_in.record.form == "python" and "was built for 90" in stand_in.note
    with pytest.raises(UnavailableError, match="was built for 90"):
        choose_plugins(plan, "library")
    assert choose_plugins(planned(bundle, plugins="none"), "none").record.form == "none"


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_built(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    building.need_rtx()
    command = ["build", str(bundle.root), "--target", "rtx-ada", "--assemble", "whole"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["built"] == ["prefill.engine", "decode.engine"] and result["not_built"] is None
    assert {"target", "tensorrt", "compute_capability", "assemble", "engine_weights", "total"} <= set(result)
    prefill = result["engines"][0]
    assert prefill["state"] == "built" and prefill["peak_memory_bytes"] > 2**20 and prefill["layers"] > 0
    assert main(command) == 0
    assert "0 engines built, 2 unchanged" in capsys.readouterr().out


def test_the_main_job_builds_engines_too(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plan that needs no calibration; what is verified, measured and reported before is left out."""
    building.need_rtx()
    measured = SimpleNamespace(verification=verification(), evaluation=None, bench=None)
    monkeypatch.setattr("btp_export.pipeline.collect", lambda *_, **__: measured)
    monkeypatch.setattr("btp_export.pipeline.write_report", lambda *_: None)
    out = tmp_path / "b"
    shapes = ["--text-tokens", "16", "--max-new-tokens", "4", "--precision", "float16"]
    command = ["--model", str(tiny_checkpoint), "--out", str(out), "--plan", "vtw", *shapes]
    assert main([*command, "--target", "rtx-ada", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {entry["state"] for entry in result["engines"]["engines"]} == {"built"} and result["seconds"]["engines"] > 0
    check_folder(out / "engines" / "rtx-ada")


def test_the_main_job_asks_for_the_target_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "demo", "--out", str(tmp_path / "b"), "--target", "rtx-adda"]) == 2
    assert "rtx-ada" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
