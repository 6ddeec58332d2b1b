"""transformers without compilation, with PyTorch's fused attention, which is what it takes if nothing is said."""

from benchmarks.peers import Given, Opened, Program
from benchmarks.peers.transformers_eager import Eager


def _open(given: Given) -> Opened:
    return Eager(given, "sdpa")


PROGRAM = Program("transformers, sdpa", "transformers", _open)
