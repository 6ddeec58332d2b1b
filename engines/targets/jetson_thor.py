"""Jetson AGX Thor (T5000, 128 GB) with JetPack 7.1 (TensorRT 10.13) or 7.2 (10.16; 11.4.1 from 7.2.2 on)."""

from engines.targets import GB, GIB, TFLOPS, Target

TARGET = Target(
    name="jetson-thor",
    title="Jetson Thor T5000",
    compute_capability="11.0",
    flavour="tensorrt",
    tensorrt_versions=("10.13", "10.16", "11.4"),
    machine="aarch64",
    unified_memory=True,
    memory_bytes=128 * GIB,
    bandwidth=273 * GB,
    peak={"float32": 8.06 * TFLOPS, "float16": 258.5 * TFLOPS, "bfloat16": 258.5 * TFLOPS},
    sources=(
        "NVIDIA Jetson Thor series data sheet: 273 GB/s; 2,560 CUDA cores; 2,070 sparse FP4 TFLOPS",
        "dense FP16 is an eighth of the sparse FP4 rate: 258.5 TFLOPS; FP32: 2 x 2,560 cores x 1.575 GHz",
    ),
    # One copy of the weights for prefill and decode: on a board the system shares the memory. Not measured yet.
    engine_weights="shared",
)
