"""GeForce RTX 5090 (Blackwell), by TensorRT for RTX: engines are built on any machine, also without a GPU."""

from engines.targets import GB, GIB, TFLOPS, Target

TARGET = Target(
    name="rtx-blackwell",
    title="GeForce RTX 5090 (Blackwell)",
    compute_capability="12.0",
    flavour="rtx",
    tensorrt_versions=("1.7.1",),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=32 * GIB,
    bandwidth=1792 * GB,
    peak={"float32": 104.8 * TFLOPS, "float16": 209.5 * TFLOPS, "bfloat16": 209.5 * TFLOPS},
    sources=("NVIDIA RTX Blackwell white paper, RTX 5090: 1,792 GB/s; 104.8 TFLOPS FP32; 209.5 FP16 and BF16, dense",),
    # Two copies of a 7B in half precision need 27 GB. Not measured yet.
    engine_weights="shared",
)
