"""Options of trtexec, version by version: facts read from samples/common/sampleOptions.cpp of the public TensorRT tags.

The text of 10.3 is the whole list; later entries say what came and what went. What still exists but does nothing from
11.0 on is in NO_OPS. tests/engines/tensorrt/trtexec has the whole lists of three versions.
"""

from typing import Final

FIRST: Final = """
allocationStrategy allowGPUFallback allowWeightStreaming avgRuns avgTiming best bf16 buildDLAStandalone
builderOptimizationLevel calib calibProfile consistency device directIO dumpLayerInfo dumpOptimizationProfile
dumpOutput dumpProfile dumpRawBindingsToFile dumpRefit duration dynamicPlugins errorOnTimingCacheMiss
excludeLeanRuntime exportLayerInfo exportOutput exportProfile exportTimes exposeDMA fp16 fp8 getPlanVersionOnly
hardwareCompatibilityLevel help idleTime ignoreParsedPluginLibs infStreams inputIOFormats int4 int8 iterations
layerDeviceTypes layerOutputTypes layerPrecisions leanDLLPath loadEngine loadInputs markDebug maxAuxStreams
maxShapes maxShapesCalib memPoolSize minShapes minShapesCalib noBuilderCache noCompilationCache noDataTransfers
noTF32 onnx optShapes optShapesCalib outputIOFormats percentile persistentCacheRatio pi pluginInstanceNorm plugins
precisionConstraints preview profile profilingVerbosity refit restricted runtimePlatform safe saveDebugTensors
saveEngine separateProfileRun serialized setPluginsToSerialize shapes skipInference sleepTime sparsity staticPlugins
std streams stripAllWeights stripWeights stronglyTyped tacticSources tempdir tempfileControls threads
timeDeserialize timeRefit timingCacheFile useCudaGraph useDLACore useManagedMemory useProfile useRuntime useSpinWait
vc verbose versionCompatible warmUp weightStreamingBudget weightless
"""

# version -> (new options, removed options)
CHANGES: Final = {
    "10.4": ("maxTactics", "consistency"),
    "10.6": ("monitorMemory", ""),
    "10.7": ("asyncFileReader", ""),
    "10.8": ("l2LimitForTiling tilingOptimizationLevel", ""),
    "10.11": ("uint8AsymmetricQuantizationDLA", ""),
    "10.12": ("distributiveIndependence markUnfusedTensorsAsDebugTensors saveAllDebugTensors", ""),
    "10.13": ("consistency dumpKernelText remoteAutoTuningConfig safetyPlugins", ""),
    "10.14": ("decomposableAttentions refitFromOnnx", ""),
    "10.15": ("cpuOnly enablePluginOverride", ""),
    "10.16": ("adjustForDLA reportCapabilityDLA", ""),
    "11.0": (
        "includeDataTransfers noCudaGraph noSpinWait",
        "best bf16 calib calibProfile fp16 fp8 int4 layerOutputTypes layerPrecisions maxShapesCalib "
        "minShapesCalib optShapesCalib precisionConstraints restricted weightless",
    ),
    "11.1": (
        "accuracyAlgorithm accuracyThreshold atol continue dryRun helpBuildRoute loadRefOutputs refPair rtol "
        "saveAllEngines setBuildRoute tuneBuildRouteFile tuneBuildRoutes tuningCacheFile tuningResultFile "
        "tuningSearch tuningTimeOut",
        "",
    ),
}

# From 11.0 on these are what trtexec does anyway, and only make it print a warning.
NO_OPS: Final = "noDataTransfers separateProfileRun stronglyTyped useCudaGraph useSpinWait"
NO_OPS_SINCE: Final = (11, 0)
DEPRECATED: Final = (
    "directIO plugins streams"  # since before 10.3; --staticPlugins and --infStreams replace the last two
)


def options(version: tuple[int, ...]) -> frozenset[str]:
    """Every option of trtexec of this version, with its dashes. A version between two known ones has the earlier's."""
    names = set(FIRST.split())
    for text, (added, removed) in CHANGES.items():
        if tuple(map(int, text.split("."))) <= version:
            names = (names | set(added.split())) - set(removed.split())
    return frozenset(f"--{name}" for name in names)


def useless_options(version: tuple[int, ...]) -> frozenset[str]:
    """Options that this version still takes, and that do nothing or are deprecated in it."""
    names = set(DEPRECATED.split()) | (set(NO_OPS.split()) if version >= NO_OPS_SINCE else set())
    return frozenset(f"--{name}" for name in names) & options(version)
