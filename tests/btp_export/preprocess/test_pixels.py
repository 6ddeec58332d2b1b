"""Pixels are those of transformers' image processors, bit for bit, whatever they are set to."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from btp_export.families._describe import _picture_steps
from btp_export.preprocess.pixels import pixel_values
from graphs.records.errors import InputError
from graphs.records.preprocess import PictureSteps

SQUARE = {"height": 28, "width": 28}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
    "larger crop": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 27}),
    "no crop": CLIPImageProcessorPil(size={"shortest_edge": 21, "longest_edge": 40}, do_center_crop=False, resample=2),
    "no resize": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
    "levels": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_rescale=False, do_normalize=False, resample=1),
    "unscaled": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_rescale=False, resample=0),
    "scaled alone": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_normalize=False, rescale_factor=0.01),
    "siglip": SiglipImageProcessorPil(size={"height": 28, "width": 24}),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, do_pad=True),
    "llava, plain": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
    "tiles": LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28]]
    ),
    "tiles of another size": LlavaNextImageProcessorPil(
        size={"height": 20, "width": 26}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=[[28, 56], [6, 5]]
    ),
    "patches": Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}),
    "other patches": Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1, "longest_edge": 60 * 60}, patch_size=5, merge_size=3, temporal_patch_size=1
    ),
}  # fmt: skip
sides = st.integers(1, 120)


def drawn(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=25)
@given(height=sides, width=sides, seed=st.integers(0, 2**20))
def test_pixels_are_equal(name: str, height: int, width: int, seed: int) -> None:
    processor: Any = PROCESSORS[name]
    picture = drawn(height, width, seed)
    steps = PictureSteps.model_validate_json(_picture_steps(processor).model_dump_json())  # as a bundle has it
    try:
        wanted = processor([picture], return_tensors="np")["pixel_values"]
    except ValueError:  # nothing is left of its shorter side
        with pytest.raises(InputError, match="becomes"):
            pixel_values(picture, steps)
        return
    got = pixel_values(picture, steps)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.asarray(wanted, np.float32))


def test_full_size_pictures_are_equal() -> None:
    """The published sizes: sums over many pixels round differently from those over few."""
    picture = drawn(480, 640, 0).resize((1600, 1200))
    for processor in (
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        Qwen2VLImageProcessorPil(),
    ):
        one: Any = processor
        wanted = np.asarray(one([picture], return_tensors="np")["pixel_values"])
        np.testing.assert_array_equal(pixel_values(picture, _picture_steps(one)), wanted)


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"max_height": 30, "max_width": 30}),
        CLIPImageProcessorPil(size={"shortest_edge": 28}, do_pad=True),
        type("Other", (CLIPImageProcessorPil,), {"_preprocess": lambda self, images, **options: images})(),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused(processor: Any) -> None:
    with pytest.raises(InputError, match="cannot express") as caught:
        _picture_steps(processor)
    assert caught.value.do


def test_an_overridden_step_is_refused() -> None:
    """A class that does one step in another way is not the class that is described."""
    kind = type("Other", (CLIPImageProcessorPil,), {"rescale": lambda self, image, scale, **options: image})
    with pytest.raises(InputError, match="cannot express"):
        _picture_steps(kind())
