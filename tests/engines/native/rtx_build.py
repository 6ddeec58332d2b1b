"""Run as a script: TensorRT for RTX parses each ONNX file named and builds an engine for a GPU that need not be there.

    rtx_build.py none|python|LIBRARY MODEL...

The first argument says which plugins are registered. Prints one JSON object, file -> {parsed, layers: types, outputs:
shapes, engine_bytes, log: warnings and errors, said: all that was printed meanwhile}; a file that is not parsed has no
layers.
"""

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines.native.plugins import register_native, register_python
from engines.tensorrt import installed

trt: Any = installed.load("rtx").module


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
            self.lines.append(f"{severity.name}: {message}")


def register(plugins: str) -> Any:
    """What is returned must be kept while TensorRT runs."""
    if plugins == "none":
        return None
    return register_python(trt) if plugins == "python" else register_native(trt, Path(plugins))


def build(model: Path) -> dict[str, Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.read_bytes()):
        return {"parsed": False, "log": log.lines}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    return {
        "parsed": True,
        "layers": [network.get_layer(i).type.name for i in range(network.num_layers)],
        "outputs": [list(network.get_output(i).shape) for i in range(network.num_outputs)],
        "engine_bytes": 0 if engine is None else engine.nbytes,
        "log": log.lines,
    }


def build_listening(model: Path) -> dict[str, Any]:
    """The same with what was printed, by Python or by C++ code: plugins say there what is wrong."""
    kept = [os.dup(number) for number in (1, 2)]
    os.write(kept[1], f"{model}\n".encode())  # so that a crash shows where
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            result = build(model)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            ctypes.CDLL(None).fflush(None)
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
        file.seek(0)
        return result | {"said": file.read().decode(errors="replace") + "".join(result["log"])}


if __name__ == "__main__":
    keep = register(sys.argv[1])
    print(json.dumps({name: build_listening(Path(name)) for name in sys.argv[2:]}))
