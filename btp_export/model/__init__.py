"""From what a user calls a model, a picture or a prompt to what the graphs take, and default shapes.

May use btp_export.families, dummy and demo.
"""
