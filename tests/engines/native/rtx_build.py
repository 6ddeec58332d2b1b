"""Run as a script under TensorRT for RTX: parses an ONNX file with the plugins, builds an engine for an absent GPU.

    rtx_build.py MODEL python|LIBRARY

Prints one JSON object: parsed, layers (name, type), output shapes, engine bytes, and what the log said.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(model: str, plugins: str) -> None:
    from engines.plugins import register_native, register_python, tensorrt_module

    trt: Any = tensorrt_module()
    log: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                log.append(f"{severity.name}: {message}")

    logger = Logger()
    keep = register_python(trt) if plugins == "python" else register_native(trt, Path(plugins))
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    result: dict[str, Any] = {"parsed": parser.parse_from_file(model), "log": log}
    if result["parsed"]:
        result["layers"] = [network.get_layer(i).type.name for i in range(network.num_layers)]
        result["outputs"] = [list(network.get_output(i).shape) for i in range(network.num_outputs)]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        engine = builder.build_serialized_network(network, config)
        result["engine_bytes"] = 0 if engine is None else engine.nbytes
    else:
        result["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    print(json.dumps(result))
    del keep


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
