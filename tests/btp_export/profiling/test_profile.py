"""`btp-export profile`: measured by the kit's profile.sh with a program in trtexec's place, and read from elsewhere."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from btp_export.cli import main
from btp_export.profiling.profile import profile_engines, saved_profiles
from engines.targets import find_target
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from engines.tensorrt.records import EnginesRecord, bundle_digest, engines_folder
from graphs.files.bundle import Bundle
from graphs.pruning.operations import cost
from graphs.records.errors import InputError, UnavailableError
from graphs.records.plan import Stage
from tests.engines import jetson_files
from tests.engines.tensorrt import trtexec_files
from tests.engines.tensorrt.plans import prepared
from tests.plans import tiny_plan

TARGET = "jetson-orin-jp6"
STAGES = (
    Stage(layer=2, keep=18, attention_quota=6, pool=24, boundary=18, diversity_quota=6, seeds=9),
    Stage(layer=4, keep=6, attention_quota=6, pool=6, boundary=6),
    Stage(layer=5, keep=0),
)
FLAT, SLOPE = 0.12, 0.004  # milliseconds of a layer: the larger of FLAT and SLOPE * tokens
SELECT_MS = {"select_0": 0.2, "select_1": 0.1, "select_2": 0.02}
OTHERS = {"vision": 3.0, "head": 0.4, "decode": 2.0}
FULL_DECODE = 2.1
LIBRARY = "plugins/libbtp_trt_dynamic.so"


@pytest.fixture(scope="module")
def pristine(tiny_bundle: Any) -> Bundle:
    plan = tiny_plan(*STAGES)
    made: Bundle = tiny_bundle(plan)
    return made


@pytest.fixture
def bundle(pristine: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(pristine.root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def layer_ms(tokens: float) -> float:
    return max(FLAT, SLOPE * tokens)


def times(bundle: Bundle) -> dict[str, float]:
    """Milliseconds of each engine, by its path in engines/<target>/."""
    profile = bundle.profile()
    found = OTHERS | SELECT_MS
    for segment in bundle.plan.segments():
        layers = segment.stop - segment.start
        found[f"prefill_{segment.index}"] = layers * layer_ms(profile.tokens_with(segment.image_tokens))
    found |= {f"unpruned/{name}": ms for name, ms in OTHERS.items()}
    found |= {"unpruned/decode": FULL_DECODE, "unpruned/prefill_0": 6 * layer_ms(profile.total_tokens)}
    return {f"{name}.engine": ms for name, ms in found.items()}


KITS: dict[tuple[str, str], Path] = {}


def kit(bundle: Bundle, **wishes: Any) -> Path:
    """The folder of engines as `build` writes it without TensorRT: once for each bundle and wishes, then a copy."""
    chosen = {"engine_weights": "baked", "unpruned": True} | wishes
    key = (bundle_digest(bundle), repr(sorted(chosen.items())))
    if key not in KITS:
        folder = prepared(plan_build(bundle, find_target(TARGET), Wishes(**chosen)), force=True, recorder=None)
        KITS[key] = Path(shutil.copytree(folder, bundle.root.with_name(f"kit-{len(KITS)}")))
        return folder
    root = engines_folder(bundle, TARGET)
    shutil.rmtree(root, ignore_errors=True)
    return Path(shutil.copytree(KITS[key], root))


def measured(bundle: Bundle, measured: Mapping[str, float] | None = None, **wishes: Any) -> Path:
    """A kit with results of profile.sh in it; the folder."""
    root = kit(bundle, **wishes)
    for name, milliseconds in (times(bundle) | dict(measured or {})).items():
        folder = (root / name).parent
        if folder.is_dir():
            (folder / "profile").mkdir(exist_ok=True)
            trtexec_files.write_results(str(folder / "profile" / Path(name).stem), milliseconds)
    (root / "profile" / "system.txt").write_text("nvpmodel: NV Power Mode: MAXN\nl4t:\nkernel: Linux 5.15\n")
    return root


def device(bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, *, fail: str = "", **wishes: Any) -> Path:
    """A kit whose engines were "built" here, and a program in trtexec's place on PATH; the folder of engines."""
    root = kit(bundle, **wishes)
    for name in times(bundle):
        (root / name).write_bytes(b"engine")
        (root / name).with_name("plugins").mkdir(exist_ok=True)
        ((root / name).parent / LIBRARY).write_bytes(b"library")
    trtexec_files.put_program(folder, times=times(bundle), fail=fail, root=str(root))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return root


@pytest.fixture(scope="module")
def once(pristine: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle, its engines, their profile by the script, which starts a program for each, and what it reported."""
    folder, said = tmp_path_factory.mktemp("once"), list[tuple[int, int, str]]()
    bundle = Bundle.open(shutil.copytree(pristine.root, folder / "bundle"))
    with pytest.MonkeyPatch.context() as patch:
        root = device(bundle, folder / "bin", patch)
        found = profile_engines(bundle, TARGET, report=lambda *step: said.append(step))  # type: ignore[arg-type]
    return bundle, root, found, said


def test_every_part_beside_its_limits(once: Any) -> None:
    bundle, root, found, said = once
    assert said[0][2] == "vision" and [step[0] for step in said] == list(range(len(said)))
    names = ["vision", "prefill_0", "select_0", "prefill_1", "select_1", "prefill_2", "select_2", "prefill_3"]
    assert [part.name for part in found.parts] == [*names, "head", "decode"]
    parts = {part.name: part for part in found.parts}
    wanted = times(bundle)
    for name, part in parts.items():
        assert part.ms == pytest.approx(wanted[f"{name}.engine"], rel=0.011) and part.runs == 65
        assert part.slowest_layers[0].name == "first"
    profile = bundle.profile()
    assert [parts[f"prefill_{n}"].tokens for n in range(4)] == [profile.tokens_with(kept) for kept in (36, 18, 6, 0)]
    assert [parts[f"select_{n}"].tokens for n in range(3)] == [36, 18, 6]
    operations = cost(bundle.spec.decoder, bundle.plan, profile)
    assert tuple(parts[f"prefill_{n}"].flops for n in range(4)) == operations.segments
    target = find_target(TARGET)
    for part in parts.values():
        compute, memory = part.flops / target.peak["float32"], part.bytes / target.bandwidth
        assert part.floor_ms == pytest.approx(max(compute, memory) * 1000)
        assert part.bound == ("compute" if compute >= memory else "memory")
        assert part.share_of_roofline == pytest.approx(part.floor_ms / part.ms)
    # A decode step reads every weight of the decoder and all caches: that many bytes at the least.
    matrices = sum(
        ref.nbytes for name, ref in bundle.checkpoint().tensors.items() if ".layers." in name and "language" in name
    )
    assert parts["decode"].bytes >= matrices + operations.cache_bytes
    assert (root / "profile.baked.json").is_file() and found.system["tool"].startswith("TensorRT v100300")


def a_board(root: Path, *, hertz: Mapping[str, int], module: str = "p3767-0000") -> None:
    """What profile.sh records on a Jetson Orin NX, or another board, in a folder of results."""
    lines = ["model: NVIDIA Jetson Orin NX", f"module: nvidia,p3768-0000+{module} nvidia,tegra234", "sms: 8"]
    (root / "profile" / "system.txt").write_text("\n".join([*lines, "nvpmodel: NV Power Mode: 25W"]))
    for name, clock in hertz.items():
        (root / "profile" / f"{name}.clock").write_text(f"{clock}\n")


def test_limits_are_those_of_the_board_that_was_measured(bundle: Bundle) -> None:
    root = measured(bundle)
    assert profile_engines(bundle, TARGET, results=root).roofline.device == find_target(TARGET).title
    a_board(root, hertz={"prefill_0": 612_000_000, "decode": 612_000_000, "head": 459_000_000})
    found = profile_engines(bundle, TARGET, results=root)
    board = find_target("jetson-orin-nx-16")
    limits = found.roofline
    assert (limits.device, limits.gpu_clock_hz) == (board.title, 612e6)
    assert limits.peak_flops == pytest.approx(board.peak["float32"] * 612 / 918)
    assert limits.bandwidth_bytes == board.bandwidth  # its clock can only be read by root
    decode = found.parts[-1]
    assert decode.floor_ms == pytest.approx(1e3 * max(decode.flops / limits.peak_flops, decode.bytes / board.bandwidth))
    text = " ".join(found.notes)
    assert "measured on Jetson Orin NX 16 GB" in text and "612 MHz" in text and "459 MHz in head" in text
    with (root / "profile" / "system.txt").open("a") as file:
        file.write("\nmemory_clock_hz: 2133000000\n")
    limits = profile_engines(bundle, TARGET, results=root).roofline
    assert limits.bandwidth_bytes == pytest.approx(board.bandwidth * 2133 / 3199)


def test_layers_that_cost_more_than_they_should_are_named(bundle: Bundle) -> None:
    """Of engines by build.sh, from what trtexec exported; of engines by `build` as engines.json has it."""
    root = measured(bundle, engine_weights="shared")
    weight = next(w for g in EnginesRecord.load(root).graphs if g.name == "decode" for w in g.weight_inputs)
    tensor = {"Name": weight.name, "Dimensions": [4096, 4096], "Format/Datatype": "Row major linear FP32"}
    copy = {"Name": "Reformatting CopyNode for x", "LayerType": "Reformat", "Inputs": [tensor], "Outputs": [tensor]}
    trtexec_files.write_results(str(root / "profile" / "decode"), 2.0, **copy)
    notes = profile_engines(bundle, TARGET, results=root).notes
    assert any(note.startswith("layers of decode: 1 weight inputs do not go straight") for note in notes)
    assert any("64.0 MiB a run" in note for note in notes)
    (root / "profile" / "decode.layers.json").write_text("{")
    assert any("decode.layers.json is cut off" in note for note in profile_engines(bundle, TARGET, results=root).notes)


def test_the_script_records_the_board_and_its_clocks(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(bundle, tmp_path / "bin", monkeypatch)
    jetson_files.write(tmp_path / "root", jetson_files.ORIN_NX)
    monkeypatch.setenv("BTP_ROOT", str(tmp_path / "root"))
    found = profile_engines(bundle, TARGET)
    system = found.system
    assert system["model"] == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert "p3767-0000" in system["module"] and system["l4t"] == "# R36 (release), REVISION: 4.3"
    assert (system["memory"], system["gpu_clock_max_hz"], system["sms"]) == ("15655 kB", "918000000", "8")
    assert (found.roofline.device, found.roofline.gpu_clock_hz) == ("Jetson Orin NX 16 GB", 918e6)
    assert system["nvpmodel"] == "NV Power Mode: 25W"


def test_totals_speedup_and_break_even(bundle: Bundle) -> None:
    found = profile_engines(bundle, TARGET, results=measured(bundle))
    lengths = [bundle.profile().tokens_with(kept) for kept in (36, 36, 18, 18, 6, 0)]
    prefill, full = sum(map(layer_ms, lengths)), 6 * layer_ms(lengths[0])
    select = sum(SELECT_MS.values())
    totals = found.totals
    assert totals.prefill_ms == pytest.approx(prefill, rel=0.011)
    assert totals.select_share == pytest.approx(select / (prefill + select + 0.4), rel=0.02)
    assert totals.first_token_ms == pytest.approx(3.0 + prefill + select + 0.4, rel=0.011)
    assert found.speedup.prefill == pytest.approx((full + 0.4) / (prefill + select + 0.4), rel=0.02)
    assert found.speedup.decode == pytest.approx(2.1 / 2.0, rel=0.02)
    even = found.break_even
    others = bundle.profile().tokens_with(0)

    def saved_with(tokens: int) -> float:
        kept = [tokens * count / 36 for count in bundle.plan.tokens_per_layer()]
        return sum(layer_ms(others + tokens) - layer_ms(others + count) for count in kept)

    assert even.ms_per_token_and_layer == pytest.approx(SLOPE, rel=0.03)
    assert even.floor_ms_per_layer == pytest.approx(FLAT, rel=0.03)
    assert even.image_tokens == pytest.approx(
        next(tokens for tokens in range(1, 10_000) if saved_with(tokens) >= select), abs=2
    )
    assert even.fit_error < 0.03
    saved = full - prefill - select
    assert even.saved_ms == pytest.approx(saved, abs=0.05) and even.pays_here == (saved > 0)


def test_selection_that_costs_too_much(bundle: Bundle) -> None:
    root = measured(bundle, {"select_0.engine": 40.0})
    even = profile_engines(bundle, TARGET, results=root).break_even
    assert even.pays_here is False and even.image_tokens > 36 and even.extrapolated
    assert even.after_new_tokens == pytest.approx(-even.saved_ms / 0.1, rel=0.3)


def test_baked_beside_shared(bundle: Bundle) -> None:
    root = measured(bundle)
    assert profile_engines(bundle, TARGET, results=root).compare is None
    kept = (root / "profile.baked.json").read_bytes()
    faster = {name: ms * 0.5 if "decode" in name else ms * 1.5 for name, ms in times(bundle).items()}
    root = measured(bundle, faster, engine_weights="shared")
    (root / "profile.baked.json").write_bytes(kept)
    found = profile_engines(bundle, TARGET, results=root)
    compare = found.compare
    assert compare is not None
    assert (compare.faster.first_token, compare.faster.decode) == ("baked", "shared")
    row = next(row for row in compare.parts if row.name == "decode")
    assert row.baked_ms == pytest.approx(2.0, rel=0.02) and row.shared_ms == pytest.approx(1.0, rel=0.02)
    assert [one.weights for one in saved_profiles(bundle)] == ["baked", "shared"]


@pytest.mark.parametrize("copy", ["profile", "whole"])
def test_read_from_elsewhere(copy: str, bundle: Bundle, tmp_path: Path) -> None:
    """The folder profile/ alone, or the whole folder of engines as it comes back from the device."""
    root = measured(bundle)
    here = profile_engines(bundle, TARGET, results=root)
    assert here.unpruned is not None and here.system == {
        "nvpmodel": "NV Power Mode: MAXN",
        "kernel": "Linux 5.15",
    }
    back = tmp_path / "back"
    shutil.copytree(root, back)
    shutil.rmtree(root / "profile")
    shutil.rmtree(root / "unpruned" / "profile")
    there = profile_engines(bundle, TARGET, results=back if copy == "whole" else back / "profile")
    assert there == here


def test_only_what_was_measured(bundle: Bundle) -> None:
    found = profile_engines(bundle, TARGET, results=measured(bundle, unpruned=False))
    assert found.unpruned is None and found.speedup is None
    assert any("--unpruned" in note for note in found.notes)
    assert found.break_even.image_tokens is not None and found.break_even.saved_ms is None


def test_the_command_prints_draws_and_writes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    root = measured(bundle)
    assert main(["profile", str(bundle.root), "--target", TARGET, "--from", str(root)]) == 0
    shown = capsys.readouterr().out
    for text in ("prefill_3", "selection takes", "faster than without pruning", "pruning pays in prefill from about"):
        assert text in shown
    assert main(["profile", str(bundle.root), "--target", TARGET, "--from", str(root), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parts"] == json.loads((root / "profile.baked.json").read_text())["parts"]
    drawing = ElementTree.fromstring((root / "profile.baked.svg").read_text())
    said = [title.text or "" for title in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert any(text.startswith("select_1: ") for text in said) and any("decode without pruning" in t for t in said)


def test_a_failed_trtexec_shows_its_last_lines(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = device(bundle, tmp_path / "bin", monkeypatch, fail="select_0.engine")
    assert main(["profile", str(bundle.root), "--target", TARGET]) in (1, 3)
    shown = capsys.readouterr().err
    assert "magicTag" in shown and "FAILED" in shown and "trtexec failed" in shown
    assert not (root / "profile.baked.json").exists()


def test_plugins_that_trtexec_cannot_load(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = device(bundle, tmp_path / "bin", monkeypatch)
    (root / LIBRARY).unlink()
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"libbtp_trt_dynamic\.so was not found"):
        profile_engines(bundle, TARGET)
    record = json.loads((root / "engines.json").read_text())
    (root / "engines.json").write_text(json.dumps(record | {"plugins": {"form": "python", "sha256": None}}))
    with pytest.raises(UnavailableError, match="trtexec cannot load"):
        profile_engines(bundle, TARGET)


def test_what_is_missing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown target"):
        profile_engines(bundle, "jetson-orin")
    with pytest.raises(InputError, match="no engines at") as caught:
        profile_engines(bundle, TARGET)
    assert "btp-export build" in caught.value.do
    root = device(bundle, tmp_path / "bin", monkeypatch)
    with pytest.raises(InputError, match="no profile"):
        profile_engines(bundle, TARGET, profile="other")
    with pytest.raises(InputError, match="no folder"):
        profile_engines(bundle, TARGET, results=tmp_path / "nothing")
    with pytest.raises(InputError, match=r"vision\.times\.json: No such file"):
        profile_engines(bundle, TARGET, results=tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnavailableError, match="trtexec was found neither"):
        profile_engines(bundle, TARGET, places=[tmp_path / "nowhere"])
    (root / "head.engine").unlink()
    with pytest.raises(InputError, match="no engine of head"):
        profile_engines(bundle, TARGET)
    record = json.loads((root / "engines.json").read_text())
    (root / "engines.json").write_text(json.dumps(record | {"bundle_sha256": "0" * 64}))
    with pytest.raises(InputError, match="another export"):
        profile_engines(bundle, TARGET)


def test_a_damaged_result_is_named(bundle: Bundle) -> None:
    root = measured(bundle)
    profile_engines(bundle, TARGET, results=root)
    path = root / "profile" / "prefill_1.times.json"
    path.write_bytes(path.read_bytes()[:-40])
    before = (root / "profile.baked.json").read_bytes()
    with pytest.raises(InputError, match=r"prefill_1\.times\.json is cut off or damaged"):
        profile_engines(bundle, TARGET, results=root)
    assert (root / "profile.baked.json").read_bytes() == before


def test_an_earlier_document_with_missing_parts_is_named(
    bundle: Bundle, once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before anything is measured, by `profile` and by `report`; one of another version is left out."""
    root = device(bundle, tmp_path / "bin", monkeypatch)
    said: list[str] = []
    shutil.copy(once[1] / "profile.baked.json", root)
    document = json.loads((root / "profile.baked.json").read_text())
    damaged = root / "profile.shared.json"
    for content in (json.dumps({key: document[key] for key in document if key != "totals"}), "{", "[]"):
        damaged.write_text(content)
        with pytest.raises(InputError, match=r"profile\.shared\.json is not a valid profile"):
            profile_engines(bundle, TARGET, report=lambda done, total, text="": said.append(text))
        with pytest.raises(InputError, match=r"profile\.shared\.json is not a valid profile"):
            saved_profiles(bundle)
    assert main(["report", str(bundle.root)]) == 2
    assert "profile.shared.json is not a valid profile" in capsys.readouterr().err
    assert said == [] and not (bundle.root / "report").exists()
    damaged.write_text(json.dumps(document | {"format": "btp-profile/0"}))
    assert [profile.weights for profile in saved_profiles(bundle)] == ["baked"]


@pytest.mark.parametrize("wishes", [{"assemble": "whole", "unpruned": False}], ids=["whole"])
def test_engines_of_the_whole_prefill(bundle: Bundle, wishes: dict[str, Any]) -> None:
    """Vision, selection and head cannot be told apart, and nothing is made up."""
    found = profile_engines(bundle, TARGET, results=measured(bundle, {"prefill.engine": 9.0}, **wishes))
    assert [part.kind for part in found.parts] == ["whole", "decode"]
    totals = found.totals
    assert totals.first_token_ms == pytest.approx(9.0, rel=0.01) and totals.select_share is None
    assert found.break_even.image_tokens is None and "segments" in found.break_even.reason


def test_the_report_shows_it(bundle: Bundle) -> None:
    from btp_export.report.data import ReportData
    from btp_export.report.document import document
    from btp_export.report.page import render

    profile_engines(bundle, TARGET, results=measured(bundle))
    page = render(found := document(ReportData(bundle.plan, bundle.manifest, engines=saved_profiles(bundle))), [])
    assert 'id="engines"' in page and "select_1: " in page and "NV Power Mode: MAXN" in page
    assert "Pruning pays in prefill from about" in page
    assert 'id="engines"' not in render(found.model_copy(update={"engines": ()}), [])


@pytest.mark.parametrize("script", ["profile.sh", "unpruned/profile.sh", "weights.sh", "unpruned/weights.sh"])
def test_only_our_own_scripts_are_run(
    script: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = device(bundle, tmp_path / "bin", monkeypatch, engine_weights="shared")
    owned = tmp_path / "owned"
    text = (root / script).read_text()
    (root / script).write_text(f"{text}\ntouch {owned}\n")
    with pytest.raises(InputError, match="is not the script that belongs to"):
        profile_engines(bundle, TARGET)
    assert not owned.exists()
    (root / script).write_text(text)
    shutil.rmtree(root / "logs", ignore_errors=True)
    (root / "logs").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link"):
        profile_engines(bundle, TARGET)
