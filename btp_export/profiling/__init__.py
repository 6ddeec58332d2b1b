"""Latency of a target's engines beside the device's limits, from what trtexec measured.

May use btp_export.drawing, console and engines.
"""
