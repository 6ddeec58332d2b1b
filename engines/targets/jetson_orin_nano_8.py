"""Jetson Orin Nano 8 GB, JetPack 6.1, 6.2 (TensorRT 10.3) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import orin

TARGET = orin(
    name="jetson-orin-nano-8",
    title="Jetson Orin Nano 8 GB",
    board=Board(modules=("p3767-0003", "p3767-0005"), multiprocessors=8, gpu_hz=1_020_000_000, memory_hz=3_199_000_000),
    gibibytes=8,
    bandwidth=102.4,
    sources=(
        "NVIDIA Jetson Orin Nano Super Developer Kit data sheet: 1,024 CUDA cores, 1,020 MHz, 102 GB/s; "
        "625 MHz and 68 GB/s in the modes before",
        "module number: NVIDIA Jetson Linux Developer Guide, Jetson modules and configurations",
    ),
)
