"""Run as a script under TensorRT for RTX: parses each ONNX file given and builds an engine for a GPU that is not there.

Prints one JSON object: file -> shapes of the engine's outputs, or the messages of the step that failed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings.tensorrt_rtx as trt


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


def build(model: Path) -> list[Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.read_bytes()):
        return ["not parsed", *log.errors]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, config) is None:
        return ["not built", *log.errors]
    return [list(network.get_output(i).shape) for i in range(network.num_outputs)]


if __name__ == "__main__":
    print(json.dumps({name: build(Path(name)) for name in sys.argv[1:]}))
