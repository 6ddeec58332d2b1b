"""L4 24 GB."""

from engines.targets import GB, TFLOPS, Target

TARGET = Target(
    name="l4",
    title="L4 24 GB",
    compute_capability="8.9",
    flavour="tensorrt",
    tensorrt_versions=("10.16", "11.1", "10.x", "11.x"),
    machine="x86_64",
    unified_memory=False,
    memory_bytes=24 * GB,
    bandwidth=300 * GB,
    peak={"float32": 30.3 * TFLOPS, "float16": 121 * TFLOPS, "bfloat16": 121 * TFLOPS},
    sources=("NVIDIA L4 data sheet: 300 GB/s; 30.3 TFLOPS FP32; 242 TFLOPS FP16 and BF16 with sparsity, 121 dense",),
    # Two copies of a 7B in half precision do not fit into 24 GB.
    engine_weights="shared",
)
