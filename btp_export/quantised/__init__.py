"""Checkpoints in four bits: the formats that others write, and the packed folders that everything here is kept in.

May use families, graphs, and what identifies a checkpoint in calibrate.
"""
