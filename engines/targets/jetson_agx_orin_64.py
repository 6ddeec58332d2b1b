"""Jetson AGX Orin 64 GB, JetPack 6.1, 6.2 (TensorRT 10.3) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import orin

# The first developer kit, p3701-0000, is the same module with 32 GB.
TARGET = orin(
    name="jetson-agx-orin-64",
    title="Jetson AGX Orin 64 GB",
    board=Board(
        modules=("p3701-0005", "p3701-0000"), multiprocessors=16, gpu_hz=1_300_500_000, memory_hz=3_199_000_000
    ),
    gibibytes=64,
    bandwidth=204.8,
    sources=(
        "NVIDIA Jetson AGX Orin Series technical brief: 2,048 CUDA cores, 1.3 GHz, 204.8 GB/s; 170 sparse INT8 "
        "TOPS of the GPU",
        "module number: NVIDIA Jetson Linux Developer Guide, Jetson modules and configurations",
    ),
)
