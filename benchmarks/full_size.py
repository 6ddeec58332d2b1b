"""LLaVA-1.5-7B in four bits beside llama.cpp's Q4_0 of the same codes: first token, tokens, memory, opening.

    python -m benchmarks --only full_size [--folder DIR]

A checkpoint of the model's shapes with random codes in groups of 32 (4.6 GB) becomes a bundle with the published plan,
the same without pruning, and a GGUF file (4.2 GB). The prompt is 675 tokens, all of them given: vision is no part of
it. Two programs are open at a time and work in turns. Opening is counted from the second time on, when packed weights
and pages are there. Memory is what the machine has to hold when all is done (Pss); resident pages are also given as
they were at most, where a page of the weights counts once for prefill and once for decode.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.findings import NotHere, Row, Wishes, ratio
from benchmarks.four_bits_cpu import MODEL, plan_for
from benchmarks.gguf_file import write_gguf
from benchmarks.peers import Given
from benchmarks.peers.process import Process, prefills_in_turns, same, started, steps_in_turns
from benchmarks.side_by_side import INT8
from btp_export.dummy.checkpoints import dummy_checkpoint
from btp_export.model.open_model import open_model
from graphs.building.derived_bundles import derive
from graphs.files.atomic import check_space
from graphs.files.bundle import Bundle
from graphs.files.memory import available_memory
from graphs.records.errors import InputError

NEEDED = 14 * 2**30  # bytes of memory: two programs with 4 GB of weights, what they compute with, and some room
DISK = 17 * 2**30
STEPS = 4
ROUNDS = 1  # after the first prefill, which is not counted: one takes a minute or two
WINS = "pruning has to show"
PEER = "a fifth more than llama.cpp"


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """Ours pruned, then ours full, each beside llama.cpp."""
    room = available_memory()
    if not wishes.quick and room is not None and room < NEEDED:
        raise NotHere(f"{room / 2**30:.0f} GiB of memory are free, {NEEDED / 2**30:.0f} are needed")
    bundles, source = _bundles(wishes)
    model = open_model(str(source))
    try:
        file = write_gguf(model, wishes.folder / "full-size" / "Q4_0.gguf", "Q4_0")
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    profile = bundles["full"].manifest.profiles[0]
    ids = np.random.default_rng(0).integers(5, model.spec.decoder.vocab_size, (1, profile.total_tokens)).tolist()
    room_for = (ROUNDS + 1) * STEPS
    for kind, limit, why in (("pruned", 1.0, WINS), ("full", 1.2, PEER)):
        ours = ("ours", Given(str(bundles[kind].root), ids, wishes.threads, room_for))
        other = ("llama_cpp", Given(str(file), ids, wishes.threads, room_for))
        with started(ours, other):
            pass  # what is packed once is packed now
        with started(ours, other) as running:
            yield from _beside(kind, running, model.spec.decoder.vocab_size, limit, why)


def _beside(kind: str, running: list[Process], vocab: int, limit: float, why: str) -> Iterator[Row]:
    name = f"{MODEL}, 4 bits, {kind}"
    first = [process.prefill()[1] for process in running]
    if kind == "full":
        same(*first, least=INT8)
    times = prefills_in_turns(running, ROUNDS, uncounted=0)
    yield ratio(f"{name}: first token, ours / llama.cpp", *times, unit="ms", limit=limit, why=why)
    steps = steps_in_turns(running, ROUNDS, STEPS, vocab=vocab)
    yield ratio(f"{name}: a token, ours / llama.cpp", *steps, unit="ms", limit=1.2, why=PEER)
    opened = [[process.opened_s] for process in running]
    yield ratio(f"{name}: opening, ours / llama.cpp", *opened, unit="s", limit=1.2, why=PEER)
    used = [process.memory() for process in running]
    private = " and ".join(f"{one['RssAnon']:,.0f}" for one in used)
    for what, key in (("memory, each page counted once", "Pss"), ("resident pages at most", "VmHWM")):
        found = ratio(
            f"{name}: {what}, ours / llama.cpp", *([one[key]] for one in used), unit="MiB", limit=1.2, why=PEER
        )
        yield replace(found, detail=f"{found.detail}; of it private {private}")


def _bundles(wishes: Wishes) -> tuple[dict[str, Bundle], Path]:
    """The pruned and the full bundle, and the checkpoint they are of; `quick`: of a tiny model."""
    folder = wishes.folder / "full-size"
    if wishes.quick:
        source = models.checkpoint(models.TINY, folder / "checkpoint", four_bits=True)
        full = models.bundle(source, folder / "full")
        return {"full": full, "pruned": models.pruned(full, folder / "pruned", 0.22)}, source
    try:
        check_space(folder, 0 if (folder / "full").is_dir() else DISK, what="this", do="--folder on another disk")
    except InputError as error:
        raise NotHere(str(error)) from error
    folder.mkdir(exist_ok=True)
    source = dummy_checkpoint(MODEL, group=models.GROUP, root=folder)
    full = models.bundle(source, folder / "full")
    pruned = folder / "pruned"
    plan = plan_for(full.spec.decoder.num_layers)
    return {"full": full, "pruned": Bundle.open(pruned) if pruned.is_dir() else derive(full, plan, pruned)}, source
