"""H200 141 GB SXM."""

from engines.targets import GB, TFLOPS, Target

TARGET = Target(
    name="h200",
    title="H200 141 GB SXM",
    compute_capability="9.0",
    flavour="tensorrt",
    tensorrt_versions=("10.16", "11.1", "10.x", "11.x"),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=141 * GB,
    bandwidth=4800 * GB,
    peak={"float32": 67.0 * TFLOPS, "float16": 989.5 * TFLOPS, "bfloat16": 989.5 * TFLOPS},
    sources=(
        "NVIDIA H200 data sheet: 4.8 TB/s; 67 TFLOPS FP32; 1,979 TFLOPS FP16 and BF16 with sparsity, half of it dense",
    ),
)
