"""Verification, evaluation and benchmarks of a bundle, each with its typed result.

May use btp_export.running, planning, model and families.
"""
