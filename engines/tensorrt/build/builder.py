"""Builds one engine with polygraphy in this process: parse, check the network, build, write, read the layer list.

child.py runs this in a process of its own, because TensorRT may abort, and because its memory is measured.
"""

import mmap
import os
import re
import time
from pathlib import Path
from typing import Any, Final

from engines.tensorrt.build.engine_checks import custom_layer, require_plugins, require_tensors
from engines.tensorrt.build.job import Built, Job, Report, failure, sentence
from engines.tensorrt.build.layers import EngineLayers, layers_of_engine, read_layers
from engines.tensorrt.installed import INSTALL_BUILDER, Library, load
from engines.tensorrt.messages import Messages
from engines.tensorrt.records import Flavour
from graphs import dtypes
from graphs.records.errors import CheckError, InputError, UnavailableError
from graphs.records.manifest import TensorRecord
from graphs.tf32 import allows_tf32

UNOPENED: Final = re.compile(r"Failed to open file: (.*?)(?:\s\S+\.cpp:\d+:|$)")


def build_engine(job: Job, report: Report) -> Built:
    """Build `job.engine`.

    Raises InputError or CheckError for a graph that TensorRT refuses, naming the node, UnavailableError where the
    installed TensorRT, its CUDA, the plugins or the memory do not suffice, OSError where the file cannot be written.
    """
    start = time.monotonic()
    library = load(job.flavour)
    log = Messages(library.module, echo=True)
    held = _register_plugins(library, job)
    builder, network = _create(library, log, job.graph)
    _parse(library.module, network, log, job)
    _check_network(library.module, network, job)
    engine = _build(library, builder, network, log, job, report)
    del builder, network
    size = _write(job.engine, engine)
    found = read_layers(library.module, engine, log, job)
    del held
    _require_plugins(job, found)
    seconds = round(time.monotonic() - start, 3)
    return Built(
        tensorrt_version=library.version,
        seconds=seconds,
        size=size,
        peak_memory_bytes=peak_memory(),
        layers=found.layers,
        layers_from=found.source,
        findings=found.findings,
    )


def check_engine(job: Job) -> Built:
    """Load the engine that is there already, and check its inputs, outputs and plugins; `seconds` are those of this.

    Raises what build_engine raises, for an engine of another version, GPU or graph too.
    """
    start = time.monotonic()
    library = load(job.flavour)
    log = Messages(library.module, echo=True)
    held = _register_plugins(library, job)
    with job.engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = layers_of_engine(library.module, data, log, job)
        size = len(data)
    del held
    _require_plugins(job, found)
    return Built(
        tensorrt_version=library.version,
        seconds=round(time.monotonic() - start, 3),
        size=size,
        peak_memory_bytes=None,
        layers=found.layers,
        layers_from=found.source,
        findings=found.findings,
    )


def _require_plugins(job: Job, found: EngineLayers) -> None:
    if job.plugins != "none":
        require_plugins(job.graph, [layer.plugin for layer in found.layers if layer.plugin], job.custom_nodes)


def peak_memory() -> int | None:
    """Largest resident memory of this process in bytes; None where the system does not say.

    Not getrusage: its maximum survives exec, so a child reports its parent's memory where that was larger.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


# -- steps -----------------------------------------------------------------------------------------------------------


def _register_plugins(library: Library, job: Job) -> Any:
    """Plugins in TensorRT's registry; what is returned must be held until the engine is built."""
    if job.plugins == "none" or not job.custom_nodes:
        return None
    from engines.native.plugins import register_native, register_python

    if job.plugins == "python":
        return register_python(library.module)
    return register_native(library.module, job.plugin_library)


def import_polygraphy(flavour: Flavour) -> None:
    """Import polygraphy for a TensorRT: it asks once which of the two it is to drive, and loads neither yet.

    Raises UnavailableError where it is not installed.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavour == "rtx" else "0"
    try:
        import polygraphy.backend.trt  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            "polygraphy is not installed", "polygraphy, which builds the engines", INSTALL_BUILDER
        ) from error


def _create(library: Library, log: Messages, graph: str) -> tuple[Any, Any]:
    """An empty, strongly typed network and its builder."""
    import_polygraphy(library.flavour)
    from polygraphy.backend.trt import create_network
    from polygraphy.backend.trt import util as polygraphy_trt
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    polygraphy_trt.TRT_LOGGER = log.logger  # what its get_trt_logger() gives
    # A network of TensorRT 11 is strongly typed in any case, and the flag may go.
    typed = hasattr(library.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    try:
        builder, network = create_network(strongly_typed=typed)
    except (TypeError, PolygraphyException) as error:  # the first is pybind's for a builder that could not be made
        raise failure(log, graph, "gives no builder") from error
    return builder, network


def _parse(trt: Any, network: Any, log: Messages, job: Job) -> None:
    """Read the graph, its weights from the files beside it. Raises CheckError naming the first node refused."""
    parser = trt.OnnxParser(network, log.logger)
    if parser.parse_from_file(str(job.onnx)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    if not errors:
        raise failure(log, job.graph, "does not read the graph")
    if unopened := UNOPENED.search(" ".join(log.errors)):
        raise InputError(
            f"{job.graph}: {unopened[1]} cannot be opened",
            "the weights that the graph names",
            "export the bundle again",
        )
    first = errors[0]
    node = f"node {first.node_name()} ({first.node_operator()})" if first.node_operator() else "the graph"
    others = len({error.node_name() for error in errors}) - 1
    more = f" and {others} other nodes" if others > 1 else " and another node" if others else ""
    raise CheckError(
        f"{job.graph}: TensorRT refuses {node}{more}: {sentence(first.desc())}",
        f"operators that {trt.__version__} takes as they are",
        "btp-export build --dry-run names all; --opset 18 exports primitives only",
    )


def _check_network(trt: Any, network: Any, job: Job) -> None:
    """Inputs and outputs as recorded, and one plugin layer for each custom node, before minutes are spent."""
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    require_tensors(f"{job.graph}: inputs of the network", job.inputs, [_tensor(value) for value in inputs])
    require_tensors(f"{job.graph}: outputs of the network", job.outputs, [_tensor(value) for value in outputs])
    if job.plugins != "none":
        layers = [network.get_layer(number) for number in range(network.num_layers)]
        layer_names = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
        matched = [custom_layer(name, job.custom_nodes) for name in layer_names]
        require_plugins(job.graph, [operator for operator in matched if operator], job.custom_nodes)


def _tensor(value: Any) -> TensorRecord:
    return TensorRecord(name=value.name, dtype=dtypes.name_of_tensorrt(value.dtype.name), shape=tuple(value.shape))


def _build(library: Library, builder: Any, network: Any, log: Messages, job: Job, report: Report) -> Any:
    """The serialized engine, an object with the buffer protocol."""
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    trt = library.module
    if hasattr(trt.LayerType, "ATTENTION_INPUT"):
        from polygraphy.backend.trt import set_decomposable_attentions

        # Where no fused kernel takes a type or head size (float32, for one), the build would fail instead.
        set_decomposable_attentions((builder, network))
    cache = str(job.timing_cache) if job.timing_cache is not None and library.flavour == "tensorrt" else None
    config = configuration(library, job, cache, _monitor(trt, report))
    try:
        engine = engine_bytes_from_network((builder, network), config=config, save_timing_cache=cache)
    except (PolygraphyException, MemoryError) as error:
        raise failure(log, job.graph, "built no engine") from error
    return engine


def configuration(library: Library, job: Job, cache: str | None, monitor: Any) -> Any:
    """What polygraphy makes the builder's configuration of; `cache` is the timing cache's file, if there is one."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    if library.flavour == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        major, minor = job.compute_capability.split(".")
        config = CreateConfigRTX(compute_capabilities=[(int(major), int(minor))], progress_monitor=monitor)
    else:
        config = CreateConfig(progress_monitor=monitor, load_timing_cache=cache)

    def set_tf32(builder: Any, network: Any, config: Any) -> None:
        """Said either way: TensorRT begins with TF32 on, polygraphy turns it off except for RTX."""
        change = config.set_flag if allows_tf32(job.precision) else config.clear_flag
        change(library.module.BuilderFlag.TF32)

    return PostprocessConfig(config, set_tf32)


def _monitor(trt: Any, report: Report) -> Any:
    """TensorRT's nested phases as one number that rises from 0 to 1."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: list[list[Any]] = []  # [name, steps, done] of the phases inside one another
            self.said = 0.0

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.open.append([phase_name, max(num_steps, 1), 0])

        def step_complete(self, phase_name: str, step: int) -> bool:
            for phase in self.open:
                if phase[0] == phase_name:
                    phase[2] = step + 1
            share, width = 0.0, 1.0
            for _, steps, done in self.open:
                share, width = share + width * min(done / steps, 1.0), width / steps
            if share >= self.said + 0.01:
                self.said = min(share, 1.0)
                report(self.said)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.open = [phase for phase in self.open if phase[0] != phase_name]

    return Monitor()


def _write(path: Path, engine: Any) -> int:
    """Write the engine and wait until it is on disk; gives its size."""
    with path.open("wb") as stream:
        stream.write(memoryview(engine))
        stream.flush()
        os.fsync(stream.fileno())
    return path.stat().st_size
