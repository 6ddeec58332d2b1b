"""What every command prints with --json: one pydantic document each, with a format name and a version.

The same types read such a document back. Gates, budgets and settings in them are those that were applied.
docs/schemas/ has their JSON schemas, which `python -m btp_export.results.schemas` writes.

Files here hold types and what makes one of them whole; nothing is measured. May use graphs.records and
engines.tensorrt.records, so that reading a result loads neither torch nor onnx.
"""
