"""The Python face: all names are there, typed and lazy; its page is current; and it does the job."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from PIL import Image

import btp_export
from btp_export import api_reference
from graphs.records.plan import Stage

ROOT = Path(__file__).parents[2]


def test_every_name_is_there_and_documented() -> None:
    assert sorted(btp_export.__all__) == btp_export.__all__ == dir(btp_export)
    text = api_reference.PAGE.read_text(encoding="utf-8")
    for name in btp_export.__all__:
        value = getattr(btp_export, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
            assert f"btp_export.{name}" in text, f"docs/api.md lacks {name}"
    with pytest.raises(AttributeError, match="nothing"):
        _ = btp_export.nothing


def test_the_page_has_the_real_signatures() -> None:
    """`make schemas` writes them."""
    text = api_reference.PAGE.read_text(encoding="utf-8")
    assert text == api_reference.page(text)
    documented = {line.split("`")[1] for line in text.splitlines() if line.startswith("- `")}
    for name in api_reference.FUNCTIONS:
        arguments = inspect.signature(getattr(btp_export, name)).parameters
        described = [line for line in (inspect.getdoc(getattr(btp_export, name)) or "").splitlines() if ": " in line]
        assert {line.split(":")[0].strip() for line in described if line.startswith("    ")} <= arguments.keys()
    assert {"bundle", "model", "target", "dry_run"} <= documented
    assert all(line.rstrip()[-1] in ".;" and "`: " in line for line in text.splitlines() if line.startswith("- `"))
    # An argument has one entry, also where its description takes several lines.
    assert all(name.isidentifier() for name in documented) and text.count("- `threads`") == 1


@pytest.mark.parametrize("name", api_reference.FUNCTIONS)
def test_functions_are_typed_for_users(name: str) -> None:
    """No argument and no result is untyped; tests/btp_export/user_script.py is what mypy --strict sees of it."""
    function = getattr(btp_export, name)
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    assert signature.return_annotation is not empty
    assert all(parameter.annotation is not empty for parameter in signature.parameters.values())
    assert "Any" not in str(signature)
    assert (ROOT / "btp_export" / "py.typed").is_file()


def test_names_are_imported_when_they_are_asked_for() -> None:
    script = (
        "import sys, btp_export; before = {m for m in sys.modules if m.split('.')[0] in ('graphs', 'engines')};"
        "plan = btp_export.Plan; assert not before and 'graphs.records.plan' in sys.modules;"
        "from btp_export import *; assert export.__module__ == 'btp_export.api';"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_whole_job_from_python(tiny_checkpoint: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = str(tiny_checkpoint)
    plan = btp_export.calibrate(model, compression=0.5, samples=4)
    assert isinstance(plan, btp_export.Plan) and plan.compression >= 0.5
    texts: list[str] = []
    shapes = [btp_export.Shape(text=16, new=4), btp_export.Shape(batch=2, text=16, new=4)]
    bundle = btp_export.export(
        model, plan=plan, out=tmp_path / "b", shapes=shapes, report=lambda done, total, text="": texts.append(text)
    )
    assert isinstance(bundle, btp_export.Bundle) and bundle.plan == plan and texts
    assert [profile.batch for profile in bundle.manifest.profiles] == [1, 2]
    [answer] = btp_export.load(str(bundle.root)).generate(pictures[0], "what colour is the star?")
    assert answer.text and answer.tokens_kept == tuple(stage.keep for stage in plan.stages)
    profile = bundle.profile().name
    result = btp_export.verify(tmp_path / "b", samples=1, tokens=2, profile=profile)
    assert result.passed and result.profiles == (profile,)
    assert btp_export.evaluate(bundle, plans=["btp"], samples=2, threads=1).rows[0].plan == "btp"
    assert btp_export.bench(bundle, rounds=1).prefill.speedup > 0
    planned = btp_export.build(bundle, "l4", dry_run=True)
    assert planned.dry_run and planned.findings == () and not (bundle.root / "engines").exists()
    built = btp_export.build(bundle.root, "jetson-orin-jp6")
    assert built.not_built and built.folder == bundle.root / "engines" / "jetson-orin-jp6"


def test_plans_by_name_by_file_and_as_objects(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, shapes = str(tiny_checkpoint), [btp_export.Shape(text=16, new=4)]
    named = btp_export.export(model, plan="vtw", compression=0.5, out=str(tmp_path / "named"), shapes=shapes)
    file = btp_export.export(model, plan=named.root / "plan.json", out=tmp_path / "file", shapes=shapes)
    own = btp_export.export(
        model, plan=btp_export.Plan.load(named.root / "plan.json"), out=tmp_path / "own", shapes=shapes
    )
    assert named.plan == file.plan == own.plan and named.plan.compression == pytest.approx(0.5, abs=0.05)
    with pytest.raises(btp_export.InputError, match="compression with a Plan"):
        btp_export.export(model, plan=own.plan, compression=0.5, out=tmp_path / "other", shapes=shapes)
    other = own.plan.model_copy(update={"num_layers": 7, "stages": (Stage(layer=6, keep=0),)})
    with pytest.raises(btp_export.InputError):
        btp_export.export(model, plan=other, out=tmp_path / "other", shapes=shapes)
    assert not (tmp_path / "other").exists()


def test_the_former_name_of_a_target_still_works_and_says_so(tiny_bundle: Any) -> None:
    with pytest.warns(DeprecationWarning, match="load\\(target="), pytest.raises(btp_export.InputError, match="l4"):
        btp_export.load(tiny_bundle(), engine="l4")


def test_shapes_are_written_as_the_command_line_takes_them() -> None:
    assert str(btp_export.Shape(batch=2, text=64, new=128, image=(336, 672))) == "batch=2,text=64,new=128,image=336x672"
    assert str(btp_export.Shape()) == "batch=1"


def test_hints_resolve() -> None:
    """`help()` and editors read them."""
    assert get_type_hints(btp_export.Shape)["batch"] is int
