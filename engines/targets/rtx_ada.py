"""GeForce RTX 4090 (Ada), by TensorRT for RTX: engines are built on any machine, also without a GPU."""

from engines.targets import GB, GIB, TFLOPS, Target

TARGET = Target(
    name="rtx-ada",
    title="GeForce RTX 4090 (Ada)",
    compute_capability="8.9",
    flavour="rtx",
    tensorrt_versions=("1.7.1",),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=24 * GIB,
    bandwidth=1008 * GB,
    peak={"float32": 82.6 * TFLOPS, "float16": 165.2 * TFLOPS, "bfloat16": 165.2 * TFLOPS},
    sources=(
        "NVIDIA Ada architecture white paper, RTX 4090: 1,008 GB/s; 82.6 TFLOPS FP32; 165.2 FP16 and BF16, dense",
    ),
    # Two copies of a 7B in half precision need 27 GB. Not measured yet.
    engine_weights="shared",
)
