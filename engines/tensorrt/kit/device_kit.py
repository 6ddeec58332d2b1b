"""engines/<target>/ as it is before any engine is built: what a device needs, also one without Python.

    engines.json         what was prepared, see records.py
    graphs/*.onnx        prepared graphs, with graphs/weights/* linked from the bundle
    inputs/<graph>/*     tensors that flowed through the graphs on a calibration picture, raw and little-endian
    plugins/             sources of the custom operators and build.sh, one command of nvcc
    build.sh, profile.sh, weights.sh, README.md
    unpruned/            the same of the model without pruning, if asked for

build/target_folder.py assembles the folder beside its place and renames it when whole. With TensorRT at hand the same
files are written first, and the engines beside them.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.tensorrt.kit import scripts
from engines.tensorrt.prepare.build_plan import BuildPlan
from engines.tensorrt.prepare.four_bits import SIGNED, signed_tensors, write_signed
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from engines.tensorrt.records import (
    FILE,
    UNPRUNED,
    EngineGraph,
    EnginesRecord,
    PluginRecord,
    WeightInput,
    bundle_digest,
    tensor_bytes,
)
from engines.tensorrt.run.weights import packed
from graphs.files.atomic import link_or_copy, move, record
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError, UnavailableError
from graphs.records.manifest import FileRecord
from graphs.records.progress import Note
from graphs.records.reading import read_text

ROOT = Path(__file__).parents[3]
NOUN = "folder of engines"
INPUTS = "inputs"

# Runs the graphs of a profile of the bundle, given by name, on a calibration picture and leaves each graph's inputs in
# <folder>/<graph>/<input>.bin. Raises UnavailableError where they cannot run on this machine.
Recorder = Callable[[Bundle, str, Mapping[str, Path], Path], None]


def is_engines(folder: Path) -> bool:
    """Whether the folder has an engines.json of ours, of whatever version."""
    try:
        return '"btp-engines/' in read_text(folder / FILE)[:200]
    except InputError:
        return False


def disk_bytes(plan: BuildPlan) -> int:
    """Bytes the folder takes: engines, inputs, and the weights where they must be copied or converted."""
    parts = [plan] if plan.unpruned is None else [plan, plan.unpruned]
    converted = [weight for weight in _inputs_of(plan.graphs).values() if not scripts.extractable(weight)]
    return sum(map(_own_bytes, parts)) + sum(map(tensor_bytes, converted))


def _own_bytes(plan: BuildPlan) -> int:
    files = {plan.bundle.root / source for source in _weight_files(plan.graphs)}
    copies = 0 if _can_link(plan.bundle, files) else sum(file.stat().st_size for file in files if file.is_file())
    return plan.totals.disk_bytes + sum(estimate.io_bytes for estimate in plan.estimates) + copies


def fill_kit(
    plan: BuildPlan, root: Path, *, recorder: Recorder | None, say: Note = lambda text: None, inside: str = ""
) -> EnginesRecord:
    """Fill the empty folder `root`; engines.json is written last. `inside`: the way to the folder that holds it."""
    _write_graphs(plan, root)
    _link_weights(plan.bundle, plan.graphs, root)
    if not inside:
        _write_converted(plan, root)
    notes = list(plan.notes)
    samples = _record_samples(plan, root, recorder, say, notes)
    form = plan.plugins
    engines = EnginesRecord(
        target=plan.target.name,
        flavour=plan.traits.flavour,
        tensorrt=plan.traits.version,
        compute_capability=plan.target.compute_capability,
        opset=plan.choices.opset,
        precision=plan.bundle.manifest.build.precision,
        weights=plan.choices.weights,
        assemble=plan.choices.assemble,
        accumulate=plan.choices.accumulate,
        plugins=PluginRecord(form=form),
        bundle_sha256=bundle_digest(plan.bundle),
        graphs=tuple(
            _graph_record(plan, root, graph, number, samples.get(plan.file_stem(graph), {}))
            for number, graph in enumerate(plan.graphs)
        ),
        notes=tuple(notes),
    )
    if scripts.needs_plugins(engines):
        _write_plugin_sources(plan, root)
    if plan.unpruned is not None:
        (root / UNPRUNED).mkdir()
        fill_kit(plan.unpruned, root / UNPRUNED, recorder=recorder, say=say, inside="../")
    _write_scripts(plan, engines, root, inside)
    engines.save(root)
    return engines


def _write_graphs(plan: BuildPlan, root: Path) -> None:
    (root / "graphs").mkdir()
    for graph in plan.graphs:
        (root / "graphs" / f"{plan.file_stem(graph)}.onnx").write_bytes(graph.serialize())


def _graph_record(
    plan: BuildPlan, root: Path, graph: PreparedGraph, number: int, samples: dict[str, FileRecord]
) -> EngineGraph:
    return EngineGraph(
        name=graph.name,
        profile=graph.profile,
        onnx=record(root, f"graphs/{plan.file_stem(graph)}.onnx"),
        inputs=graph.inputs,
        outputs=graph.outputs,
        layers=graph.layers,
        weight_inputs=graph.weight_inputs,
        custom_nodes=len(graph.custom_nodes),
        samples=samples,
        estimate=plan.estimates[number],
    )


# -- weights ---------------------------------------------------------------------------------------------------------


def _weight_files(graphs: Sequence[PreparedGraph]) -> list[str]:
    """Files that the graphs point into or take their weight inputs from, relative to the bundle and to the kit."""
    files = {source.file for graph in graphs for weight in graph.weight_inputs for source in weight.sources}
    for graph in graphs:
        files |= {f"graphs/{tensor.location}".removesuffix(SIGNED) for tensor in _external(graph)}
    return sorted(files)


def _external(graph: PreparedGraph) -> list[ir.ExternalTensor]:
    tensors = [value.const_value for value in graph.model.graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _inputs_of(graphs: Sequence[PreparedGraph]) -> dict[str, WeightInput]:
    """The weight inputs by name: a name is the same matrix in every graph and profile."""
    inputs: dict[str, WeightInput] = {}
    for weight in (weight for graph in graphs for weight in graph.weight_inputs):
        assert inputs.setdefault(weight.name, weight) == weight, f"two matrices are called {weight.name}"
    return inputs


def _can_link(bundle: Bundle, files: set[Path]) -> bool:
    """Whether the kit's place can have hard links to the bundle's weights: the same file system that allows them."""
    place = bundle.root / "engines"
    device = (place if place.is_dir() else bundle.root).stat().st_dev
    return all(file.stat().st_dev == device for file in files if file.is_file())


def _link_weights(bundle: Bundle, graphs: Sequence[PreparedGraph], root: Path) -> None:
    (root / "graphs" / "weights").mkdir(parents=True, exist_ok=True)
    for file in _weight_files(graphs):
        link_or_copy(bundle.root / file, root / file)
    signed = [tensor for graph in graphs for tensor in signed_tensors(graph.model)]
    write_signed(signed, bundle.root / "graphs", root / "graphs")


# -- inputs ----------------------------------------------------------------------------------------------------------


def _record_samples(
    plan: BuildPlan, root: Path, recorder: Recorder | None, say: Note, notes: list[str]
) -> dict[str, dict[str, FileRecord]]:
    """Inputs of every graph: file stem -> input -> file. Where they cannot be recorded a note says why."""
    if recorder is None:
        notes.append("no inputs were recorded: the profiler measures with random numbers")
        return {}
    try:
        for profile in plan.bundle.manifest.profiles:
            say(f"recording what flows through the graphs of {profile.name}")
            _record_profile(plan, root, profile.name, recorder)
    except UnavailableError as error:
        for graph in plan.graphs:
            shutil.rmtree(root / INPUTS / plan.file_stem(graph), ignore_errors=True)
        notes.append(f"no inputs were recorded, the profiler measures with random numbers: {error.got}")
        return {}
    return {plan.file_stem(graph): _sample_files(root, plan.file_stem(graph), graph) for graph in plan.graphs}


def _record_profile(plan: BuildPlan, root: Path, profile: str, recorder: Recorder) -> None:
    """Run the bundle's graphs, assembled as the engines are, with constants and portable bodies."""
    opset = plan.bundle.manifest.build.opset
    plain = Choices(opset=opset, assemble=plan.choices.assemble, weights="baked", plugins=False, keep_packed=True)
    graphs = prepare(plan.bundle, plain, profiles=[profile])
    folder = root / ".recording"
    (folder / "graphs").mkdir(parents=True)
    try:
        _link_weights(plan.bundle, graphs, folder)
        paths = {graph.name: folder / "graphs" / f"{graph.name}.onnx" for graph in graphs}
        for graph in graphs:
            paths[graph.name].write_bytes(graph.serialize())
        recorder(plan.bundle, profile, paths, folder / INPUTS)
        for graph in graphs:
            target = root / INPUTS / plan.file_stem(graph)
            target.parent.mkdir(exist_ok=True)
            move(folder / INPUTS / graph.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sample_files(root: Path, stem: str, graph: PreparedGraph) -> dict[str, FileRecord]:
    """The files of a graph's inputs, which must be as long as the tensors."""
    files = {}
    for tensor in graph.inputs:
        entry = record(root, f"{INPUTS}/{stem}/{tensor.name}.bin")
        assert entry.size == tensor_bytes(tensor), f"{entry.file} has {entry.size} bytes for {tensor}"
        files[tensor.name] = entry
    return files


def _write_converted(plan: BuildPlan, root: Path) -> None:
    """Weight inputs that are stored in another type: the device cannot cut them out of the weights."""
    for weight in _inputs_of(plan.graphs).values():
        if not scripts.extractable(weight):
            file = root / scripts.weight_file(weight)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.ascontiguousarray(packed(plan.bundle.root, weight)).tofile(file)


# -- plugins, scripts, README ----------------------------------------------------------------------------------------

_PLUGIN_BUILD = """\
#!/usr/bin/env bash
# Compiles the plugin library for sm_{sm}.  NVCC: the compiler.  TENSORRT_INCLUDE: folder of NvInferRuntime.h.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
NVCC=${{NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}}
TENSORRT_INCLUDE=${{TENSORRT_INCLUDE:-/usr/include/{machine}-linux-gnu}}
[ -x "$NVCC" ] || {{ echo "error: no nvcc: $NVCC; do this: NVCC=/path/to/nvcc $0" >&2; exit 3; }}
[ -f "$TENSORRT_INCLUDE/NvInferRuntime.h" ] ||
    {{ echo "error: no NvInferRuntime.h in $TENSORRT_INCLUDE; do this: TENSORRT_INCLUDE=/path $0" >&2; exit 3; }}
"$NVCC" -shared -O3 -std=c++17 -fmad=false -gencode arch=compute_{sm},code=sm_{sm} -DBTP_ARCHITECTURES='"{sm}"' \\
    -Xcompiler -fPIC,-fvisibility=hidden -Xlinker -Bsymbolic -isystem "$TENSORRT_INCLUDE" \\
    {sources} \\
    -o libbtp_trt_dynamic.so.partial
mv libbtp_trt_dynamic.so.partial libbtp_trt_dynamic.so
"""

_README = """\
Engines for {title} (sm_{sm}), TensorRT {version}; graphs prepared by `btp-export build`, weights {weights}, {assemble}.
1. Copy this folder to the device as it is (`rsync -aH`); no Python is needed there.
2. `./build.sh` makes the engines{plugins}; logs are in logs/. `btp-export build` there takes them over.
3. `./profile.sh` measures them into profile/; set power mode and clocks first (nvpmodel, jetson_clocks).
4. Copy profile/ back and look at it: `btp-export profile BUNDLE --target {target} --from DIR`. Not yet run on a device.
"""


def _write_plugin_sources(plan: BuildPlan, root: Path) -> None:
    """The sources in the folders they include each other by, and build.sh."""
    sources = plugin_sources()
    for source in sources:
        copy = root / "plugins" / source
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, copy)
    units = " ".join(str(source) for source in sources if source.suffix in (".cpp", ".cu"))
    text = _PLUGIN_BUILD.format(sm=plan.target.sm, machine=plan.target.machine, sources=units)
    _write_executable(root / "plugins" / "build.sh", text)


def plugin_sources() -> list[Path]:
    """Files of btp_trt_dynamic, relative to the project."""
    sources = [ROOT / "engines" / "native" / "trt_dynamic.cpp"]
    common = ROOT / "graphs" / "ops" / "common"
    sources += [common / name for name in ("status.cpp", "trt_common.cpp")]
    for folder in [common, *(path.parent for path in sorted((ROOT / "graphs" / "ops").glob("*/kernel.cu")))]:
        sources += [
            *folder.glob("*.h"),
            *folder.glob("*.cuh"),
            *folder.glob("kernel.cu"),
            *folder.glob("trt_plugin.cpp"),
        ]
    return sorted(path.relative_to(ROOT) for path in sources if not path.name.startswith("ort_"))


def _write_scripts(plan: BuildPlan, engines: EnginesRecord, root: Path, inside: str) -> None:
    target, traits = plan.target, plan.traits
    inner = plan.unpruned is not None
    _write_executable(root / "build.sh", scripts.build_script(engines, target, traits, inner=inner))
    _write_executable(root / "profile.sh", scripts.profile_script(engines, target, traits, inner=inner, inside=inside))
    if engines.weights == "shared":
        (root / "weights.sh").write_text(scripts.weights_script(engines, inside), encoding="utf-8")
    text = _README.format(
        title=target.title,
        sm=target.sm,
        version=engines.tensorrt,
        weights="shared (network inputs, one copy for all engines)" if engines.weights == "shared" else "baked",
        assemble=f"in {engines.assemble}" if engines.assemble == "segments" else engines.assemble,
        plugins=" (and the plugin library: plugins/build.sh, one command of nvcc)" * scripts.needs_plugins(engines),
        target=target.name,
    )
    (root / "README.md").write_text(text, encoding="utf-8")


def _write_executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | 0o111)
