"""The selection of image tokens as mathematics: scores and similarity in torch, the spatial set, operations saved.

Pure functions of tensors and plans. May use graphs.records.
"""
