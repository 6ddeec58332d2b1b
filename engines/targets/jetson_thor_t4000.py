"""Jetson Thor T4000, JetPack 7.1 (TensorRT 10.13) or 7.2 (10.16)."""

from engines.targets import Board
from engines.targets._jetson import thor

TARGET = thor(
    name="jetson-thor-t4000",
    title="Jetson Thor T4000",
    board=Board(modules=(), multiprocessors=12, gpu_hz=1_530_000_000, memory_hz=4_266_000_000),
    gibibytes=64,
    bandwidth=273.0,
    sources=("NVIDIA Jetson Thor series data sheet: 1,536 CUDA cores, 1.53 GHz, 273 GB/s; 1,200 sparse FP4 TFLOPS",),
)
