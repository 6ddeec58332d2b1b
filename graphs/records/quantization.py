"""How the matrices of a decoder became codes of four bits: in config.json of a packed checkpoint, and in a manifest."""

from typing import Literal

from pydantic import Field

from graphs.records.record import Record


class Quantization(Record):
    """`quantization_config` of a packed checkpoint (graphs/files/packed_weights.py says how its tensors are stored).

    method: "awq" and "rtn" were made here, by activation-aware scales or rounding alone; "read" are somebody's codes.
    source: what the codes were made of, or the format that they were read from. Names no machine.
    groups: how many matrices have groups of each size.
    """

    quant_method: Literal["btp"] = "btp"
    version: Literal[1] = 1
    bits: Literal[4] = 4
    method: Literal["awq", "rtn", "read"]
    source: str
    groups: dict[int, int]
    zeros: int = Field(default=0, ge=0)  # of them with zero points of their own

    @property
    def group_text(self) -> str:
        """For people: 128, or 32 and 128."""
        return " and ".join(map(str, sorted(self.groups)))
