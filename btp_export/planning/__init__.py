"""Choosing a plan, reading and writing plans, and the study behind `calibrate`.

May use btp_export.model and calibrate.
"""
