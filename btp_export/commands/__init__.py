"""The commands, one file each: `<name>.py` holds one function named `command`, its docstring is the command's help.

A module here is imported for every `btp-export --help`, so it imports only typer, btp_export.console,
graphs.records.errors and the like at the top; torch, onnxruntime and our heavy modules are imported inside the
function. `main.py` is what `btp-export --model NAME` does with no command.
"""
