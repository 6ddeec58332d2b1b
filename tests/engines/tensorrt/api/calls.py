"""Every call this project makes to TensorRT's Python module, beside what it binds of the public headers.

The lists <version>.txt beside this file hold those declarations as each version has them, written by

    python -m tests.engines.tensorrt.api.calls FOLDER_OF_HEADERS...

The ONNX parser is not among the headers of all versions; its few calls (parse_from_file, num_errors, get_error) are not
listed.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
VERSIONS: Final = ("10.3", "10.16", "11.1")
HEADERS: Final = (
    "NvInfer.h",
    "NvInferRuntime.h",
    "NvInferRuntimeBase.h",
    "NvInferRuntimeCommon.h",
    "NvInferRuntimePlugin.h",
    "NvInferPluginBase.h",
)

# Python's name -> C++ class and member. A member of an enumeration is Class.kNAME.
CALLS: Final = {
    "Runtime.deserialize_cuda_engine": "IRuntime.deserializeCudaEngine",
    "ICudaEngine.num_io_tensors": "ICudaEngine.getNbIOTensors",
    "ICudaEngine.get_tensor_name": "ICudaEngine.getIOTensorName",
    "ICudaEngine.get_tensor_mode": "ICudaEngine.getTensorIOMode",
    "ICudaEngine.get_tensor_location": "ICudaEngine.getTensorLocation",
    "ICudaEngine.get_tensor_shape": "ICudaEngine.getTensorShape",
    "ICudaEngine.get_tensor_dtype": "ICudaEngine.getTensorDataType",
    "ICudaEngine.device_memory_size_v2": "ICudaEngine.getDeviceMemorySizeV2",
    "ICudaEngine.create_execution_context": "ICudaEngine.createExecutionContext",
    "ICudaEngine.create_engine_inspector": "ICudaEngine.createEngineInspector",
    "IExecutionContext.set_tensor_address": "IExecutionContext.setTensorAddress",
    "IExecutionContext.set_device_memory": "IExecutionContext.setDeviceMemoryV2",
    "IExecutionContext.execute_async_v3": "IExecutionContext.enqueueV3",
    "EngineInspector.get_engine_information": "IEngineInspector.getEngineInformation",
    "INetworkDefinition.num_inputs": "INetworkDefinition.getNbInputs",
    "INetworkDefinition.get_input": "INetworkDefinition.getInput",
    "INetworkDefinition.num_outputs": "INetworkDefinition.getNbOutputs",
    "INetworkDefinition.get_output": "INetworkDefinition.getOutput",
    "INetworkDefinition.num_layers": "INetworkDefinition.getNbLayers",
    "INetworkDefinition.get_layer": "INetworkDefinition.getLayer",
    "IBuilderConfig.set_flag": "IBuilderConfig.setFlag",
    "IBuilderConfig.clear_flag": "IBuilderConfig.clearFlag",
    "IProgressMonitor.phase_start": "IProgressMonitor.phaseStart",
    "IProgressMonitor.step_complete": "IProgressMonitor.stepComplete",
    "IProgressMonitor.phase_finish": "IProgressMonitor.phaseFinish",
    "ILogger.log": "ILogger.log",
    "IPluginRegistry.load_library": "IPluginRegistry.loadLibrary",
    "IPluginRegistry.register_creator": "IPluginRegistry.registerCreator",
    "IPluginRegistry.deregister_creator": "IPluginRegistry.deregisterCreator",
    "IPluginRegistry.all_creators": "IPluginRegistry.getAllCreators",
    "TensorIOMode.INPUT": "TensorIOMode.kINPUT",
    "TensorIOMode.OUTPUT": "TensorIOMode.kOUTPUT",
    "TensorLocation.DEVICE": "TensorLocation.kDEVICE",
    "ExecutionContextAllocationStrategy.USER_MANAGED": "ExecutionContextAllocationStrategy.kUSER_MANAGED",
    "LayerInformationFormat.JSON": "LayerInformationFormat.kJSON",
    "BuilderFlag.TF32": "BuilderFlag.kTF32",
    "LayerType.PLUGIN_V3": "LayerType.kPLUGIN_V3",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "NetworkDefinitionCreationFlag.kSTRONGLY_TYPED",
    **{f"DataType.{name}": f"DataType.k{name}" for name in ("FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "BOOL")},
    "DataType.UINT8": "DataType.kUINT8",
    "TensorFormat.LINEAR": "TensorFormat.kLINEAR",
    "PluginFieldType.INT32": "PluginFieldType.kINT32",
    "PluginFieldType.INT64": "PluginFieldType.kINT64",
    "PluginFieldType.CHAR": "PluginFieldType.kCHAR",
    "DimensionOperation.SUM": "DimensionOperation.kSUM",
    "DimensionOperation.SUB": "DimensionOperation.kSUB",
    **{
        f"ILogger.Severity.{name}": f"Severity.k{name}"
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    },
}
# Names of the module that are classes to derive from or to make, without a member of their own.
CLASSES: Final = frozenset(
    {
        "IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One",
        "PluginField", "PluginFieldCollection", "DimsExprs", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor",
    }
)  # fmt: skip
# Asked for with hasattr first: not every version has it.
ASKED_FOR: Final = frozenset({"NetworkDefinitionCreationFlag.STRONGLY_TYPED"})

_SCOPE = re.compile(r"^\s*(?:class|enum class)\s+(?:TRT_DEPRECATED_ENUM |TRT_DEPRECATED )?(\w+)\b[^;]*$")
_METHOD = re.compile(r"(TRT_DEPRECATED\s+)?(?:virtual\s+)?[\w:<>&*\s]*?[\s*&](\w+)\(([^()]*)\)[^;{]*[;{]")
_MEMBER = re.compile(r"^\s*(k\w+)\b\s*(TRT_DEPRECATED_ENUM\s*)?(?:=|,|$)")


def declarations(folder: Path) -> dict[str, list[str]]:
    """C++ class and member -> its declarations ("(void const* blob, std::size_t size)"), "deprecated" before one."""
    found: dict[str, list[str]] = {}
    for name in HEADERS:
        path = folder / name
        if path.is_file():
            for member, text in _members(_bare(path.read_text(encoding="utf-8", errors="replace"))):
                if text not in found.setdefault(member, []):
                    found[member].append(text)
    return found


def _bare(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _members(text: str) -> Iterator[tuple[str, str]]:
    """Members of every class and enumeration, found by the braces."""
    scopes: list[tuple[str, int, bool]] = []  # name, depth inside, whether an enumeration
    depth, held, waiting = 0, "", None
    for line in text.splitlines():
        scope = _SCOPE.match(line)
        if scope and not line.rstrip().endswith(";"):
            waiting = (scope[1], "enum" in line)
        inside = scopes[-1] if scopes else None
        if inside is not None and inside[1] == depth:
            held = f"{held} {line.strip()}".strip()
            if inside[2] and (member := _MEMBER.match(line)):
                yield f"{inside[0]}.{member[1]}", ("deprecated " if member[2] else "") + "value"
            method = _METHOD.search(held)
            if method and not inside[2]:
                arguments = " ".join(method[3].split())
                yield f"{inside[0]}.{method[2]}", f"{'deprecated ' if method[1] else ''}({arguments})"
            if line.rstrip().endswith((";", "{", "}", ":")) or "{" in line:
                held = ""
        for sign in line:
            if sign == "{":
                depth += 1
                if waiting:
                    scopes.append((waiting[0], depth, waiting[1]))
                    waiting = None
            elif sign == "}":
                if scopes and scopes[-1][1] == depth:
                    scopes.pop()
                    held = ""
                depth -= 1


def version_of(folder: Path) -> str:
    """ "10.3" of the headers in a folder."""
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8")
    numbers = [re.search(rf"#define (?:TRT_{part}_ENTERPRISE|NV_TENSORRT_{part}) (\d+)", text) for part in PARTS]
    return ".".join(number[1] for number in numbers if number is not None)


PARTS: Final = ("MAJOR", "MINOR")


def listed(folder: Path) -> str:
    """The list of one version: a line for each call, what Python calls and how C++ declares it; "-" if it does not."""
    known = declarations(folder)
    return "".join(f"{python}: {'; '.join(known.get(member, ['-']))}\n" for python, member in sorted(CALLS.items()))


def read(version: str) -> dict[str, str]:
    """The checked-in list of a version: Python's name -> declarations."""
    lines = (HERE / f"{version}.txt").read_text(encoding="utf-8").splitlines()
    return {name: text for name, _, text in (line.partition(": ") for line in lines)}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        (HERE / f"{version_of(Path(argument))}.txt").write_text(listed(Path(argument)), encoding="utf-8")
