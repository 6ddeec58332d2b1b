"""Finds the TensorRT that is installed here and loads it; no environment variable has to be set by hand.

`tensorrt` (libnvinfer) is an ordinary Python package. TensorRT for RTX comes in two packages that do not know each
other: one holds the Python module, the other the libraries, under names with the full version. The module looks for
its libraries in its own folder (DT_RPATH $ORIGIN), and a search that a library starts inherits the paths of whoever
loaded it. So a private folder of links with the module and the libraries side by side, under the names that are looked
for, is enough, for the parser's own search for `libtensorrt_rtx.so` when it imports a plugin too:
docs/decisions/rtx-links.md.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from engines.jetson import OutsideTensorRT, how_to_see
from engines.tensorrt.records import Flavour
from graphs.files.folders import scratch
from graphs.records.errors import UnavailableError

TITLES: Final[dict[Flavour, str]] = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}
MODULES: Final[dict[Flavour, str]] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
INSTALL_BUILDER: Final = "pip install 'btp-export[device]'"
INSTALL: Final[dict[Flavour, str]] = {
    "tensorrt": "pip install 'btp-export[tensorrt]'; a Jetson has it from JetPack (python3-libnvinfer)",
    "rtx": "pip install 'btp-export[rtx]'",
}
BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"  # modules of the two packages
BINDINGS_PACKAGE, LIBRARIES_PACKAGE = "tensorrt_rtx_cu13_bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
# File in the package of libraries -> the names it is looked for by.
LINKS: Final = {
    "libtensorrt_rtx.so": ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so"),
    "libtensorrt_onnxparser_rtx.so": ("libtensorrt_onnxparser_rtx.so.1",),
}


@dataclass(frozen=True)
class Library:
    """A loaded TensorRT: its Python module and its version, "10.16.1.11"."""

    flavour: Flavour
    version: str
    module: Any

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{TITLES[self.flavour]} {self.version}"

    @property
    def short_version(self) -> str:
        """As targets name versions: "10.16" of TensorRT, "1.7.1" of TensorRT for RTX."""
        return ".".join(self.version.split(".")[: 3 if self.flavour == "rtx" else 2])

    def is_version(self, wanted: str) -> bool:
        """Whether it is of the version `wanted`, of which fewer numbers may be given ("10.3")."""
        numbers = wanted.split(".")
        return self.version.split(".")[: len(numbers)] == numbers


def load(flavour: Flavour) -> Library:
    """Import TensorRT or TensorRT for RTX.

    Raises UnavailableError with the reason and what to install if that is not possible here.
    """
    module = sys.modules.get(MODULES[flavour]) or (_load_rtx() if flavour == "rtx" else _import(flavour))
    return Library(flavour, str(getattr(module, "__version__", "unknown")), module)


def find() -> Library:
    """TensorRT if it can be loaded, else TensorRT for RTX. Raises UnavailableError with the reason of each."""
    reasons = []
    for flavour in MODULES:
        try:
            return load(flavour)
        except UnavailableError as error:
            reasons.append(error.got)
    raise UnavailableError("; ".join(reasons), "TensorRT or TensorRT for RTX", INSTALL["rtx"])


def is_installed(flavour: Flavour) -> bool:
    """Whether any of it can be found; it may still be broken. Imports nothing."""
    return flavour_version(flavour) is not None


def flavour_version(flavour: Flavour) -> str | None:
    """The version that is installed, None if none is, "unknown" if it does not say. Imports nothing."""
    packages = {MODULES[flavour]: MODULES[flavour]}
    if flavour == "rtx":  # once loaded, the bindings are there under the name of NVIDIA's own package too
        packages[BINDINGS] = BINDINGS_PACKAGE
    present = [package for module, package in packages.items() if _has(module)]
    versions = [version for package in present if (version := _version(package))]
    return versions[0] if versions else "unknown" if present else None


def survey(outside: OutsideTensorRT | None = None) -> list[dict[str, Any]]:
    """For `btp-export doctor`, one entry a flavour: library, version (None: not there), problem, and what to type.

    `outside`: a TensorRT that this environment does not see. Nothing is loaded: the two flavours cannot be loaded into
    one process.
    """
    entries = []
    for flavour, title in TITLES.items():
        entry: dict[str, Any] = {"library": title, "version": flavour_version(flavour), "problem": None, "do": None}
        if entry["version"] is None and flavour == "tensorrt" and outside is not None:
            problem = f"{outside.version} is in {outside.folder}, outside this environment"
            entry |= {"problem": problem, "do": how_to_see(outside)}
        elif entry["version"] is None:
            entry["do"] = INSTALL[flavour]
        elif flavour == "rtx" and not _has(MODULES["rtx"]):
            try:
                _rtx_files()
            except UnavailableError as error:
                entry |= {"problem": error.got, "do": error.do}
        if entry["version"] is not None and entry["problem"] is None and not has_polygraphy():
            entry |= {"problem": "polygraphy, which builds the engines, is missing", "do": INSTALL_BUILDER}
        entries.append(entry)
    return entries


def has_polygraphy() -> bool:
    """Whether the library that drives the builds is installed; JetPack does not include it."""
    return _has("polygraphy")


def require_version(library: Library, wanted: str) -> None:
    """Raise UnavailableError unless the library is of the version `wanted`, for which the graphs are prepared."""
    if not library.is_version(wanted):
        raise UnavailableError(
            f"{library.title} is installed here",
            f"{TITLES[library.flavour]} {wanted}, for which these graphs are prepared",
            f"--tensorrt {library.short_version}, or install {wanted}",
        )


# -- TensorRT for RTX ------------------------------------------------------------------------------------------------


def _load_rtx() -> ModuleType:
    if _has(MODULES["rtx"]):
        return _import("rtx")  # NVIDIA's own package, which finds its libraries itself
    files = _rtx_files()
    until_exit = contextlib.ExitStack()
    atexit.register(until_exit.close)
    folder = until_exit.enter_context(scratch(Path(tempfile.gettempdir()), "btp-rtx-"))
    for name, file in files.items():
        (folder / name).symlink_to(file)
    name = MODULES["rtx"]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where polygraphy looks for it
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name)
        raise _broken("rtx", error) from error
    return module


def _rtx_files() -> dict[str, Path]:
    """Name in the folder of links -> file. Raises UnavailableError if something is missing or does not fit."""
    bindings, libraries = _package_folder(BINDINGS), _package_folder(LIBRARIES)
    if bindings is None or libraries is None:
        missing = BINDINGS_PACKAGE if bindings is None else LIBRARIES_PACKAGE
        raise UnavailableError(
            f"TensorRT for RTX is not installed: {missing} is missing", "both of its packages", INSTALL["rtx"]
        )
    files = {"__init__.py": bindings / "__init__.py", "tensorrt_rtx.so": bindings / "tensorrt_rtx.so"}
    wanted = ".".join((_version(BINDINGS_PACKAGE) or "").split(".")[:3])
    for stem, names in LINKS.items():
        builders = sorted(libraries.glob(f"{stem}.*.*.*"))
        versions = [path.name.removeprefix(f"{stem}.") for path in builders]
        if wanted and wanted not in versions:
            raise UnavailableError(
                f"{LIBRARIES_PACKAGE} {_version(LIBRARIES_PACKAGE)} holds {stem} {', '.join(versions) or 'not at all'}",
                f"{stem} {wanted}, as {BINDINGS_PACKAGE} {_version(BINDINGS_PACKAGE)} needs it",
                INSTALL["rtx"],
            )
        files |= dict.fromkeys(names, builders[versions.index(wanted)] if wanted else builders[-1])
    return files


def _package_folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """No __pycache__ in the folder of links."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


# -- both ------------------------------------------------------------------------------------------------------------


def _import(flavour: Flavour) -> ModuleType:
    if not _has(MODULES[flavour]):
        raise UnavailableError(f"{TITLES[flavour]} is not installed", "its Python module", INSTALL[flavour])
    try:
        return importlib.import_module(MODULES[flavour])
    except Exception as error:  # whatever a half-installed package raises
        raise _broken(flavour, error) from error


def _broken(flavour: Flavour, error: Exception) -> UnavailableError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    version = (flavour_version(flavour) or "").replace("unknown", "")
    return UnavailableError(
        f"{' '.join([TITLES[flavour], *version.split()])} cannot be loaded: {reason}",
        "a TensorRT whose libraries are for this machine, this Python and its CUDA",
        INSTALL[flavour],
    )


def _has(module: str) -> bool:
    if module in sys.modules:
        return True
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name in the working directory has no origin


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- the GPU ---------------------------------------------------------------------------------------------------------

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


@functools.cache
def gpu_capability() -> str | None:
    """Compute capability of the first GPU ("8.7"), from the CUDA driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, values = ctypes.c_int(), []
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    read: Callable[..., int] = driver.cuDeviceGetAttribute
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if read(ctypes.byref(value), attribute, device) != 0:
            return None
        values.append(str(value.value))
    return ".".join(values)
