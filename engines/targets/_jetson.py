"""What the Jetson boards have in common: limits follow from the multiprocessors and their clock.

A multiprocessor of Orin (GA10B) does 128 float32 and 1,024 float16 multiply-adds a clock, one of Thor 128 and 4,096:
170 sparse INT8 TOPS of an AGX Orin's GPU are four times 2 x 1,024 x 16 x 1.3 GHz, and 2,070 sparse FP4 TFLOPS of a
T5000 eight times 2 x 4,096 x 20 x 1.575 GHz.
"""

from collections.abc import Mapping
from typing import Final

from engines.targets import GB, GIB, Board, Target
from graphs.dtypes import Precision

FLOAT32: Final = 2 * 128  # operations of a multiprocessor in a clock
ORIN, THOR = 2 * 1024, 2 * 4096  # the same in float16 on the matrix units, dense
ORIN_VERSIONS: Final = ("10.3", "10.16", "11.4")  # JetPack 6.1 and 6.2; 7.2; from 7.2.2 on
THOR_VERSIONS: Final = ("10.13", "10.16", "11.4")  # JetPack 7.1; 7.2; from 7.2.2 on
JETPACK_6_0: Final = {"8.6": "JetPack 6.0 brings TensorRT 8.6, which has no IPluginV3; JetPack 6.1 has 10.3"}


def peak(board: Board, float16: int) -> Mapping[Precision, float]:
    """FLOP/s of the board at its clock; bfloat16 is as fast as float16."""
    clocks = board.multiprocessors * float(board.gpu_hz)
    return {"float32": FLOAT32 * clocks, "float16": float16 * clocks, "bfloat16": float16 * clocks}


def orin(name: str, title: str, board: Board, *, gibibytes: int, bandwidth: float, sources: tuple[str, ...]) -> Target:
    """A Jetson Orin; `bandwidth` in GB/s at the board's memory clock."""
    return Target(
        name=name,
        title=title,
        compute_capability="8.7",
        flavour="tensorrt",
        tensorrt_versions=ORIN_VERSIONS,
        unsupported=JETPACK_6_0,
        machine="aarch64",
        unified_memory=True,
        memory_bytes=gibibytes * GIB,
        bandwidth=int(bandwidth * GB),
        peak=peak(board, ORIN),
        sources=sources,
        # One copy of the weights for prefill and decode: the system shares the memory. Not measured yet.
        engine_weights="shared",
        system_bytes=(6 if gibibytes > 8 else 3) * GIB,  # the small boards run without a desktop
        board=board,
    )


def thor(name: str, title: str, board: Board, *, gibibytes: int, bandwidth: float, sources: tuple[str, ...]) -> Target:
    """A Jetson Thor; `bandwidth` in GB/s at the board's memory clock."""
    return Target(
        name=name,
        title=title,
        compute_capability="11.0",
        flavour="tensorrt",
        tensorrt_versions=THOR_VERSIONS,
        machine="aarch64",
        unified_memory=True,
        memory_bytes=gibibytes * GIB,
        bandwidth=int(bandwidth * GB),
        peak=peak(board, THOR),
        sources=sources,
        engine_weights="shared",
        board=board,
    )
