"""Files on disk: checkpoints, safetensors, bundles, resumable work, the cache folder, and writes that appear whole.

May use graphs.records, names and dtypes.
"""
