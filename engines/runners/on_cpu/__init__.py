"""Nodes that are faster on a CPU than those of the files, put in while a session is prepared; needs onnx.

Attention by ONNX Runtime's own node: `causal_attention` over whole sequences (prefill), `cached_attention` of a new
token over caches (decode). By btp_ort: `selection` from rows in place of their similarity, `linear` of four-bit weights
with rows in int8.
"""

import onnx

from engines.runners.on_cpu import cached_attention, causal_attention, linear, selection

__all__ = ["for_cpu", "may_have"]


def may_have(serialized: bytes, *, native: bool, int8: bool = False) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    attention = causal_attention.may_have(serialized) or cached_attention.may_have(serialized)
    return attention or (native and selection.may_have(serialized)) or (int8 and linear.may_have(serialized))


def for_cpu(model: onnx.ModelProto, *, native: bool, int8: bool = False) -> dict[str, str]:
    """Replace what can be; gives the new outputs that have to be bound to the memory of an input.

    native: whether the session has the operators of btp_ort. int8: whether it may round rows to int8, by BtpLinearInt8.
    """
    if int8:
        linear.for_cpu(model)
    causal_attention.for_cpu(model)
    if native:
        selection.for_cpu(model)
    return cached_attention.for_cpu(model)
