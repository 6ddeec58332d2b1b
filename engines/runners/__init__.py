"""Runners: one file per backend, all with the same nouns; interface.py declares them.

A `Loader` opens one graph file and gives a `Runner`; it also gives `Buffer`s, memory on the device where its runners
compute. `Runner.run` is for single calls with numpy arrays. `Runner.bind` is for loops: it ties inputs and outputs to
buffers once, and every call of the `Bound` it returns reads and writes them in place, so nothing is copied.
"""
