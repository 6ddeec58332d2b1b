"""Seeded pictures of coloured shapes, with questions whose answers sit at particular places of the picture.

A scene is a 96x96 picture split into 4x4 cells of 24 pixels. Three to nine cells hold one object each; the ground is
low-frequency colour noise with pixel noise, strewn with specks in the colours of the objects. The specks matter:
without clutter a selection that only spreads out keeps every object, and the comparison of plans would flatter it.

    picture -> layout (which object in which cell) -> questions with one right answer each

The second half of every range of scene seeds shows a sign besides (calibrate/data/signs.py): it is what "reading" asks
about, and the scenes of the first half, which the other kinds are asked about, are the same with and without it.

The demo model is trained on the split "train", the pruning plan is calibrated on "calibration" and accuracy is measured
on "eval"; the three never share a scene. Everything is a function of the seeds, and numpy and PIL are all it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from calibrate.data import signs
from calibrate.data.signs import Sign

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 225, 50),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
    "cyan": (60, 215, 225),
    "white": (242, 242, 242),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS: dict[str, str] = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
READING = "reading"
QUESTION_KINDS: tuple[str, ...] = ("colour", "shape", "is there", "count", "where", READING)

IMAGE_SIZE = 96
GRID = 4
CELL = IMAGE_SIZE // GRID
_MIN_RADIUS, _MAX_RADIUS = 5.0, 8.0
_REPEAT = 0.2  # chance that an object takes the colour (or the shape) of an earlier one: without it nothing counts to 3
_SPLITS: dict[str, int] = {"train": 0, "calibration": 1, "eval": 2}
_SPLIT_SEEDS = 1 << 48
_SEED_SCENES = 1 << 24
_FIRST_SIGN = _SEED_SCENES // 2  # the scenes of a seed from here on show a sign


@dataclass(frozen=True)
class SceneObject:
    """One shape: its cell (`row`, `column` in 0..3) and its centre and radius in pixels."""

    shape: str
    colour: str
    row: int
    column: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture, [96, 96, 3] uint8, and what is drawn in it."""

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    sign: Sign | None = None


@dataclass(frozen=True)
class Question:
    """A question about one scene; `answer` is one to three words."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class SceneSample:
    """One picture with one question, as the model is asked."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    scene_seed: int


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the same seed gives the same objects, the same sign and the same pixels."""
    rng = np.random.default_rng(seed)
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    sign = signs.draw_sign(rng, cells, CELL) if seed % _SEED_SCENES >= _FIRST_SIGN else None
    free = [cell for cell in cells if sign is None or cell not in sign.cells]
    objects = draw_layout(rng, int(rng.integers(3, 10)), free)
    return Scene(render(objects, rng, *([sign] if sign else [])), objects, sign)


def samples(count: int, *, seed: int, split: str = "eval") -> list[SceneSample]:
    """`count` pictures with one question each; the kinds take turns.

    The first n samples are the same for every count >= n. Scenes that have no question of the kind whose turn it is
    (for example no shape that occurs once) are passed over.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {', '.join(_SPLITS)}.")
    next_seed = {reads: first_scene_seed(seed, split) + reads * _FIRST_SIGN for reads in (False, True)}
    chosen: list[SceneSample] = []
    while len(chosen) < count:
        kind = QUESTION_KINDS[len(chosen) % len(QUESTION_KINDS)]
        scene_seed = next_seed[kind == READING]
        next_seed[kind == READING] += 1
        scene = make_scene(scene_seed)
        options = [question for question in questions(scene, scene_seed) if question.kind == kind]
        if options:
            pick = options[int(np.random.default_rng((scene_seed, 1)).integers(len(options)))]
            chosen.append(SceneSample(Image.fromarray(scene.image), pick.text, pick.answer, kind, scene_seed))
    return chosen


def first_scene_seed(seed: int, split: str) -> int:
    """Where the scene seeds of (`seed`, `split`) begin; the ranges of two splits never meet."""
    if not 0 <= seed < _SPLIT_SEEDS // _SEED_SCENES:
        raise ValueError(f"seed is {seed}; wanted 0 to {_SPLIT_SEEDS // _SEED_SCENES - 1}.")
    return _SPLITS[split] * _SPLIT_SEEDS + seed * _SEED_SCENES


# Layout


def draw_layout(
    rng: np.random.Generator, count: int, cells: Sequence[tuple[int, int]] | None = None
) -> tuple[SceneObject, ...]:
    """`count` objects in distinct cells, chosen among `cells` (all 16 unless told)."""
    free = list(cells) if cells is not None else [(row, column) for row in range(GRID) for column in range(GRID)]
    objects: list[SceneObject] = []
    for place in rng.permutation(len(free))[:count]:
        row, column = free[place]
        radius = float(rng.uniform(_MIN_RADIUS, _MAX_RADIUS))
        slack = CELL / 2 - radius - 0.5
        objects.append(
            SceneObject(
                shape=_repeat_or_draw(rng, [item.shape for item in objects], SHAPES),
                colour=_repeat_or_draw(rng, [item.colour for item in objects], tuple(COLOURS)),
                row=row,
                column=column,
                x=(column + 0.5) * CELL + float(rng.uniform(-slack, slack)),
                y=(row + 0.5) * CELL + float(rng.uniform(-slack, slack)),
                radius=radius,
            )
        )
    return tuple(objects)


def _repeat_or_draw(rng: np.random.Generator, used: list[str], names: tuple[str, ...]) -> str:
    if used and rng.random() < _REPEAT:
        return used[int(rng.integers(len(used)))]
    return names[int(rng.integers(len(names)))]


# Drawing

_Plane = npt.NDArray[np.float64]


def render(objects: Sequence[SceneObject], rng: np.random.Generator, *boards: Sign) -> npt.NDArray[np.uint8]:
    """The picture of a layout, [96, 96, 3] uint8: ground, specks, objects, signs, and pixel noise over all."""
    canvas = _ground(rng)
    _strew_specks(canvas, rng)
    for item in objects:
        _draw(canvas, item, rng)
    for sign in boards:
        signs.paint(canvas, sign, rng)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 6.0
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _ground(rng: np.random.Generator) -> _Plane:
    grey = rng.uniform(45, 125, (7, 7, 1))
    coarse = np.clip(grey + rng.uniform(-25, 25, (7, 7, 3)), 0, 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.array(smooth, dtype=np.float64)


def _strew_specks(canvas: _Plane, rng: np.random.Generator) -> None:
    count = int(rng.integers(20, 61))
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    tints = palette[rng.integers(len(palette), size=count)] + rng.uniform(-12, 12, (count, 3))
    corners = rng.integers(0, IMAGE_SIZE - 1, (count, 2))
    sides = rng.integers(1, 3, (count, 2))
    for tint, (top, left), (height, width) in zip(tints, corners, sides, strict=True):
        canvas[top : top + height, left : left + width] = tint


def _draw(canvas: _Plane, item: SceneObject, rng: np.random.Generator) -> None:
    top, left = item.row * CELL, item.column * CELL
    y, x = np.mgrid[top : top + CELL, left : left + CELL] + 0.5
    distance = _DISTANCES[item.shape](x - item.x, y - item.y, item.radius)
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # half a pixel of soft edge
    tint = np.array(COLOURS[item.colour]) + rng.uniform(-12, 12, 3)
    region = canvas[top : top + CELL, left : left + CELL]
    region += cover * (tint - region)


def _circle(x: _Plane, y: _Plane, r: float) -> _Plane:
    return np.asarray(np.hypot(x, y) - 0.95 * r)


def _ring(x: _Plane, y: _Plane, r: float) -> _Plane:
    return np.asarray(np.abs(np.hypot(x, y) - 0.78 * r) - 0.22 * r)


def _square(x: _Plane, y: _Plane, r: float) -> _Plane:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.85 * r)


def _triangle(x: _Plane, y: _Plane, r: float) -> _Plane:
    return np.asarray(np.maximum(y, np.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5 * r)


def _cross(x: _Plane, y: _Plane, r: float) -> _Plane:
    far, near = np.maximum(np.abs(x), np.abs(y)) - r, np.minimum(np.abs(x), np.abs(y)) - 0.3 * r
    return np.asarray(np.maximum(far, near))


def _star(x: _Plane, y: _Plane, r: float) -> _Plane:
    """Five points: fold the plane onto the half wedge of one point, whose edge is a single line."""
    wedge = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + wedge, 2 * wedge) - wedge)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner_along, inner_across = 0.45 * r * np.cos(wedge), 0.45 * r * np.sin(wedge)
    normal = np.array([inner_across, r - inner_along]) / np.hypot(inner_across, r - inner_along)
    return np.asarray((along - r) * normal[0] + across * normal[1])


_DISTANCES: dict[str, Callable[[_Plane, _Plane, float], _Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


# Questions


def questions(scene: Scene, seed: int) -> list[Question]:
    """Every kind of question the scene can answer, in a seeded order in which the kinds take turns.

    colour: of a shape that occurs once; shape: of a colour that occurs once; where: of a colour and shape that occur
    together once; "is there": as many yes as no; count: up to two questions for each answer from zero to four;
    reading: one, where there is a sign.
    """
    return ask(scene.objects, np.random.default_rng((seed, 2)), scene.sign)


def ask(objects: Sequence[SceneObject], rng: np.random.Generator, sign: Sign | None = None) -> list[Question]:
    """`questions` for a layout alone, which may fill only a part of the picture."""
    by_kind = [
        _ask_colour(objects),
        _ask_shape(objects),
        _ask_is_there(objects, rng),
        _ask_count(objects, rng),
        _ask_where(objects),
        [] if sign is None else [Question(READING, signs.QUESTION, sign.answer)],
    ]
    queues = [[kind[i] for i in rng.permutation(len(kind))] for kind in by_kind]
    return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]


def _ask_colour(objects: Sequence[SceneObject]) -> list[Question]:
    count = Counter(item.shape for item in objects)
    once = [item for item in objects if count[item.shape] == 1]
    return [Question("colour", f"what colour is the {item.shape}?", item.colour) for item in once]


def _ask_shape(objects: Sequence[SceneObject]) -> list[Question]:
    count = Counter(item.colour for item in objects)
    once = [item for item in objects if count[item.colour] == 1]
    return [Question("shape", f"what shape is the {item.colour} object?", item.shape) for item in once]


def _ask_is_there(objects: Sequence[SceneObject], rng: np.random.Generator) -> list[Question]:
    """Half of the answers are no, and those name a colour and a shape that are there, but never together."""
    present = sorted({(item.colour, item.shape) for item in objects})
    colours, shapes = {item.colour for item in objects}, {item.shape for item in objects}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    easy = [pair for pair in absent if (pair[0] in colours) != (pair[1] in shapes)]
    count = min(5, len(present))
    no = [hard[i] for i in rng.permutation(len(hard))][:count]
    no += [easy[i] for i in rng.permutation(len(easy))][: count - len(no)]
    yes = [present[i] for i in rng.permutation(len(present))][:count]
    return [_is_there(pair, "yes") for pair in yes] + [_is_there(pair, "no") for pair in no]


def _is_there(pair: tuple[str, str], answer: str) -> Question:
    article = "an" if pair[0][0] in "aeiou" else "a"
    return Question("is there", f"is there {article} {pair[0]} {pair[1]}?", answer)


def _ask_count(objects: Sequence[SceneObject], rng: np.random.Generator) -> list[Question]:
    colours = Counter(item.colour for item in objects)
    shapes = Counter(item.shape for item in objects)
    things = [(f"{colour} objects", colours[colour]) for colour in COLOURS]
    things += [(PLURALS[shape], shapes[shape]) for shape in SHAPES]
    asked: list[Question] = []
    for number, word in enumerate(NUMBERS):
        matching = [name for name, count in things if count == number]
        for i in rng.permutation(len(matching))[:2]:
            asked.append(Question("count", f"how many {matching[i]} are there?", word))
    return asked


def _ask_where(objects: Sequence[SceneObject]) -> list[Question]:
    count = Counter((item.colour, item.shape) for item in objects)
    once = [item for item in objects if count[item.colour, item.shape] == 1]
    return [Question("where", f"where is the {item.colour} {item.shape}?", quadrant(item)) for item in once]


def quadrant(item: SceneObject) -> str:
    """The quarter of the picture that holds the object's cell, as in "top left"."""
    vertical = "top" if item.row < GRID // 2 else "bottom"
    return f"{vertical} {'left' if item.column < GRID // 2 else 'right'}"
