"""Positions of a prompt with a picture, against numbers worked out by hand."""

import torch
from transformers import LlavaConfig, Qwen2_5_VLConfig

from calibrate.reference.positions import position_rule

WORD, PICTURE = 5, 9


def test_most_decoders_number_their_tokens() -> None:
    ids = torch.tensor([WORD, PICTURE, PICTURE, WORD])
    assert position_rule(LlavaConfig(), PICTURE)(ids, 2, (1, 2)).tolist() == [0, 1, 2, 3, 4, 5]


def test_m_rope() -> None:
    """Two words, a picture of 2 x 3 tokens, two words, and two generated tokens of which none is a picture."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 16}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2})
    ids = torch.tensor([WORD, WORD, *[PICTURE] * 6, WORD, WORD])
    after = [5, 6, 7, 8]  # 2 + the longer side of the picture
    assert position_rule(config, PICTURE)(ids, 2, (2, 3)).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, *after],
        [0, 1, 2, 2, 2, 3, 3, 3, *after],
        [0, 1, 2, 3, 4, 2, 3, 4, *after],
    ]
