"""A program in trtexec's place, for the scripts of a kit: takes the options of its version, writes what trtexec does.

PLAN names a file: {"version": [10, 3], "options": [...], "times": {engine: milliseconds}, "fail": engine or "", "root":
folder, "engine": {...}}. An engine is named by its path in the folder of engines. `engine` is what is written of one
that is built (host_tensorrt.engine_bytes), but for its graph.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.engines.tensorrt import trtexec_files as files


def main() -> int:
    plan = json.loads(Path(os.environ["PLAN"]).read_text())
    version = tuple(plan["version"])
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{version[0] * 10000 + version[1] * 100}] # {' '.join(sys.argv)}")
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if unknown := sorted(options.keys() - set(plan["options"])):
        print(f"[E] Unknown option: {unknown[0]}")
        return 1
    if "--help" in options:
        return 0
    if "--saveEngine" in options:
        return build(options, plan["engine"])
    print("[I] Selected Device: Orin\n[I] Compute Capability: 8.7\n[I] SMs: 8")
    engine = Path(options["--loadEngine"])
    name = str(engine.resolve().relative_to(Path(plan["root"]).resolve()))
    if name == plan["fail"]:
        print("\n".join(f"[I] line {number}" for number in range(30)))
        print("[E] Error[1]: IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag)")
        print("&&&& FAILED TensorRT.trtexec")
        return 1
    for pair in filter(None, options.get("--loadInputs", "").split(",")):
        tensor, _, file = pair.rpartition(":")
        assert Path(file).is_file(), f"no input of {tensor}: {file}"
    prefix = options["--exportTimes"].removesuffix(".times.json")
    assert (options["--exportProfile"], options["--exportLayerInfo"]) == (
        f"{prefix}.profile.json",
        f"{prefix}.layers.json",
    )
    files.write_results(prefix, plan["times"][name])
    print("&&&& PASSED TensorRT.trtexec")
    return 0


def build(options: dict[str, str], engine: dict[str, Any]) -> int:
    """An engine that tests/engines/tensorrt/run/host_tensorrt.py runs."""
    head = {"graph": str(Path(options["--onnx"]).resolve()), **engine}
    Path(options["--saveEngine"]).write_bytes(b"host-engine\n" + json.dumps(head).encode())
    print("&&&& PASSED TensorRT.trtexec")
    return 0


if __name__ == "__main__":
    sys.exit(main())
