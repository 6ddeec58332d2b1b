"""What this machine has for building: TensorRT, the GPU, the plugins, memory. Asked for before any long work."""

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engines.native import libraries
from engines.targets import Target
from engines.tensorrt import installed as installed
from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.build_plan import BuildPlan, Wishes
from engines.tensorrt.records import PLUGIN_LIBRARY, PluginRecord, engines_folder
from graphs.files.atomic import sha256
from graphs.records.errors import UnavailableError

INSTEAD: Final = "Python plugins in place of the C++ library"  # a note begins with it


@dataclass(frozen=True)
class BuildMachine:
    """The TensorRT here that builds for a target; `library` None and the `reason` where this machine cannot.

    `wishes` are the user's, with the version of that TensorRT.
    """

    library: Library | None
    reason: str
    wishes: Wishes


def machine_for(target: Target, wishes: Wishes) -> BuildMachine:
    """What this machine builds for the target with.

    A machine that is not the target's is no error: it prepares the kit. Raises UnavailableError for a TensorRT that is
    broken or of another version than the user asked for, InputError for one that the target cannot have.
    """
    if not installed.is_installed(target.flavour):
        title = installed.TITLES[target.flavour]
        return BuildMachine(None, f"{title} is not installed here; {installed.INSTALL[target.flavour]}", wishes)
    if not installed.has_polygraphy():
        return BuildMachine(
            None,
            f"polygraphy, which builds the engines, is not installed here; {installed.INSTALL_BUILDER}",
            wishes,
        )
    if target.flavour == "tensorrt":
        capability = installed.gpu_capability()
        if capability != target.compute_capability or platform.machine() != target.machine:
            gpu = "no GPU" if capability is None else f"a GPU of compute capability {capability}"
            wanted = f"{target.title} is {target.machine} with {target.compute_capability}"
            return BuildMachine(None, f"this machine is {platform.machine()} with {gpu}, {wanted}", wishes)
    library = installed.load(target.flavour)
    if wishes.tensorrt is None:
        return BuildMachine(library, "", replace(wishes, tensorrt=target.version(library.short_version)))
    installed.require_version(library, wishes.tensorrt)
    return BuildMachine(library, "", wishes)


@dataclass(frozen=True)
class Plugins:
    """The form of the custom operators in this build. `note`: why it is not the one that was planned."""

    record: PluginRecord
    path: Path | None = None
    note: str = ""


def choose_plugins(plan: BuildPlan, wish: str) -> Plugins:
    """The C++ library where it is built and suits the target's GPU, else the Python plugins, else what was asked for.

    A library that was compiled in the engines' folder goes first.
    Raises UnavailableError if the library was asked for and is missing or for another GPU.
    """
    if plan.plugins != "library":
        return Plugins(PluginRecord(form=plan.plugins))
    name = "btp_trt_dynamic"
    major, minor = (int(part) for part in plan.target.compute_capability.split("."))
    own = engines_folder(plan.bundle, plan.target.name) / PLUGIN_LIBRARY  # compiled there by plugins/build.sh
    try:
        path = own if own.is_file() and libraries.VARIABLE not in os.environ else libraries.find(name)
        libraries.require_capability(libraries.inspect(name, path), (major, minor))
    except UnavailableError as error:
        if wish != "auto":
            raise
        return Plugins(PluginRecord(form="python"), note=f"{INSTEAD}: {error.got}")
    return Plugins(PluginRecord(form="library", sha256=sha256(path)), path)
