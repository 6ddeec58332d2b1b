"""engines/<target>/ brought up to date: which engines stand, and each of the others built in a process of its own.

May use every other room of engines.tensorrt, engines.native and engines.targets.
"""
