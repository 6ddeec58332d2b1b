import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphs.errors import InputError
from graphs.rope import rope_tables


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
