"""Lowest layer: plans, specs, checkpoints, operators and graph building. Imports neither CUDA nor TensorRT."""
