"""A device that the toolkit does not have."""

from engines.targets import GB, TFLOPS, Target

TARGET = Target(
    name="desk-board",
    title="Board on a desk 16 GB",
    compute_capability="8.7",
    flavour="tensorrt",
    tensorrt_versions=("10.16",),
    machine="aarch64",
    unified_memory=True,
    memory_bytes=16 * GB,
    bandwidth=100 * GB,
    peak={"float32": 1 * TFLOPS, "float16": 4 * TFLOPS, "bfloat16": 4 * TFLOPS},
    sources=("made up",),
)
