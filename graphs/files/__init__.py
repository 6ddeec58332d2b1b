"""Files on disk: checkpoints, safetensors, bundles, pictures, resumable work, the cache folder, whole writes.

May use graphs.records, names, packing and dtypes.
"""
