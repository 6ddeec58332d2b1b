"""Running engines: their runner, the session that all engines of a bundle share, and weights that are engine inputs.

May use engines.tensorrt.installed and records, engines.runners and engines.native.
"""
