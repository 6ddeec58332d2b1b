"""What is known before anything is built: prepared graphs, lint, estimates, and the plan of a build.

Needs no TensorRT. May use engines.tensorrt.records, versions and trtexec, engines.targets and graphs.
"""
