"""Running a bundle: the runtime, the loop that generates tokens, and bundles larger than memory.

May use btp_export.model and engines.
"""
