"""What TensorRT says while it builds or runs: one logger for both."""

import sys
from typing import Any

from graphs.records.printable import printable


class Messages:
    """TensorRT's messages. `errors` are those since the last `clear`; `layers` is the list of an engine's layers that a
    build logs. With `echo` errors and warnings are printed too, which a build's log is made of,
    without characters that a terminal would obey: names in them come from files.

    `logger` is what TensorRT is given; it must live as long as TensorRT uses it.
    """

    def __init__(self, trt: Any, *, echo: bool) -> None:
        self.errors: list[str] = []
        self.layers = ""
        owner, severities = self, trt.ILogger.Severity
        failures = {severities.INTERNAL_ERROR, severities.ERROR}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in failures:
                    owner.errors.append(message)
                elif message.startswith("Layers:"):
                    owner.layers = message
                if echo and (severity in failures or severity == severities.WARNING):
                    sys.stderr.write(f"{severity.name}: {printable(message)}\n")

        self.logger = Logger()

    def clear(self) -> None:
        """Forget the errors so far."""
        self.errors.clear()
