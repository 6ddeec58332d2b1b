"""What choosing a plan reads is told before anything is replaced."""

import json
from pathlib import Path

import pytest

from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.choose_plan import files_read
from graphs.files.atomic import check_outside
from graphs.records.errors import InputError


def test_pictures_that_a_jsonl_file_names_are_not_replaced(tmp_path: Path) -> None:
    bundle, data = tmp_path / "bundle", tmp_path / "data.jsonl"
    bundle.mkdir()
    (bundle / "cat.png").write_bytes(b"")
    data.write_text("".join(json.dumps({"image": name, "prompt": "?"}) + "\n" for name in ("no.png", "bundle/cat.png")))
    reads = files_read("btp", CalibrationSettings(images=str(data)))
    assert reads == [data, bundle / "cat.png"]
    with pytest.raises(InputError, match=r"cat\.png lies in .*bundle, which would be replaced"):
        check_outside(bundle, reads)
    assert files_read("btp", CalibrationSettings(images=str(bundle))) == [bundle]
