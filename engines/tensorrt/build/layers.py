"""The layers of a built engine: read from the engine where its GPU is here, else from the build's log."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from engines.tensorrt.build.engine_checks import custom_layer, require_tensors
from engines.tensorrt.build.job import Job, failure
from engines.tensorrt.installed import gpu_capability
from engines.tensorrt.messages import Messages
from engines.tensorrt.records import EngineLayer
from graphs import dtypes
from graphs.records.manifest import TensorRecord

_LOGGED_LAYER = re.compile(r"^Name: (.*?), LayerType: ([^,\n]*)", re.MULTILINE)


def read_layers(
    trt: Any, engine: Any, log: Messages, job: Job
) -> tuple[tuple[EngineLayer, ...], Literal["engine", "log"]]:
    """The layers of an engine that was just built: from the engine itself where its GPU is here, else from the log."""
    if gpu_capability() == job.compute_capability:
        return layers_of_engine(trt, engine, log, job), "engine"
    return _named(_LOGGED_LAYER.findall(log.layers.split("\nI/O Tensors:")[0]), job), "log"


def layers_of_engine(trt: Any, engine: Any, log: Messages, job: Job) -> tuple[EngineLayer, ...]:
    """The layers of a serialized engine, which is loaded; its inputs and outputs are checked too."""
    return _named(_deserialized(trt, engine, log, job), job)


def _named(pairs: Sequence[tuple[str, str]], job: Job) -> tuple[EngineLayer, ...]:
    return tuple(EngineLayer(name=name, type=kind, plugin=_plugin(name, kind, job)) for name, kind in pairs)


def _plugin(name: str, kind: str, job: Job) -> str | None:
    """The custom operator of a layer; other layers may bear the name of a node of ours with something behind it."""
    if kind.lower() == "custom_layer" or "plugin" in kind.lower():
        return custom_layer(name, job.custom_nodes)
    return None


def _deserialized(trt: Any, engine: Any, log: Messages, job: Job) -> list[tuple[str, str]]:
    """(name, type) of the layers of the engine as it will be loaded; its inputs and outputs are checked too."""
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
    return described_layers(text)


def described_layers(text: str) -> list[tuple[str, str]]:
    """(name, type) of the layers in the JSON of TensorRT's engine inspector; a layer may be its name alone."""
    entries: Sequence[Any] = json.loads(text)["Layers"]
    return [
        (entry, "unknown") if isinstance(entry, str) else (entry["Name"], entry.get("LayerType", "unknown"))
        for entry in entries
    ]
