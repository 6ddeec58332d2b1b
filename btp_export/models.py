"""From what the user calls a model to an opened checkpoint: the demo, known names, local folders, hub ids."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from btp_export.families import Family, family_for
from graphs.checkpoint import Checkpoint, open_checkpoint, read_config
from graphs.errors import InputError, UnavailableError
from graphs.spec import ModelSpec

DEMO = "demo"
HUB_NAMES = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-1.6-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")

# What is fetched of a repository: no pickles, no code.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]

# What a bundle keeps of a checkpoint folder beside the weights.
PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "btp.json",
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


def open_model(name: str) -> Model:
    """Find a model and read its configuration and headers.

    Raises InputError for an unknown name, a model without a family, or a broken checkpoint; UnavailableError if it
    must be fetched and cannot.
    """
    source = find_model(name)
    family = family_for(read_config(source.folder))
    checkpoint = open_checkpoint(source.folder, family.renames)
    return Model(source, family, checkpoint, family.spec(checkpoint, source.name))


def find_model(name: str) -> Source:
    """Resolve `demo`, a known name, a local folder or a hub id, fetching from the hub what is not there yet."""
    if name == DEMO:
        from btp_export.demo import checkpoint_path

        return Source(DEMO, DEMO, checkpoint_path(), is_demo=True)
    folder = Path(name).expanduser()
    if name and name not in HUB_NAMES and folder.is_dir():
        label = folder.resolve().name
        return Source(label, label, folder.resolve())
    if name in HUB_NAMES or (HUB_ID.fullmatch(name) and not folder.parent.is_dir()):
        return _from_hub(name, HUB_NAMES.get(name, name))
    if folder.is_file():
        raise InputError(f"{name} is a file", wanted="a checkpoint folder", do="give the folder that holds config.json")
    raise _unknown(name)


def _unknown(name: str) -> InputError:
    known = [DEMO, *HUB_NAMES]
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    return InputError(
        f"no model is called {name!r}, and it is no folder",
        wanted=f"{', '.join(known)}, a checkpoint folder, or a hub id (owner/name)",
        do=f"--model {' or --model '.join(close)}" if close else "--model demo",
    )


def _from_hub(name: str, repository: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise _unknown(name) from error
    except GatedRepoError as error:
        raise UnavailableError(
            f"{repository} wants its licence accepted first",
            wanted="access to the repository",
            do="accept it on the model's page and log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no public model {repository}", wanted="owner/name of a model", do="check the spelling"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # what the hub's client raises without a network
        raise UnavailableError(
            f"cannot fetch {repository}: {type(error).__name__}",
            wanted=f"a network, or the files of {repository} in a folder: config.json, *.safetensors with "
            "model.safetensors.index.json, tokenizer and processor files",
            do="get them on another machine and give --model FOLDER",
        ) from error
    if not (folder / "config.json").is_file():
        raise UnavailableError(
            f"only part of {repository} is in the cache", wanted="all its files", do="go online once, or --model FOLDER"
        )
    revision = f"@{folder.name}" if COMMIT.fullmatch(folder.name) else ""
    return Source(name, f"{repository}{revision}", folder)
