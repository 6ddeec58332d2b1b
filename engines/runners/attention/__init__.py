"""Attention on a CPU by ONNX Runtime's own node, put in while a session is prepared; needs onnx.

`causal` is for whole sequences (prefill), `cached` for a new token over caches (decode).
"""

import onnx

from engines.runners.attention import cached, causal

__all__ = ["cached", "causal", "for_cpu", "may_have"]


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return causal.may_have(serialized) or cached.may_have(serialized)


def for_cpu(model: onnx.ModelProto) -> dict[str, str]:
    """Replace attention of both kinds; gives the new outputs that have to be bound to the memory of an input."""
    causal.for_cpu(model)
    return cached.for_cpu(model)
