import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphs.building.rope import positions, rope_tables, token_tables
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec


def test_default_rope_is_the_formula():
    cos, sin = rope_tables({"text_config": {"hidden_size": 128, "num_attention_heads": 1}}, 700)
    assert cos.shape == sin.shape == (700, 64)
    assert cos.dtype == np.float32
    frequency = 10000.0 ** -(np.arange(64) / 64)
    angle = np.arange(700)[:, None] * frequency
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-4)  # float32 angles, as transformers computes them
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ],
)
def test_scaled_tables_are_transformers_own(rope):
    fields = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 1024, "rope_parameters": rope}
    cos, sin = rope_tables({"text_config": {"model_type": "llama", **fields}}, 300)
    wanted = LlamaRotaryEmbedding(LlamaConfig(**fields))(torch.zeros(1), torch.arange(300)[None])
    np.testing.assert_array_equal(np.concatenate([cos, cos], 1), wanted[0][0].numpy())
    np.testing.assert_array_equal(np.concatenate([sin, sin], 1), wanted[1][0].numpy())


def test_old_configuration_keys_are_understood():
    old = rope_tables({"text_config": {"rope_theta": 500000.0, "rope_scaling": None}}, 50)
    new = rope_tables({"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}}, 50)
    np.testing.assert_array_equal(old[1], new[1])
    assert not np.array_equal(old[1], rope_tables({"text_config": {}}, 50)[1])


def test_refuses_a_table_that_depends_on_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(InputError, match="dynamic RoPE over 300"):
        rope_tables({"text_config": {"max_position_embeddings": 256, "rope_parameters": rope}}, 300)


def test_refuses_an_unknown_decoder():
    with pytest.raises(InputError, match="text_config"):
        rope_tables({"text_config": {"model_type": "no-such-decoder"}}, 8)


def spec_and_profile(sections=None):
    decoder = DecoderSpec(
        num_layers=1, hidden_size=16, intermediate_size=16, num_heads=1, num_kv_heads=1, head_dim=16, vocab_size=8,
        rms_norm_eps=1e-6, rope_sections=sections, max_positions=99,
    )  # fmt: skip
    profile = ShapeProfile(
        name="p", image_size=(56, 84), grid=(2, 3), prefix_tokens=2, image_tokens=6, text_tokens=3, new_tokens=2
    )
    return decoder, profile


def test_every_token_has_its_number_without_sections():
    decoder, profile = spec_and_profile()
    assert positions(decoder, profile).tolist() == [list(range(13))]
    tables = np.random.default_rng(0).standard_normal((2, 20, 8), dtype=np.float32)
    for own, table in zip(token_tables((tables[0], tables[1]), decoder, profile), tables, strict=True):
        np.testing.assert_array_equal(own, table[:13])


def test_sections_take_turns_over_the_three_positions():
    """The numbers are worked out by hand; tests/btp_export/families compares with transformers."""
    decoder, profile = spec_and_profile(sections=(2, 3, 3))
    after = [5, 6, 7, 8, 9]
    time, row, column = positions(decoder, profile)
    assert time.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, *after]
    assert row.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, *after]
    assert column.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, *after]
    places = np.arange(20)[:, None] * 100 + np.arange(8)[None]  # position and column, readable
    cos, sin = token_tables((places, -places), decoder, profile)
    assert cos[7].tolist() == [200, 201, 302, 303, 304, 405, 406, 407]
    assert np.array_equal(sin, -cos)


def test_sections_must_fill_half_of_the_head():
    with pytest.raises(ValueError, match="rope_sections"):
        spec_and_profile(sections=(2, 3, 4))
