"""From a spec, a plan and shapes to ONNX graphs: builder, layers, decoder, selection, vision capture, derived bundles.

May use every other room of graphs. What it makes is described in graphs/interfaces.md.
"""
