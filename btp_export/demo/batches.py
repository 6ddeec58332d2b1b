"""Training batches: pictures (or rectangles of their cells) with many questions each, as arrays.

One sequence holds the prefix, the image and N question blocks of Q tokens. Every block sees the prefix, the image and
itself only, so a picture costs its image tokens once and teaches N answers. Letters: B pictures, V image tokens in the
rectangle, N blocks, Q = 11 tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from btp_export.demo import model_files
from calibrate.data import scenes, signs

BLOCK_TOKENS = 11  # the longest question (8 with "ASSISTANT:"), a sign's three characters and the end, less the last
IGNORE = -100  # the label that torch's cross entropy leaves out
_PATCHES = scenes.IMAGE_SIZE // model_files.PATCH
_CELL_PATCHES = scenes.CELL // model_files.PATCH
# What each image token is asked in the patch loss, and how many classes: class 0 is "nothing here" where it is sparse.
PATCH_TASKS = {
    "colour": len(scenes.COLOURS) + 1,
    "shape": len(scenes.SHAPES) + 1,
    "row": 4,
    "column": 4,
    "centre": 2,
    "character": len(signs.CHARACTERS) + 1,
    "turn": max(signs.LENGTHS) + 1,
}
SPARSE_TASKS = ("colour", "shape", "centre", "character", "turn")  # class 0 is nearly everywhere


@dataclass(frozen=True)
class Batch:
    """Arrays of one step."""

    pixels: npt.NDArray[np.uint8]  # [B, h, w, 3]
    patches: npt.NDArray[np.int64]  # [B, V] place of each image token in the 24x24 grid
    tokens: npt.NDArray[np.int64]  # [B, N, Q]
    labels: npt.NDArray[np.int64]  # [B, N, Q] the token that follows, IGNORE outside the answer
    kinds: npt.NDArray[np.int64]  # [B, N] index into QUESTION_KINDS, -1 for an unused block
    patch_labels: npt.NDArray[np.int64]  # [B, V, tasks]


class Batches:
    """Makes batches; words are looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._eos = int(tokenizer.convert_tokens_to_ids("</s>"))

    def make(self, first_seed: int, size: int, *, cells: int, blocks: int, signs: float = 0.0) -> Batch:
        """`size` pictures from consecutive scene seeds, cut to `cells` x `cells` cells, `blocks` questions each.

        `signs` is the share of pictures with a sign, from 2 on the number of signs in each, of which none is asked
        about; 0 leaves the pictures of a seed as they are without signs.
        """
        parts = [self._one(first_seed + i, cells, blocks, signs) for i in range(size)]
        return Batch(*(np.stack(column) for column in zip(*parts, strict=True)))

    def _one(self, seed: int, cells: int, blocks: int, share: float) -> tuple[npt.NDArray[np.generic], ...]:
        rng = np.random.default_rng(seed)
        top, left = (int(rng.integers(0, scenes.GRID - cells + 1)) for _ in range(2))
        inside = [(row, column) for row in range(top, top + cells) for column in range(left, left + cells)]
        low, high = {1: (1, 1), 2: (1, 4), 3: (2, 7), 4: (3, 9)}[cells]
        boards: list[signs.Sign] = []
        for _ in range(max(1, int(share)) if share > 0 and rng.random() < share else 0):
            boards.append(signs.draw_sign(rng, inside, scenes.CELL))
            inside = [cell for cell in inside if cell not in boards[-1].cells]
        objects = scenes.draw_layout(rng, int(rng.integers(low, min(high, len(inside)) + 1)), inside)
        image = scenes.render(objects, rng, *boards)
        rows = slice(top * scenes.CELL, (top + cells) * scenes.CELL)
        columns = slice(left * scenes.CELL, (left + cells) * scenes.CELL)
        patches = _patches(top, left, cells)
        asked = scenes.ask(objects, rng, boards[0] if len(boards) == 1 else None)
        tokens, labels, kinds = self._blocks(asked[:blocks], blocks)
        return image[rows, columns], patches, tokens, labels, kinds, _patch_labels(objects, boards, patches)

    def _blocks(self, asked: list[scenes.Question], blocks: int) -> tuple[npt.NDArray[np.int64], ...]:
        tokens = np.zeros((blocks, BLOCK_TOKENS), np.int64)
        labels = np.full((blocks, BLOCK_TOKENS), IGNORE, np.int64)
        kinds = np.full(blocks, -1, np.int64)
        for i, question in enumerate(asked):
            prompt = self._ids(f"{question.text} ASSISTANT:")
            answer = [*self._ids(question.answer), self._eos]
            sequence = [*prompt, *answer]
            tokens[i, : len(sequence) - 1] = sequence[:-1]
            labels[i, len(prompt) - 1 : len(sequence) - 1] = answer
            kinds[i] = scenes.QUESTION_KINDS.index(question.kind)
        return tokens, labels, kinds

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._known[text]


def _patches(top: int, left: int, cells: int) -> npt.NDArray[np.int64]:
    side = np.arange(cells * _CELL_PATCHES)
    grid = (top * _CELL_PATCHES + side)[:, None] * _PATCHES + (left * _CELL_PATCHES + side)[None, :]
    return grid.reshape(-1).astype(np.int64)


def _patch_labels(
    objects: tuple[scenes.SceneObject, ...], boards: list[signs.Sign], patches: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[V, tasks] for each patch.

    Colour and shape of the object it lies on, its row and column of cells, whether it holds the object's centre, the
    character of the sign that it lies on, and that one's turn.
    """
    row, column = patches // _PATCHES, patches % _PATCHES
    labels = np.zeros((len(patches), len(PATCH_TASKS)), np.int64)
    labels[:, 2], labels[:, 3] = row // _CELL_PATCHES, column // _CELL_PATCHES
    y, x = (row + 0.5) * model_files.PATCH, (column + 0.5) * model_files.PATCH
    colours = list(scenes.COLOURS)
    for item in objects:
        on = np.hypot(y - item.y, x - item.x) < item.radius
        labels[on, 0] = 1 + colours.index(item.colour)
        labels[on, 1] = 1 + scenes.SHAPES.index(item.shape)
        centre = (row == int(item.y // model_files.PATCH)) & (column == int(item.x // model_files.PATCH))
        labels[centre, 4] = 1
    for sign in boards:
        for turn, name in enumerate(sign.text, start=1):
            left, top, right, bottom = sign.box(turn - 1)
            on = (x > left) & (x < right) & (y > top) & (y < bottom)
            labels[on, 5] = 1 + signs.CHARACTERS.index(name)
            labels[on, 6] = turn
    return labels
