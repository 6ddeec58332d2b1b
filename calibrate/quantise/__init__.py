"""Four-bit weights from full ones: rounding, and activation-aware scales searched one decoder layer at a time.

May use calibrate.reference and graphs.
"""
