"""engines/<target>/ for a device without Python: prepared graphs, plugin sources, scripts, sample inputs.

Needs no TensorRT. May use engines.tensorrt.prepare and engines.tensorrt.run.weights.
"""
