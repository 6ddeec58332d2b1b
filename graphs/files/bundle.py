"""A bundle on disk (contract, "btp-bundle/1"): opening with checks, and writing its parts.

    manifest.json   plan.json   graphs/*.onnx   graphs/weights/*.safetensors   processor/*   engines/   report/
    plans/<profile>.json for profiles with other image tokens than the first one's

Everything the manifest lists is hashed. engines/ and report/ are made from the bundle and not listed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from graphs.files.atomic import SMALL_FILE, Link, hashing, put, record, sha256
from graphs.files.bundle_checks import (
    NO_DIGEST,
    check_config,
    check_digest,
    check_graphs,
    check_hash,
    check_size,
    check_unlisted,
    digest_of,
    listed_files,
)
from graphs.files.checkpoint import Checkpoint, open_checkpoint
from graphs.files.folders import set_aside
from graphs.files.paths import require_utf8
from graphs.records.errors import InputError
from graphs.records.manifest import (
    BuildRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ModelRecord,
)
from graphs.records.plan import PruningPlan
from graphs.records.quantization import Quantization
from graphs.records.reading import UnreadableError, read_file
from graphs.records.record import parse_record
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

Check = Literal["quick", "full"]

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")  # versions that decide the graphs
SHARD_INDEX = "model.safetensors.index.json"
VISION_WEIGHTS = "btp-vision.safetensors"
ROPE_WEIGHTS = "btp-rope.safetensors"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `root` is its folder; nothing of the weights is loaded.

    `plan` is the first profile's, `profile_plans` those of profiles with other image tokens: ask `plan_for`.
    """

    root: Path
    manifest: Manifest
    plan: PruningPlan
    profile_plans: Mapping[str, PruningPlan] = field(default_factory=dict)

    @staticmethod
    def open(path: Path | str, *, check: Check = "quick", small: int = SMALL_FILE) -> "Bundle":
        """Open a bundle and check it.

        `quick` checks that every listed file exists with its size, the hash of all but those above `small` bytes,
        that nothing else lies in graphs/ and processor/, and that the graphs are as the manifest says; `full` hashes
        everything. Raises InputError naming the file that is missing, differs or does not belong there,
        and for a path that is not UTF-8.
        """
        path = Path(path)
        require_utf8(path)
        if check not in get_args(Check):
            raise InputError(f"check {check!r}", wanted=" or ".join(get_args(Check)), do='check="full"')
        while True:
            before = _identity(path)
            try:
                return Bundle._open(path, check, small)
            except InputError:
                if before is None or _identity(path) == before:  # else it was replaced while it was read
                    raise

    @staticmethod
    def _open(path: Path, check: Check, small: int) -> "Bundle":
        manifest = _read_manifest(path)
        check_unlisted(path, manifest)
        files = list(listed_files(manifest))
        for entry in files:
            check_size(path, entry)
        hashed = [entry for entry in files if check == "full" or entry.size <= small]
        with hashing([path / entry.file for entry in hashed]) as hashes:
            for entry in hashed:
                check_hash(path, entry, hashes()[path / entry.file])
        check_config(path, manifest)
        check_graphs(path, manifest.graphs, manifest.weights)
        plans = {name: PruningPlan.load(path / entry.file) for name, entry in manifest.profile_plans.items()}
        bundle = Bundle(path, manifest, PruningPlan.load(path / manifest.plan.file), plans)
        _check_plans(bundle)
        return bundle

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.manifest.spec

    @property
    def processor(self) -> Path:
        """The folder with config.json, tokenizer and processor files."""
        return self.root / "processor"

    @property
    def weights(self) -> Path:
        """The folder with the safetensors files."""
        return self.root / "graphs" / "weights"

    def profile(self, name: str | None = None) -> ShapeProfile:
        """The shape profile of that name, or the first. Raises InputError for an unknown name."""
        profiles = {profile.name: profile for profile in self.manifest.profiles}
        if name is None:
            return self.manifest.profiles[0]
        if name not in profiles:
            raise InputError(
                f"{self.root} has no profile {name}", wanted=" or ".join(profiles), do="choose one of them"
            )
        return profiles[name]

    def plan_for(self, profile: str | None = None) -> PruningPlan:
        """The plan of the profile of that name, or of the first. Raises InputError for an unknown name."""
        return self.profile_plans.get(self.profile(profile).name, self.plan)

    def without_pruning(self) -> "Bundle":
        """The bundle as if its plans had no stages: what pruned engines are measured beside."""
        profiles = [profile.name for profile in self.manifest.profiles]
        bare = {name: self.plan_for(name).without_stages() for name in profiles}
        return replace(self, plan=bare[profiles[0]], profile_plans=bare)

    def graphs(self, profile: str | None = None) -> list[GraphRecord]:
        """The graphs of one profile, in the order in which they run."""
        wanted = self.profile(profile).name
        return [graph for graph in self.manifest.graphs if graph.profile == wanted]

    def graph(self, name: str, profile: str | None = None) -> GraphRecord:
        """The record of a graph by its name in graphs/interfaces.md. Raises InputError if it is not there."""
        for graph in self.graphs(profile):
            if graph.name == name:
                return graph
        names = ", ".join(graph.name for graph in self.graphs(profile))
        raise InputError(f"{self.root} has no graph {name}", wanted=f"one of {names}", do="export the bundle again")

    def graph_path(self, name: str, profile: str | None = None) -> Path:
        """The .onnx file of a graph."""
        return self.root / self.graph(name, profile).file

    def checkpoint(self, renames: Sequence[tuple[str, str]] | None = None) -> Checkpoint:
        """The model's own weights, by canonical name (with the manifest's renames unless others are given)."""
        pairs = self.manifest.model.renames if renames is None else renames
        listed = frozenset(Path(entry.file).name for entry in self.manifest.weights)
        return open_checkpoint(self.processor, pairs, weights=self.weights, listed=listed)


def _identity(root: Path) -> tuple[int, int] | None:
    """Which folder it is, by whatever name; None if there is none."""
    try:
        stat = root.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _read_manifest(root: Path) -> Manifest:
    path = root / "manifest.json"
    try:
        text = read_file(path, noun="bundle manifest")
    except UnreadableError as error:
        do = f"btp-export --model demo --out {root}" if not root.exists() else "give the bundle's folder"
        aside = None if root.exists() else set_aside(root)
        raise InputError(
            f"no bundle at {root}: manifest.json: {error.reason}",
            wanted="a folder written by btp-export",
            do=do if aside is None else f"mv {aside} {root}, which an interrupted --force set aside",
        ) from error
    manifest = parse_record(Manifest, text, source=path, noun="bundle manifest")
    check_digest(path, text, manifest)
    return manifest


def _check_plans(bundle: Bundle) -> None:
    """A manifest edited by hand could pair a plan with another model or profile."""
    manifest = bundle.manifest
    if not manifest.profiles:
        raise InputError(f"{bundle.root / 'manifest.json'} has no profile", wanted="at least one", do="export it again")
    spec, files = manifest.spec, manifest.profile_plans
    for profile in manifest.profiles:
        plan, file = bundle.plan_for(profile.name), files.get(profile.name, manifest.plan).file
        if (plan.model_type, plan.num_layers) != (spec.model_type, spec.decoder.num_layers):
            raise InputError(
                f"{bundle.root / file} is for {plan.model_type} with {plan.num_layers} layers",
                wanted=f"{spec.model_type} with {spec.decoder.num_layers} layers as in the manifest",
                do="export the bundle again",
            )
        if (plan.image_tokens, plan.grid, plan.blocks) != (profile.image_tokens, profile.grid, profile.blocks):
            raise InputError(
                f"{bundle.root / file} is for {plan.image_tokens} image tokens on {plan.grid[0]} x {plan.grid[1]}",
                wanted=f"{profile.image_tokens} on {profile.grid[0]} x {profile.grid[1]} of profile {profile.name}",
                do="export the bundle again",
            )


# -- writing ---------------------------------------------------------------------------------------------------------


def write_plan(root: Path, plan: PruningPlan, file: str = "plan.json") -> FileRecord:
    """Write a plan under `root`."""
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(plan.to_json(), encoding="utf-8")
    return record(root, file)


def write_plans(root: Path, plans: Mapping[str, PruningPlan]) -> tuple[FileRecord, dict[str, FileRecord]]:
    """plan.json for the first profile, and plans/<profile>.json where another's plan differs."""
    first = next(iter(plans.values()))
    others = {name: write_plan(root, plan, f"plans/{name}.json") for name, plan in plans.items() if plan != first}
    return write_plan(root, first), others


def place_weights(root: Path, checkpoint: Checkpoint, link: Link) -> dict[str, str | None]:
    """Put the checkpoint's shards (and their index, if there are several) in graphs/weights, by their own names.

    Gives the files by their paths in the bundle, with their hashes as far as those are known by now.
    """
    folder = root / "graphs" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str | None] = {}
    for name, file in sorted(zip(checkpoint.shards, checkpoint.files, strict=True)):
        names[name] = put(file, folder / name, link)
    if checkpoint.shards != ("model.safetensors",):
        weight_map = {ref.stored_name: ref.shard for ref in checkpoint.tensors.values()}
        text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True) + "\n"
        (folder / SHARD_INDEX).write_text(text, encoding="utf-8")
        names[SHARD_INDEX] = sha256(folder / SHARD_INDEX)
    return {f"graphs/weights/{name}": known for name, known in names.items()}


def write_manifest(
    root: Path,
    *,
    model: ModelRecord,
    spec: ModelSpec,
    plan: FileRecord,
    build: BuildRecord,
    profiles: Sequence[ShapeProfile],
    graphs: Sequence[GraphRecord],
    weights: Sequence[FileRecord],
    processor: Sequence[FileRecord],
    profile_plans: dict[str, FileRecord] | None = None,
    tools: dict[str, str] | None = None,
    quantization: Quantization | None = None,
) -> Manifest:
    """Write manifest.json, the last file of a bundle."""
    manifest = Manifest(
        model=model,
        spec=spec,
        quantization=quantization,
        plan=plan,
        profile_plans=profile_plans or {},
        build=build,
        profiles=tuple(profiles),
        graphs=tuple(graphs),
        weights=tuple(sorted(weights, key=lambda entry: entry.file)),
        processor=tuple(sorted(processor, key=lambda entry: entry.file)),
        tools=tool_versions() if tools is None else tools,
    )
    document = manifest.model_dump(mode="json") | {"manifest_sha256": NO_DIGEST}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    digest = digest_of(text.encode())
    (root / "manifest.json").write_text(digest.join(text.rsplit(NO_DIGEST, 1)), encoding="utf-8")
    return manifest.model_copy(update={"manifest_sha256": digest})


def tool_versions() -> dict[str, str]:
    """Versions of the packages that decide a bundle's bytes."""
    versions = {"btp-export": _version("btp-export")} | {name: _version(name) for name in TOOLS}
    return {name: version for name, version in versions.items() if version}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
