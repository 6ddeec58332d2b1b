"""engines.json of engines/<target>/ ("btp-engines/1"): what was prepared and built, from which bundle, for what.

    engines.json   graphs/*.onnx   graphs/weights/*   <graph>[.<profile>].engine   inputs/<graph>/<input>.bin
    build.sh   profile.sh   README.md   plugins/

Paths are relative to that folder. Everything but the engines is there before TensorRT is touched.
"""

import json
from math import prod
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from graphs import dtypes
from graphs.dtypes import Precision
from graphs.files.atomic import sha256, write_text
from graphs.files.bundle import Bundle
from graphs.names import parse_graph
from graphs.records.errors import InputError
from graphs.records.manifest import FileRecord, RelativePath, Sha256, TensorRecord
from graphs.records.reading import UnreadableError, read_file
from graphs.records.record import Name, Record, parse_record

FORMAT: Final = "btp-engines/1"
FILE: Final = "engines.json"
SCRIPTED_FORMAT: Final = "btp-engine/1"
SCRIPTED_SUFFIX: Final = ".json"  # behind an engine's file name: what build.sh says of it
PLUGIN_LIBRARY: Final = "plugins/libbtp_trt_dynamic.so"  # where plugins/build.sh puts it
UNPRUNED: Final = "unpruned"  # folder inside engines/<target>/ with engines of the model without pruning

Assemble = Literal["segments", "whole"]
EngineWeights = Literal["baked", "shared"]
# The type in which products of float16 add up: as TensorRT likes, or float32 (prepare/accumulate.py).
Accumulate = Literal["native", "float32"]
Flavour = Literal["tensorrt", "rtx"]
# How the custom operators get into an engine: the C++ library, the Python plugins, or the graphs' portable bodies.
PluginForm = Literal["library", "python", "none"]
# How a weight input's bytes are made of its sources: one source as it is, several one after another along axis 0, or
# one whose bytes are read as little-endian words, with zero bytes up to a whole word at the end.
Packing = Literal["none", "rows", "words"]


def tensor_bytes(tensor: TensorRecord) -> int:
    """Bytes of a tensor."""
    return prod(tensor.shape) * dtypes.BY_NAME[tensor.dtype].nbytes


class WeightSource(Record):
    """Where a matrix lies: `nbytes` bytes at `offset` from the start of a safetensors file."""

    tensor: str  # its name in the graph, the checkpoint's canonical name
    file: RelativePath
    offset: int
    nbytes: int
    dtype: str  # as stored ("float16"); the loader converts where the input has another
    shape: tuple[int, ...]


class WeightInput(TensorRecord):
    """A matrix that is a network input: bound once, by every engine that has an input of this name."""

    sources: tuple[WeightSource, ...]
    packing: Packing = "none"

    @model_validator(mode="after")
    def _check(self) -> "WeightInput":
        if (len(self.sources) > 1) != (self.packing == "rows"):
            raise ValueError(f"{self.name}: {len(self.sources)} sources with packing {self.packing}")
        return self


Bytes = Annotated[int, Field(ge=0, le=2**62)]


def _graph_name(name: str) -> str:
    parse_graph(name)
    return name


class Estimate(Record):
    """Bytes expected before the build; how they are counted is in engines/tensorrt/prepare/estimate.py."""

    weight_bytes: Bytes  # matrices and constants that the graph reads, wherever they lie
    engine_bytes: Bytes  # the engine file
    activation_bytes: Bytes  # scratch memory of one run
    io_bytes: Bytes  # inputs and outputs without weights
    build_peak_bytes: Bytes  # memory of the building process


# Behind the name of a product: the casts of its operands, with a number each, and the cast of its result.
BEFORE, BEHIND = "/float32", "/float16"
SUMMED = "/sum"  # behind the name of a product that is written as a sum; what it is made of has more behind that
TERMS = f"{SUMMED}.terms"  # what it adds up


class Expected(Record):
    """What a prepared graph is to become in an engine (build/layer_checks.py).

    `weights`: each weight input with the nodes that read it; `widened`: products between casts to float32 and back;
    `attentions`: attention nodes in half precision; `sums`: products over a cache that are written as sums; `scratch`:
    bytes to compute in, as estimated.
    """

    weights: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    widened: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    scratch: int


class EngineLayer(Record):
    """One layer of a built engine; `plugin` is the custom operator's name where it is one."""

    name: str
    type: str
    plugin: str | None = None


class BuiltEngine(FileRecord):
    """An engine file and how it was built. `file` is relative to the folder of engines.json.

    One that build.sh made (`made_by`) was adopted: `seconds` and `options` are those of its own record.
    """

    tensorrt_version: str
    compute_capability: str
    graph_sha256: Sha256  # of the prepared graph it was built from
    plugin_sha256: Sha256 | None
    seconds: float
    peak_memory_bytes: int | None  # of the building process; None where the system does not say
    layers: tuple[EngineLayer, ...]
    made_by: Literal["build", "build.sh"] = "build"
    options: tuple[str, ...] = ()  # of trtexec, where build.sh called it
    findings: tuple[str, ...] = ()  # in what its layers differ from what the graph was prepared for


class ScriptedEngine(Record):
    """What build.sh writes beside an engine: the file, and what it was built from, with and how.

    `tensorrt` is "" where the tool does not say its version.
    """

    format: Literal["btp-engine/1"] = "btp-engine/1"
    engine: Name
    bundle_sha256: Sha256  # of the bundle's manifest.json when the graphs were prepared
    graph_sha256: Sha256
    plugin_sha256: Sha256 | None
    tensorrt: str
    options: tuple[str, ...]
    size: int
    sha256: Sha256
    seconds: int


class EngineGraph(Record):
    """One prepared graph; `engine` is None until it is built."""

    name: Annotated[Name, AfterValidator(_graph_name)]
    profile: Name
    onnx: FileRecord
    inputs: tuple[TensorRecord, ...]  # without the weights
    outputs: tuple[TensorRecord, ...]
    layers: tuple[int, int] | None = None
    weight_inputs: tuple[WeightInput, ...] = ()
    custom_nodes: int = Field(ge=0)  # plugin layers that the engine must have
    samples: dict[Name, FileRecord] = Field(default_factory=dict)  # input name -> raw little-endian tensor
    estimate: Estimate
    engine: BuiltEngine | None = None


class PluginRecord(Record):
    """The form of the custom operators, and the library's hash where a library was used."""

    form: PluginForm
    sha256: Sha256 | None = None


class EnginesRecord(Record):
    """The whole engines.json; graphs are listed in the order in which they run, profile by profile."""

    format: Literal["btp-engines/1"] = FORMAT
    target: Name
    flavour: Flavour
    tensorrt: str  # "10.3": the version the graphs were prepared for
    compute_capability: str  # "8.7"
    opset: int
    precision: Precision
    weights: EngineWeights
    assemble: Assemble
    accumulate: Accumulate = "native"
    plugins: PluginRecord
    bundle_sha256: Sha256  # of the bundle's manifest.json
    graphs: tuple[EngineGraph, ...]
    notes: tuple[str, ...] = ()  # what was chosen and why, in plain words

    def graph(self, name: str, profile: str) -> EngineGraph:
        """The graph of that name and profile. Raises InputError if it is not there."""
        for graph in self.graphs:
            if (graph.name, graph.profile) == (name, profile):
                return graph
        raise InputError(
            f"the engines for {self.target} have no graph {name} of profile {profile}",
            wanted="engines of this bundle",
            do=f"btp-export build BUNDLE --target {self.target} --force",
        )

    def to_json(self) -> str:
        """The contents of engines.json; the same record gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write engines.json in one step: a reader sees the old or the new one."""
        write_text(folder / FILE, self.to_json())

    @staticmethod
    def load(folder: Path) -> "EnginesRecord":
        """Read engines.json. Raises InputError if it is missing or not valid."""
        path = folder / FILE
        try:
            text = read_file(path, noun="engine record")
        except UnreadableError as error:
            raise InputError(
                f"no engines at {folder}: {FILE}: {error.reason}",
                wanted="engines/<target> of a bundle, as `btp-export build` writes it",
                do=f"btp-export build BUNDLE --target {folder.name}",
            ) from error
        return parse_record(EnginesRecord, text, source=path, noun="engine record")


def engines_folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of a target lie in a bundle."""
    return bundle.root / "engines" / target


def bundle_digest(bundle: Bundle) -> str:
    """sha256 of manifest.json, which vouches for every other file."""
    return sha256(bundle.root / "manifest.json")


def engine_file(name: str, profile: str, *, several: bool) -> str:
    """File name of a graph's engine; the profile is in it where a bundle has several."""
    return f"{name}.{profile}.engine" if several else f"{name}.engine"
