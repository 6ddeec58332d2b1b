"""Files on disk: checkpoints, safetensors, bundles, pictures, resumable work, the cache folder, writes that appear whole.

May use graphs.records, names and dtypes.
"""
