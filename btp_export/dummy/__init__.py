"""Checkpoints of the known models' shapes with made-up weights.

May use btp_export.families, demo and console.
"""
