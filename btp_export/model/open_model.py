"""From what the user calls a model to an opened checkpoint: the demo, known names, local folders, hub ids.

Every part of a checkpoint is looked for before anything long begins: configuration, tokenizer, processor, chat
template, and every shard with a header that fits its length.
"""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from btp_export.extras import require_docstrings
from btp_export.families import Family, family_for, known_models
from btp_export.families._checkpoint import count_prefix_tokens
from btp_export.families._decoder import biased_projections, text_config
from btp_export.quantised.formats import OTHERS, find_beside, find_format, refuse_gguf, without_settings
from graphs.files.checkpoint import Checkpoint, missing_shards, open_checkpoint, read_config
from graphs.files.paths import expanded, require_utf8
from graphs.records.errors import InputError, UnavailableError
from graphs.records.progress import Report
from graphs.records.quantization import Quantization
from graphs.records.reading import read_object, read_text
from graphs.records.refusing import refusing
from graphs.records.spec import ModelSpec
from graphs.records.stored_weights import Weights

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_ADDRESS = re.compile(rf"https?://huggingface\.co/({HUB_ID.pattern})")
COMMIT = re.compile(r"[0-9a-f]{40}")

# What is fetched of a repository: no pickles, no code.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]

# What there must be beside configuration and weights: any one of each.
NEEDED = {
    "a tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    "a processor": ("preprocessor_config.json", "processor_config.json"),
    "a chat template": ("chat_template.jinja", "chat_template.json"),
}
TEMPLATE_HOLDERS = ("processor_config.json", "tokenizer_config.json")  # where a chat template may stand too

# What a bundle keeps of a checkpoint folder beside the weights.
PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "btp.json",
    "btp-dummy.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Source:
    """Where a model's files are: what the user called it, where it came from (no machine path), and its folder."""

    name: str
    origin: str
    folder: Path
    is_demo: bool = False  # a local folder may be called demo too
    is_dummy: bool = False  # its weights are made up


@dataclass(frozen=True)
class Model:
    """An opened checkpoint with its family; no weight is loaded."""

    source: Source
    family: Family
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def processor_files(self) -> list[Path]:
        """The files of the checkpoint folder that a bundle keeps beside the weights."""
        return [path for name in PROCESSOR_FILES if (path := self.source.folder / name).is_file()]


@dataclass(frozen=True)
class DummyWeights:
    """What `--dummy-weights` asks for: the seed, and fewer decoder layers than the model has (None: all).

    `group`: random codes of four bits in groups of so many, None for weights of the model's type.
    """

    seed: int = 0
    layers: int | None = None
    group: int | None = None


def open_model(
    name: str,
    dummy: DummyWeights | None = None,
    *,
    system: str | None = None,
    weights: Weights = "model",
    report: Report | None = None,
) -> Model:
    """Find a model and read its configuration and headers; with `dummy`, one of its shapes with made-up weights.

    One in another program's four-bit format is repacked into the cache folder first, see btp_export/quantised.
    `system` is a message that every prompt is to begin with: its tokens are part of the prefix. `weights` is what the
    decoder's matrices are to be made into: where they are in such a format, that is refused before they are repacked.

    Raises InputError for an unknown name, a model without a family, or a checkpoint that is broken or lacks a part;
    UnavailableError if it must be fetched and cannot.
    """
    require_docstrings()
    source = find_model(name) if dummy is None else _dummy_source(name, dummy, report)
    _refuse_adapter(source.folder, source.name)
    # A family walks over nested settings that anybody may have written, and hands them to transformers' classes.
    with refusing(
        f"the files of {source.folder} describe no usable model", wanted="the model's own files", do="restore them"
    ):
        model = _opened(source, weights, report)
    if system is None:
        return model
    prefix = count_prefix_tokens(model.source.folder, model.spec.image_token_id, system=system)
    return replace(model, spec=model.spec.model_copy(update={"system": system, "prefix_tokens": prefix}))


def refuse_quantised(name: str, quantization: Quantization, weights: Weights) -> NoReturn:
    """Raise the error of `--weights int4` for a model that is in four bits."""
    raise InputError(
        f"--weights {weights}, but {name} has four-bit weights already ({quantization.method}, {quantization.source})",
        wanted="a model in 16 or 32 bits",
        do="leave --weights out, or take the model that it was made of",
    )


def _opened(source: Source, weights: Weights, report: Report | None) -> Model:
    refuse_gguf(source.folder)
    config = read_config(source.folder)
    quantised = find_format(source.folder, config)
    family = family_for(config)
    _check_parts(source)
    checkpoint = open_checkpoint(source.folder, family.renames)
    if quantised is None and checkpoint.quantization is None:
        quantised = find_beside(checkpoint)
    if quantised is not None:
        from btp_export.quantised.reading import open_foreign, read_packed  # loads torch: most names need none of it

        biased = biased_projections(text_config(without_settings(config)))
        foreign = open_foreign(checkpoint, *quantised, biased=biased)
        planned = foreign.planned()
        spec = _spec(family, planned, source.name)  # all that can be wrong, before anything is written
        if weights != "model" and planned.quantization is not None:
            refuse_quantised(source.name, planned.quantization, weights)
        folder = read_packed(foreign, source.name, spec.decoder.head_dim, report)
        source, checkpoint = replace(source, folder=folder), open_checkpoint(folder, family.renames)
    spec = _spec(family, checkpoint, source.name)
    return Model(source, family, checkpoint, spec)


def _spec(family: Family, checkpoint: Checkpoint, name: str) -> ModelSpec:
    """The model as data; an error names both sets of weights where the folder has two."""
    try:
        spec = family.spec(checkpoint, name)
        _check_vision(family, checkpoint)
        return spec
    except InputError as error:
        if not checkpoint.not_read:
            raise
        read = ", ".join(checkpoint.shards)
        raise InputError(
            f"{error.got} ({read} is what transformers loads; {checkpoint.not_read} beside it names other weights)",
            wanted=error.wanted,
            do=f"remove {read}, or {checkpoint.not_read} and its shards, whichever is not this model's",
        ) from error


def _check_vision(family: Family, checkpoint: Checkpoint) -> None:
    """Raise InputError unless all weights of tower and projector are there, in the shapes that config.json says."""
    family.vision_module(replace(checkpoint, shapes_alone=True))


def find_model(name: str) -> Source:
    """Resolve `demo`, a known name, a local folder or a hub id, fetching from the hub what is not there yet."""
    if name == DEMO:
        from btp_export.demo import checkpoint_path

        return Source(DEMO, DEMO, checkpoint_path(), is_demo=True)
    folder, known = expanded(name), known_models()
    if name in known:
        return _from_hub(name, known[name].repository)
    if name and folder.is_dir():
        return _local(folder.resolve())
    if HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        return _from_hub(name, name)
    if folder.suffix == ".gguf":
        raise InputError(f"{name} is a GGUF file", wanted="a folder with safetensors", do=OTHERS["gguf"])
    if folder.is_file():
        raise InputError(f"{name} is a file", wanted="a checkpoint folder", do="give the folder that holds config.json")
    raise _unknown(name)


def _local(folder: Path) -> Source:
    from btp_export.dummy.checkpoints import read_marker

    require_utf8(folder)
    marker = read_marker(folder)
    if marker is not None:
        return Source(marker.model, marker.origin, folder, is_dummy=True)
    return Source(folder.name, folder.name, folder)


def _dummy_source(name: str, dummy: DummyWeights, report: Report | None) -> Source:
    from btp_export.dummy.checkpoints import dummy_checkpoint

    return _local(dummy_checkpoint(name, seed=dummy.seed, layers=dummy.layers, group=dummy.group, report=report))


def _refuse_adapter(folder: Path, name: str) -> None:
    """transformers loads the base model that an adapter names and puts the adapter on it; an export has one model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = read_object(path).get("base_model_name_or_path")
    except InputError:
        base = None
    raise InputError(
        f"{name} is an adapter" + (f" of {base}" if base else "") + ", not a whole model",
        wanted="a checkpoint with the adapter merged into its base",
        do="merge it first, with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(FOLDER), and save the base's processor there too",
    )


def missing_parts(folder: Path) -> list[str]:
    """What a checkpoint folder lacks, in words."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    for part, files in NEEDED.items():
        there = any((folder / file).is_file() for file in files)
        if not there and not (part == "a chat template" and _template_inside(folder)):
            missing.append(f"{part} ({' or '.join(files)})")
    return missing + missing_shards(folder)


def _template_inside(folder: Path) -> bool:
    for name in TEMPLATE_HOLDERS:
        try:
            document = read_object(folder / name)
        except InputError:
            continue
        if document.get("chat_template"):
            return True
    return False


def _check_parts(source: Source) -> None:
    if (source.folder / "btp.json").is_file():  # its settings can stand for a template; what is missing shows later
        return
    missing = missing_parts(source.folder)
    if missing:
        raise InputError(
            f"{source.folder} lacks {_some(missing)}",
            wanted="config.json, tokenizer, processor and chat template files, and every safetensors shard",
            do="put the missing files into the folder, or download the checkpoint again",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _unknown(name: str) -> InputError:
    if "://" in name:
        match = HUB_ADDRESS.match(name)
        return InputError(
            f"{name} is an address",
            wanted="the name of a model, a checkpoint folder, or a hub id (owner/name)",
            do=f"--model {match[1]}" if match else "download it and give --model FOLDER",
        )
    known = [DEMO, *known_models()]
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    return InputError(
        f"no model is called {name!r}, and it is no folder",
        wanted=f"{', '.join(known)}, a checkpoint folder, or a hub id (owner/name)",
        do=f"--model {' or --model '.join(close)}" if close else "--model demo",
    )


def _from_hub(name: str, repository: str) -> Source:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise _unknown(name) from error
    except GatedRepoError as error:
        raise UnavailableError(
            f"{repository} requires its licence to be accepted",
            wanted="access to the repository",
            do="accept it on the model's page and log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no public model {repository}", wanted="owner/name of a model", do="check the spelling"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # what the hub's client raises without a network
        if "home directory" in str(error):  # Python's words
            raise UnavailableError(
                "there is no home folder, where the hub's client keeps what it fetches",
                wanted="HOME, or a folder for it",
                do="export HF_HOME=/some/folder",
            ) from error
        partial = _cached_snapshot(Path(constants.HF_HUB_CACHE), repository)
        if partial is None:
            raise _not_reachable(repository, type(error).__name__) from error
        folder = partial  # the client wants all of it; what it cannot know is that enough is there
    _refuse_adapter(folder, name)
    missing = missing_parts(folder)
    if missing:
        raise UnavailableError(
            f"only part of {repository} is in the cache, it lacks {_some(missing)}",
            wanted=f"these files of {repository} in {folder}",
            do="go online once, or put all its files into a folder and give --model FOLDER",
        )
    revision = f"@{folder.name}" if COMMIT.fullmatch(folder.name) else ""
    return Source(name, f"{repository}{revision}", folder)


def _cached_snapshot(cache: Path, repository: str) -> Path | None:
    """The folder of the revision `main` in the hub's cache, whole or not; None if nothing of it is there."""
    root = cache / f"models--{repository.replace('/', '--')}"
    try:
        commit = read_text(root / "refs" / "main").strip()
    except InputError:
        return None
    folder = root / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _not_reachable(repository: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"cannot fetch {repository}: {reason}, and nothing of it is in the cache",
        wanted=f"a network, or these files of {repository} in a folder: config.json, generation_config.json, "
        "*.safetensors with model.safetensors.index.json, preprocessor_config.json, processor_config.json, tokenizer*, "
        "vocab.json, merges.txt, chat_template.* (those that it has)",
        do="get them on another machine and give --model FOLDER; with --dummy-weights no download is needed",
    )
