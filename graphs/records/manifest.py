"""manifest.json of a bundle (contract, "btp-bundle/1"): what is in it, with sizes and hashes. Relative paths only."""

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from graphs.dtypes import Precision
from graphs.records.quantization import Quantization
from graphs.records.record import NAME_RULE, Name, Record, is_name
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

FORMAT: Final = "btp-bundle/1"
DUMMY_WEIGHTS: Final = (
    "DUMMY WEIGHTS: the weights are random numbers; times and sizes are real, text and accuracy mean nothing"
)


def _relative(path: str) -> str:
    if not all(map(is_name, path.split("/"))):
        raise ValueError(f"{path!r} is not a path inside the bundle: every part is {NAME_RULE}")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(Record):
    """A file of the bundle, checked by size and hash."""

    file: RelativePath
    size: int
    sha256: Sha256


class TensorRecord(Record):
    """An input or output of a graph: name, ONNX element type ("float32", "int32", ...) and static shape."""

    name: Name
    dtype: str
    shape: tuple[int, ...]


class GraphRecord(FileRecord):
    """One ONNX graph. `name` is vision, prefill_<i>, select_<i>, head, decode or prefill; `layers` is [start, stop)."""

    name: Name
    profile: Name
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    layers: tuple[int, int] | None = None


class ModelRecord(Record):
    """Where the model came from, without machine paths. `config_sha256` is of config.json.

    `renames` are the family's (stored prefix, canonical prefix) pairs, see graphs/files/checkpoint.py: with them the
    bundle's shards can be read with no family at hand. Dummy weights are said in plain words.
    """

    name: str
    source: str  # "demo", "owner/name@revision" of the hub, or the name of a local folder
    config_sha256: Sha256
    renames: tuple[tuple[str, str], ...] = ()
    dummy_weights: bool = False


class BuildRecord(Record):
    """How the graphs were built."""

    opset: int
    precision: Precision
    assemble: Literal["segments", "whole"]


class Manifest(Record):
    """The whole manifest; graphs are listed in the order in which they run.

    `profile_plans` has the plan file of each profile, by name, whose image tokens are not the first one's.
    """

    format: Literal["btp-bundle/1"] = FORMAT
    model: ModelRecord
    spec: ModelSpec
    # Of weights in four bits: the record in processor/config.json once more, for who reads only this file.
    quantization: Quantization | None = Field(default=None, exclude_if=lambda made: made is None)
    plan: FileRecord  # of the first profile
    profile_plans: dict[str, FileRecord] = Field(default_factory=dict, exclude_if=lambda plans: not plans)
    build: BuildRecord
    profiles: tuple[ShapeProfile, ...]
    graphs: tuple[GraphRecord, ...]
    weights: tuple[FileRecord, ...]
    processor: tuple[FileRecord, ...]
    tools: dict[str, str]
    # Of this file with 64 zeros in its place, see graphs/files/bundle_checks.py; the last key. Older bundles have none.
    manifest_sha256: Sha256 | None = Field(default=None, exclude_if=lambda digest: digest is None)

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        unknown = self.profile_plans.keys() - {profile.name for profile in self.profiles}
        if unknown:
            raise ValueError(f"profile_plans names {sorted(unknown)[0]}, which is no profile")
        return self
