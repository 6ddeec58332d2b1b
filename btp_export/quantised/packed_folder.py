"""Writing a packed checkpoint (graphs/files/packed_weights.py) beside a source, a decoder layer at a time.

    layer-00000.safetensors ...   one file a decoder layer, each complete when it appears
    rest.safetensors              everything else as the source has it
    config.json                   the source's, with our quantization_config; index; the source's other files, linked

A folder lies in the cache by a hash of all that decides it, and is used again. Files of layers that an interrupted run
has finished are kept; after an error in the source nothing is.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from btp_export.quantised.formats import BESIDE, MODELOPT_FILE, without_settings
from graphs.files.atomic import check_space, link_or_copy, replacing, write_json
from graphs.files.cache_folder import cache_folder, only_one
from graphs.files.checkpoint import INDEX, Checkpoint, TensorRef, open_tensors, read_config
from graphs.files.folders import put_in_place
from graphs.files.packed_weights import QWEIGHT, ZEROS
from graphs.files.safetensors_file import write_stream
from graphs.records.errors import InputError
from graphs.records.quantization import Quantization

REST: Final = "rest.safetensors"
DECODER: Final = "language_model.layers."
# What of a source folder is not taken over: its weights, and what says how those were packed.
LEFT: Final = ("*.index.json", "config.json", MODELOPT_FILE, *BESIDE)


def packed_place(name: str, key: str) -> Path:
    """Where the packed folder of a model lies; `key` is a hash of all that decides its bytes."""
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in ".-_") else "-" for letter in name)
    return cache_folder("packed", f"{safe[:80] or 'model'}-{key[:16]}")


class PackedWriter:
    """The layers of a packed folder in the making."""

    def __init__(self, folder: Path, source: Checkpoint) -> None:
        self.folder, self._source = folder, source

    def layer_file(self, layer: int) -> Path:
        """Where a layer's tensors are."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether the layer was finished, by this run or one that was interrupted."""
        return self.layer_file(layer).is_file()

    def write(self, layer: int, tensors: Mapping[str, np.ndarray]) -> None:
        """All tensors of a decoder layer by canonical name; their file appears when it is complete."""
        names = self._stored_names(layer)
        with replacing(self.layer_file(layer)) as stream:
            write_stream(stream, {names(name): array for name, array in tensors.items()})

    def read(self, layer: int) -> dict[str, TensorRef]:
        """What was written of a layer, by canonical name within the layer ("self_attn.q_proj.qweight")."""
        start = self._stored_names(layer)(f"{DECODER}{layer}.")
        return {name.removeprefix(start): ref for name, ref in open_tensors(self.layer_file(layer)).items()}

    def finish(self, layers: int, method: Literal["awq", "rtn", "read"], origin: str) -> None:
        """Everything that is not of a decoder layer, the index, and config.json with the record."""
        rest = {ref.stored_name: ref for name, ref in self._source.tensors.items() if not name.startswith(DECODER)}
        with replacing(self.folder / REST) as stream:
            write_stream(stream, _Lazy(rest))
        files = {REST: open_tensors(self.folder / REST)}
        files |= {self.layer_file(layer).name: open_tensors(self.layer_file(layer)) for layer in range(layers)}
        index = {name: file for file, tensors in files.items() for name in tensors}
        write_json(self.folder / INDEX, {"metadata": {}, "weight_map": dict(sorted(index.items()))})
        shapes = {name: ref.shape for tensors in files.values() for name, ref in tensors.items()}
        groups = Counter(2 * shape[2] for name, shape in shapes.items() if name.endswith(f".{QWEIGHT}"))
        record = Quantization(
            method=method,
            source=origin,
            groups=dict(sorted(groups.items())),
            zeros=sum(name.endswith(f".{ZEROS}") for name in shapes),
        )
        config = without_settings(read_config(self._source.folder))
        config.pop("transformers_weights", None)
        config["quantization_config"] = record.model_dump(mode="json")
        write_json(self.folder / "config.json", config)

    def _stored_names(self, layer: int) -> Any:
        """From canonical names of a layer to the names that the source's writer would have given them."""
        start = f"{DECODER}{layer}."
        example = next((ref for name, ref in self._source.tensors.items() if name.startswith(start)), None)
        if example is None:
            self._source[f"{start}input_layernorm.weight"]  # raises
            raise AssertionError
        stored = example.stored_name.removesuffix(example.name.removeprefix(start))
        return lambda name: stored + name.removeprefix(start)


class _Lazy(Mapping[str, np.ndarray]):
    """Tensors of a file, mapped when one is asked for."""

    def __init__(self, refs: Mapping[str, TensorRef]) -> None:
        self._refs = refs

    def __getitem__(self, name: str) -> np.ndarray:
        return self._refs[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def is_whole(place: Path) -> bool:
    """Whether a packed folder was finished there."""
    return (place / "config.json").is_file()


@contextlib.contextmanager
def writing(place: Path, source: Checkpoint, *, needed: int) -> Iterator[PackedWriter | None]:
    """A writer for the folder `place`, which is put there when the block ends well; None if it is there already.

    `needed` is about how many bytes it will have. After an InputError nothing is left; after an interruption the layers
    that are finished are, and the next run goes on with them. Raises InputError if the disk is too full.
    """
    with only_one(place):
        if is_whole(place):
            yield None
            return
        folder = place.with_name(f".{place.name}.partial")
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
        check_space(place, max(0, needed - there), what="the packed checkpoint", do="set XDG_CACHE_HOME elsewhere")
        folder.unlink(missing_ok=True) if folder.is_symlink() else None  # its name can be guessed
        folder.mkdir(exist_ok=True)
        try:
            yield PackedWriter(folder, source)
            for path in companions(source.folder):
                if not (folder / path.name).exists():
                    link_or_copy(path, folder / path.name)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        put_in_place(folder, place)


def companions(folder: Path) -> Sequence[Path]:
    """The files of a checkpoint folder that go with its weights: tokenizer, processor, settings."""
    left = {path for pattern in LEFT for path in folder.glob(pattern)}
    kinds = ("*.json", "*.jinja", "*.txt", "*.model")
    return sorted(path for kind in kinds for path in folder.glob(kind) if path.is_file() and path not in left)


def layer_count(source: Checkpoint) -> int:
    """Decoder layers that a checkpoint has tensors of."""
    layers = {name.removeprefix(DECODER).partition(".")[0] for name in source.tensors if name.startswith(DECODER)}
    return len(layers)


def layer_tensors(source: Checkpoint, layer: int) -> dict[str, TensorRef]:
    """A layer's tensors by canonical name. Raises InputError if there are none."""
    start = f"{DECODER}{layer}."
    tensors = {name: ref for name, ref in source.tensors.items() if name.startswith(start)}
    if not tensors:
        source[f"{start}input_layernorm.weight"]  # raises
    return tensors
