"""engines/<target>/ for a device without Python: prepared graphs, plugin sources, scripts, sample inputs.

Needs no TensorRT. May use engines.tensorrt.prepare, engines.tensorrt.run.weights and engines.runners.
"""
