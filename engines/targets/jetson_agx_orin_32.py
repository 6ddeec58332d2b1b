"""Jetson AGX Orin 32 GB, JetPack 6.1, 6.2 (TensorRT 10.3) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import orin

TARGET = orin(
    name="jetson-agx-orin-32",
    title="Jetson AGX Orin 32 GB",
    board=Board(modules=("p3701-0004",), multiprocessors=14, gpu_hz=930_750_000, memory_hz=3_199_000_000),
    gibibytes=32,
    bandwidth=204.8,
    sources=(
        "NVIDIA Jetson AGX Orin Series technical brief: 1,792 CUDA cores, 930 MHz, 204.8 GB/s",
        "module number: NVIDIA Jetson Linux Developer Guide, Jetson modules and configurations",
    ),
)
