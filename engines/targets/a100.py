"""A100 80 GB SXM."""

from engines.targets import GB, TFLOPS, Target

TARGET = Target(
    name="a100",
    title="A100 80 GB SXM",
    compute_capability="8.0",
    flavour="tensorrt",
    tensorrt_versions=("10.16", "11.1", "10.x", "11.x"),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=80 * GB,
    bandwidth=2039 * GB,
    peak={"float32": 19.5 * TFLOPS, "float16": 312 * TFLOPS, "bfloat16": 312 * TFLOPS},
    sources=("NVIDIA A100 data sheet: 2,039 GB/s; 19.5 TFLOPS FP32; 312 TFLOPS FP16 and BF16, dense",),
)
