"""Memory of a prompt's rows: the whole, and its parts before the image, the image's and after it."""

from collections.abc import Callable

from engines.runners.interface import Buffer, Dtype, Loader
from graphs.records.shapes import ShapeProfile


def allocate_prompt(
    loader: Loader, profile: ShapeProfile, size: int, kinds: tuple[Dtype, Dtype], *, alignment: int
) -> tuple[Buffer, list[Buffer], Callable[[], None] | None]:
    """The rows [B,S,size] of the whole prompt, those of its parts (before the image, the image's, after it), and what
    joins them: nothing where the parts are the whole's own rows, as those of one sample can be.

    kinds: the type of the rows, and that of the image's.
    """
    kind, features = kinds
    counts = (profile.prefix_tokens, profile.image_tokens, profile.text_tokens)
    starts = (0, counts[0], counts[0] + counts[1])
    hidden = loader.allocate(kind, (profile.batch, profile.total_tokens, size))
    aligned = all(start * size * kind.itemsize % alignment == 0 for start in starts)
    if profile.batch == 1 and aligned and features == kind:
        own = [hidden.view((1, n, size), offset=start * size) for n, start in zip(counts, starts, strict=True)]
        return hidden, own, None
    parts = [
        loader.allocate(each, (profile.batch, n, size)) for n, each in zip(counts, (kind, features, kind), strict=True)
    ]

    def join() -> None:
        for start, rows in zip(starts, parts, strict=True):
            hidden.write_rows(rows, [start] * profile.batch)

    return hidden, parts, join
