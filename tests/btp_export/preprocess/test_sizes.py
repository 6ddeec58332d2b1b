"""Sizes that pictures are scaled to: transformers' own functions give the same ones, on every picture."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from btp_export.preprocess import sizes
from graphs.records.errors import InputError

sides = st.integers(1, 4000)
pictures = st.tuples(sides, sides)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class Shape:
    """A picture of which only the shape is asked for."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = (3, *size)


@given(picture=pictures, pixels=st.integers(1, 700))
def test_shortest_edge(picture: tuple[int, int], pixels: int) -> None:
    shape: Any = Shape(picture)
    wanted = get_resize_output_image_size(
        shape, pixels, default_to_square=False, input_data_format=ChannelDimension.FIRST
    )
    assert sizes.shortest_edge(picture, pixels) == wanted


@given(picture=pictures, pixels=st.integers(1, 700), longest=st.integers(1, 1400))
def test_shortest_edge_with_a_bound(picture: tuple[int, int], pixels: int, longest: int) -> None:
    assert sizes.shortest_edge(picture, pixels, longest) == get_size_with_aspect_ratio(picture, pixels, longest)


@given(picture=pictures, order=st.permutations(PINPOINTS))
def test_best_size(picture: tuple[int, int], order: list[tuple[int, int]]) -> None:
    assert sizes.best_size(picture, order) == select_best_resolution(picture, order)


@given(picture=pictures, frame=st.sampled_from(PINPOINTS))
def test_inside(picture: tuple[int, int], frame: tuple[int, int]) -> None:
    assert sizes.inside(picture, frame) == get_patch_output_size(Shape(picture), frame, ChannelDimension.FIRST)


@given(picture=pictures, least=st.integers(1, 10**5), more=st.integers(0, 10**6), multiple=st.sampled_from([4, 28, 32]))
def test_pixel_range(picture: tuple[int, int], least: int, more: int, multiple: int) -> None:
    bounds = {"min_pixels": least, "max_pixels": least + more}
    try:
        wanted = smart_resize(*picture, factor=multiple, **bounds)
    except ValueError:
        with pytest.raises(InputError, match="200 times"):
            sizes.in_pixel_range(picture, multiple, least, least + more)
        return
    assert sizes.in_pixel_range(picture, multiple, least, least + more) == wanted
