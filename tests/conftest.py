"""Checkpoints and bundles that several test files use, made once a session.

Nothing large is imported here: the process that hands out the tests would load it before the others start.
"""

import functools
import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never go online
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of Ray Serve outlive a Ray that was shut down, and what they ask would start another, with a dozen processes.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def _no_fsync(handle: int) -> None:
    os.fstat(handle)  # what is not open stays an error


# No test pulls the plug: what this process writes need not be waited for until it is on the disk, thousands of times.
# (test_weights.py, which needs its file there, calls fdatasync.)
os.fsync = _no_fsync

# How long an example takes depends on what else the machine does; what hangs is ended by pytest-timeout.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

BundleMaker = Callable[..., Any]

# The files that take longest, so that no process of `pytest -n 2` is alone with one of them at the end.
LONG_FILES = (
    "tests/test_docs.py",
    "tests/btp_export/test_spreading.py",
    "tests/engines/tensorrt/build/test_build.py",
    "tests/engines/tensorrt/build/test_families.py",
    "tests/engines/native/test_builds.py",
    "tests/btp_export/serving/test_ray.py",
    "tests/engines/verify/test_streamed_graphs.py",
    "tests/engines/native/test_tensorrt.py",
    "tests/btp_export/demo/test_reading.py",
    "tests/engines/tensorrt/build/test_four_bits.py",
    "tests/benchmarks/test_gpu_check.py",
    "tests/btp_export/families/test_qwen_parity.py",
    "tests/btp_export/planning/test_study.py",
    "tests/btp_export/commands/test_options_arrive.py",
    "tests/btp_export/families/test_llava_next.py",
    "tests/graphs/building/test_decoder_graphs.py",
    "tests/graphs/ops/test_select_tokens.py",
    "tests/test_jetson_page.py",
    "tests/test_tf32.py",
    "tests/test_light.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the long files first; within a file their order stays."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


class Stays:
    """Libraries and tests stay to the end: Python need not look through their million objects for garbage."""

    file: Path | None = None  # of the test that runs
    modules = 0

    @classmethod
    def mark(cls) -> None:
        gc.freeze()
        cls.modules = len(sys.modules)

    @classmethod
    def begin(cls, file: Path) -> None:
        """Between two files, when the first one's fixtures are gone, what it loaded is marked too."""
        if file != cls.file and len(sys.modules) > cls.modules:
            gc.collect()
            cls.mark()
        cls.file = file


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        Stays.mark()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    Stays.begin(item.path)
    load_once()


def load_once() -> None:
    """What costs most and gives the same each time is done once or never, where it is loaded.

    An export takes the vision graph of a tower that was captured before (tests/captures.py). torch.onnx reads its 500
    translations once, not for every export, and torch.export lists the operators that are written in C++ once.
    transformers does not write every configuration that it reads as text, for a log that is off. Other processes do all
    of this each time, and test_homes_and_encodings.py compares the bundle of one with ours byte for byte.
    """
    exporting = sys.modules.get("btp_export.exporting")
    if exporting is not None:
        from tests.captures import Remembered

        if not isinstance(exporting.capture_vision, Remembered):
            exporting.capture_vision = Remembered(exporting.capture_vision)
    configuration = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
    if configuration is not None:
        configuration.__repr__ = object.__repr__
    registry = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    read = getattr(registry, "from_torchlib", None)
    if read is not None and not hasattr(read, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(read))  # type: ignore[union-attr]
    exports = sys.modules.get("torch._export.utils")
    ask = getattr(exports, "_materialize_cpp_cia_ops", None)
    if ask is not None and not hasattr(ask, "cache_info"):
        exports._materialize_cpp_cia_ops = functools.cache(ask)  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once a run: all processes of the run (`pytest -n 2`) have the same."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """`folder`, made by the first process that asks for it: `make` gets another name, and what it wrote is renamed."""
    from graphs.files.folders import lock_file

    with lock_file(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Path]:
    """Calibration statistics are cached: not the user's are read, and none are left behind. Captures are shared."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TESTS_SHARE_CAPTURES", str(shared_folder / "captures"))  # tests/captures.py
        yield folder


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The folder of the shipped demo model (V = 576)."""
    from btp_export.demo import checkpoint_path

    return checkpoint_path()


@pytest.fixture(scope="session")
def tiny_checkpoint(demo_checkpoint: Path, shared_folder: Path) -> Path:
    """A random LLaVA that runs in milliseconds: 6 layers, 4 query heads on 2 key heads, V = 36 in a 6 x 6 grid.

    It has the demo's tokenizer and chat template. Its weights are larger than a fresh model's, so that attention is
    sharp and the tokens it generates differ from prompt to prompt.
    """
    parent = shared_folder / "tiny"
    return made_once(parent, lambda folder: make_tiny(demo_checkpoint, folder / "model")) / "model"


def make_tiny(demo: Path, folder: Path, **text: Any) -> Path:
    """Write the tiny model into `folder`; `text` changes its text configuration."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    fields = json.loads((demo / "config.json").read_text())
    fields["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    } | text  # fmt: skip
    fields["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
    }  # fmt: skip
    fields |= {"image_seq_length": 36, "dtype": "float32"}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**fields)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and weight.ndim == 2:
                weight.normal_(std=0.6 if "embed" in name else 0.15)
    model.save_pretrained(folder)
    for file in demo.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"] |= {"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 24}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def first_example(shared_folder: Path) -> Path:
    """The folder in which README.md's first command was run: `my-bundle` is the demo with its calibrated plan."""

    def make(folder: Path) -> None:
        import btp_export.exporting  # noqa: F401
        from tests.examples import run_the_first

        load_once()  # its capture is shared, too
        run_the_first(folder)

    return made_once(shared_folder / "first-example", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, shared_folder: Path) -> BundleMaker:
    """`tiny_bundle(plan=None, **options)`: a bundle of the tiny model, options of btp_export.exporting.Options."""
    return bundle_maker(tiny_checkpoint, shared_folder / "tiny-bundles", {"text_tokens": 16, "new_tokens": 12})


@pytest.fixture(scope="session")
def demo_bundle(demo_checkpoint: Path, shared_folder: Path) -> BundleMaker:
    """`demo_bundle(plan=None, **options)`: a bundle of the demo model."""
    return bundle_maker(demo_checkpoint, shared_folder / "demo-bundles", {"text_tokens": 32, "new_tokens": 8})


def bundle_maker(checkpoint: Path, folder: Path, defaults: dict[str, Any]) -> BundleMaker:
    opened: dict[str, Any] = {}

    def make(plan: Any = None, **options: Any) -> Any:
        """Export once for each set of options (the vision graph takes seconds), then derive each plan from that."""
        from graphs.files.bundle import Bundle

        chosen = defaults | options
        key = repr(sorted(chosen.items())) + (plan.digest() if plan is not None else "")
        if key not in opened:
            name = hashlib.sha256(key.encode()).hexdigest()[:12]
            folder.mkdir(exist_ok=True)
            root = made_once(folder / name, lambda parent: write(plan, options, chosen, parent / "bundle"))
            opened[key] = Bundle.open(root / "bundle")
        return opened[key]

    def write(plan: Any, options: dict[str, Any], chosen: dict[str, Any], out: Path) -> None:
        from btp_export.exporting import Options, export_bundle
        from btp_export.model.open_model import open_model
        from graphs.building.derived_bundles import derive

        out.parent.mkdir()
        if plan is None or chosen.get("assemble") == "whole":
            model = open_model(str(checkpoint))
            export_bundle(model, plan or unpruned(model.spec), out, Options(**chosen))
        else:
            derive(make(None, **options), plan, out)

    return make


def unpruned(spec: Any) -> Any:
    """The plan without stages for a model."""
    from tests.plans import plan_of

    return plan_of(spec)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Four pictures of different sizes with random smooth colours."""
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (130, 70), (50, 90), (200, 200)]
    small = [rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in sizes]
    return [
        Image.fromarray(part).resize(size, Image.Resampling.BICUBIC) for part, size in zip(small, sizes, strict=True)
    ]
