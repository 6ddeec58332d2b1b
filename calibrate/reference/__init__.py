"""The streamed reference: transformers' own layers, one in memory at a time, pruned as a plan says.

May use graphs alone.
"""
