"""Jetson Orin NX 8 GB, JetPack 6.1, 6.2 (TensorRT 10.3) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import orin

TARGET = orin(
    name="jetson-orin-nx-8",
    title="Jetson Orin NX 8 GB",
    board=Board(modules=("p3767-0001",), multiprocessors=8, gpu_hz=765_000_000, memory_hz=3_199_000_000),
    gibibytes=8,
    bandwidth=102.4,
    sources=(
        "NVIDIA Jetson Orin NX Series data sheet: 1,024 CUDA cores, 765 MHz (1,173 MHz in the Super modes), 102.4 GB/s",
        "module number: NVIDIA Jetson Linux Developer Guide, Jetson modules and configurations",
    ),
)
