"""H100 80 GB SXM."""

from engines.targets import GB, TFLOPS, Target

TARGET = Target(
    name="h100",
    title="H100 80 GB SXM",
    compute_capability="9.0",
    flavour="tensorrt",
    tensorrt_versions=("10.16", "11.1", "10.x", "11.x"),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=80 * GB,
    bandwidth=3350 * GB,
    peak={"float32": 67.0 * TFLOPS, "float16": 989.5 * TFLOPS, "bfloat16": 989.5 * TFLOPS},
    sources=(
        "NVIDIA H100 data sheet: 3.35 TB/s; 67 TFLOPS FP32; 1,979 TFLOPS FP16 and BF16 with sparsity, half of it dense",
    ),
)
