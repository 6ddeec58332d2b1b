"""Files on disk: checkpoints, safetensors, bundles, resumable work, and writes that appear whole or not at all.

May use graphs.records.
"""
