"""Jetson Thor T5000, JetPack 7.1 (TensorRT 10.13) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import thor

TARGET = thor(
    name="jetson-thor-t5000",
    title="Jetson Thor T5000",
    board=Board(modules=("p3834-0008",), multiprocessors=20, gpu_hz=1_575_000_000, memory_hz=4_266_000_000),
    gibibytes=128,
    bandwidth=273.0,
    sources=("NVIDIA Jetson Thor series data sheet: 2,560 CUDA cores, 1.57 GHz, 273 GB/s; 2,070 sparse FP4 TFLOPS",),
)
