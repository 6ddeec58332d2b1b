"""Jetson AGX Orin 64 GB with JetPack 7.2 (TensorRT 10.16); from 7.2.2 on TensorRT 11.4.1 can be installed."""

from engines.targets import GB, GIB, TFLOPS, Target

TARGET = Target(
    name="jetson-orin-jp7",
    title="Jetson Orin, JetPack 7.2",
    compute_capability="8.7",
    flavour="tensorrt",
    tensorrt_versions=("10.16", "11.4"),
    machine="aarch64",
    unified_memory=True,
    memory_bytes=64 * GIB,
    bandwidth=int(204.8 * GB),
    peak={"float32": 5.3 * TFLOPS, "float16": 42.5 * TFLOPS, "bfloat16": 42.5 * TFLOPS},
    sources=(
        "NVIDIA Jetson AGX Orin Series technical brief: 204.8 GB/s; 5.3 TFLOPS FP32; 170 sparse INT8 TOPS of the GPU",
        "dense FP16 is a quarter of the sparse INT8 rate: 42.5 TFLOPS",
    ),
    # One copy of the weights for prefill and decode: on a board the system shares the memory. Not measured yet.
    engine_weights="shared",
)
