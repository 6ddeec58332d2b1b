"""The layers of a built engine: read from the engine where its GPU is here, else from the build's log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engines.tensorrt.build.engine_checks import custom_layer, require_tensors
from engines.tensorrt.build.job import Job, failure
from engines.tensorrt.build.layer_checks import LayerDetail, described_layers, findings, logged_layers
from engines.tensorrt.installed import gpu_capability
from engines.tensorrt.messages import Messages
from engines.tensorrt.records import EngineLayer
from graphs import dtypes
from graphs.records.manifest import TensorRecord
from graphs.records.reading import parse_json


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine, where they were read, and in what they differ from what was expected."""

    layers: tuple[EngineLayer, ...]
    source: Literal["engine", "log"]
    findings: tuple[str, ...]


def read_layers(trt: Any, engine: Any, log: Messages, job: Job) -> EngineLayers:
    """The layers of an engine that was just built: from the engine itself where its GPU is here, else from the log."""
    if gpu_capability() == job.compute_capability:
        return layers_of_engine(trt, engine, log, job)
    return _named(logged_layers(log.layers), "log", None, job)


def layers_of_engine(trt: Any, engine: Any, log: Messages, job: Job) -> EngineLayers:
    """The layers of a serialized engine, which is loaded; its inputs and outputs are checked too."""
    details, scratch = _deserialized(trt, engine, log, job)
    return _named(details, "engine", scratch, job)


def _named(
    details: Sequence[LayerDetail], source: Literal["engine", "log"], scratch: int | None, job: Job
) -> EngineLayers:
    layers = [EngineLayer(name=one.name, type=one.kind, plugin=_plugin(one.name, one.kind, job)) for one in details]
    found = () if job.expected is None else findings(details, job.expected, scratch)
    return EngineLayers(tuple(layers), source, found)


def _plugin(name: str, kind: str, job: Job) -> str | None:
    """The custom operator of a layer; other layers may bear the name of a node of ours with something behind it."""
    if kind.lower() == "custom_layer" or "plugin" in kind.lower():
        return custom_layer(name, job.custom_nodes)
    return None


def _deserialized(trt: Any, engine: Any, log: Messages, job: Job) -> tuple[list[LayerDetail], int]:
    """The layers of the engine as it will be loaded, and the bytes it computes in; inputs and outputs are checked."""
    loaded = trt.Runtime(log.logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise failure(log, job.graph, "does not load the engine" + " that it has just built" * (not job.there))
    tensors: dict[Any, list[TensorRecord]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for number in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(number)
        dtype = loaded.get_tensor_dtype(name).name
        shape = tuple(loaded.get_tensor_shape(name))
        record = TensorRecord(name=name, dtype=dtypes.name_of_tensorrt(dtype), shape=shape)
        tensors[loaded.get_tensor_mode(name)].append(record)
    require_tensors(f"{job.graph}: inputs of the engine", job.inputs, tensors[trt.TensorIOMode.INPUT])
    require_tensors(f"{job.graph}: outputs of the engine", job.outputs, tensors[trt.TensorIOMode.OUTPUT])
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return described_layers(parse_json(text)), int(loaded.device_memory_size_v2)
