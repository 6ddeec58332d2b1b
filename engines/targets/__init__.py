"""Targets: the devices engines are made for, one small file each. Adding a device is adding a file with `TARGET`."""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from graphs.dtypes import Precision
from graphs.records.errors import InputError

GB: Final = 10**9  # bandwidths and peaks are stated in powers of ten, memory sizes in powers of two
GIB: Final = 2**30
TFLOPS: Final = 10**12


@dataclass(frozen=True)
class Board:
    """How a board shows itself, and the clocks at which its target states peak and bandwidth.

    `modules`: NVIDIA's part numbers, which /proc/device-tree/compatible has; () where none is public.
    """

    modules: tuple[str, ...]
    multiprocessors: int
    gpu_hz: int
    memory_hz: int


@dataclass(frozen=True)
class Target:
    """A device. `peak` holds dense FLOP/s by the precision of the operands; float32 without TF32.

    `memory_bytes` is what the device has; on a board with `unified_memory` the system and every other process take
    theirs from it. `sources` names where the numbers come from. `measured` is False as long as the choices (assembly,
    engine weights, packing) are reasoned and no run on the device has confirmed them.
    """

    name: str
    title: str
    compute_capability: str  # "8.7"
    flavour: Literal["tensorrt", "rtx"]
    tensorrt_versions: tuple[str, ...]  # the first is the default
    machine: Literal["aarch64", "x86_64"]
    unified_memory: bool
    memory_bytes: int
    bandwidth: int  # bytes/s
    peak: Mapping[Precision, float]
    sources: tuple[str, ...]
    precision: Precision = "float16"
    assemble: Literal["segments", "whole"] = "segments"
    engine_weights: Literal["baked", "shared"] = "baked"
    pack_weights: bool = True  # with shared weights: q/k/v and gate/up as one product each
    unsupported: Mapping[str, str] = field(default_factory=dict)  # TensorRT version -> why it is refused
    measured: bool = False
    system_bytes: int = 6 * GIB  # of unified memory: the system's and the CUDA context's
    board: Board | None = None  # of a target that is one board and not a family or a card

    def version(self, asked: str | None = None) -> str:
        """The TensorRT version to prepare for: the default, or the one asked for. Raises InputError if it does not fit.

        "10.x" among the target's versions stands for every version of that major one.
        """
        if asked is None:
            return self.tensorrt_versions[0]
        major, _, rest = asked.partition(".")
        minor = f"{major}.{rest.split('.')[0]}"
        wanted = f"TensorRT {', '.join(self.tensorrt_versions)}"
        if asked in self.unsupported or minor in self.unsupported:
            reason = self.unsupported.get(asked) or self.unsupported[minor]
            raise InputError(
                f"{self.title}: TensorRT {asked} is not supported: {reason}", wanted=wanted, do="update the system"
            )
        if not all(part.isdigit() for part in asked.split(".")) or not rest:
            raise InputError(f"TensorRT version {asked!r}", wanted=wanted, do=f"--tensorrt {self.tensorrt_versions[0]}")
        known = any(asked == version or asked.startswith(f"{version}.") for version in self.tensorrt_versions)
        if not known and f"{major}.x" not in self.tensorrt_versions:
            raise InputError(
                f"TensorRT {asked} does not come with {self.title}",
                wanted=wanted,
                do=f"--tensorrt {self.tensorrt_versions[0]}, or another target",
            )
        return asked

    @property
    def sm(self) -> str:
        """Compute capability as nvcc writes it: "87"."""
        return self.compute_capability.replace(".", "")


def known_targets() -> list[str]:
    """Names of all targets, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def find_target(name: str) -> Target:
    """The target of that name; a memory size may end in "gb". Raises InputError that names the close ones."""
    names = known_targets()
    if re.search(r"-\d+gb$", name):
        name = name.removesuffix("gb")
    if name not in names:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3, cutoff=0.4)
        raise InputError(
            f"unknown target {name!r}", wanted=f"one of {', '.join(names)}", do=f"--target {(close or names)[0]}"
        )
    target: Target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    return target


def board_of(
    compute_capability: str, module: str, multiprocessors: int | None, memory_bytes: int | None
) -> Target | None:
    """The target that is the board with these marks; None where no mark tells.

    `module`: the words of /proc/device-tree/compatible. A part number decides; several boards of one capability with as
    many multiprocessors are told apart by their memory, of which the system shows less than there is.
    """
    boards = [target for target in map(find_target, known_targets()) if target.board is not None]
    alike = [target for target in boards if target.compute_capability == compute_capability]
    for target in alike:
        if target.board is not None and any(number in module for number in target.board.modules):
            return target
    alike = [one for one in alike if one.board is not None and one.board.multiprocessors == multiprocessors]
    if len(alike) > 1 and memory_bytes is not None:
        alike = [one for one in alike if memory_bytes <= one.memory_bytes < 2 * memory_bytes]
    return alike[0] if len(alike) == 1 else None
