"""What TensorRT says reaches a build's log without characters that a terminal would obey."""

import pytest

from engines.tensorrt.messages import Messages
from tests.engines.tensorrt.run import host_tensorrt


def test_errors_are_kept_and_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    trt = host_tensorrt
    messages = Messages(trt, echo=True)
    severity = trt.ILogger.Severity
    messages.logger.log(severity.ERROR, "node \x1b]0;title\x07 failed")
    messages.logger.log(severity.WARNING, "late")
    messages.logger.log(severity.VERBOSE, "Layers: []")
    assert messages.errors == ["node \x1b]0;title\x07 failed"] and messages.layers == "Layers: []"
    assert capsys.readouterr().err == "ERROR: node \\x1b]0;title\\x07 failed\nWARNING: late\n"
    Messages(trt, echo=False).logger.log(severity.ERROR, "quiet")
    assert capsys.readouterr().err == ""
