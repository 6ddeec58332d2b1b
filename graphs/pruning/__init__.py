"""The selection of image tokens as mathematics: scores and similarity in torch, the spatial set, kept
tokens, operations saved.

Pure functions of tensors and plans. May use graphs.records, names and dtypes.
"""
