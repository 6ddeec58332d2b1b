"""Names that come from files: one rule, wherever they become part of a path or of a command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphs.files.bundle import Bundle
from graphs.files.checkpoint import open_checkpoint
from graphs.records.errors import InputError
from graphs.records.record import is_name

BAD = ["/../../x", "..", ".hidden", "-x", "x$(touch owned)", "x y", "x;y", "x'y", "", "a/b", "a\\b", "x\n", "x\0", "é"]
PLACES: dict[str, Callable[[dict[str, Any], str], None]] = {
    "a profile": lambda it, name: it["profiles"][0].update(name=name),
    "a graph": lambda it, name: it["graphs"][1].update(name=name),
    "a graph's profile": lambda it, name: it["graphs"][1].update(profile=name),
    "an input": lambda it, name: it["graphs"][1]["inputs"][0].update(name=name),
    "an output": lambda it, name: it["graphs"][1]["outputs"][0].update(name=name),
    "a file": lambda it, name: it["graphs"][1].update(file=f"graphs/{name}.onnx"),
    "a folder": lambda it, name: it["processor"][0].update(file=f"processor/{name}/x"),
}


def test_the_rule() -> None:
    assert not [name for name in BAD if is_name(name)]
    assert all(map(is_name, ["a", "b1-336x336-t64-n128", "model-00001-of-00003.safetensors", "a.q_proj.weight"]))
    assert is_name("x" * 200) and not is_name("x" * 201)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["/../../x", "x$(touch owned)", ".hidden", "x\n"])
def test_a_manifest_with_another_name_is_refused(tiny_bundle: Any, tmp_path: Path, place: str, name: str) -> None:
    document = json.loads((tiny_bundle().root / "manifest.json").read_text())
    PLACES[place](document, name)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"manifest\.json is not a valid bundle manifest") as caught:
        Bundle.open(tmp_path)
    assert "letters, digits" in caught.value.got


def test_a_checkpoint_s_shards_follow_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    named = "model $(touch owned).safetensors"
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / named)
    index = {"weight_map": {"lm_head.weight": named}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a file of weights is called"):
        open_checkpoint(tmp_path / "model")
