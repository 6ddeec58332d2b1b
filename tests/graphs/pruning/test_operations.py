"""FLOP counts against what torch counts while it runs the same layers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.pruning import operations
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

SPEC = DecoderSpec(
    num_layers=4, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=50,
    rms_norm_eps=1e-6, max_positions=256,
)  # fmt: skip
PROFILE = ShapeProfile(
    name="p", image_size=(24, 24), grid=(6, 6), prefix_tokens=4, image_tokens=36, text_tokens=10, new_tokens=6
)
STAGES = (
    Stage(layer=1, keep=18, attention_quota=6, pool=10, boundary=18, diversity_quota=6),
    Stage(layer=2, keep=6, attention_quota=6, pool=6, boundary=6),
    Stage(layer=3, keep=0),
)
PLAN = PruningPlan(model_type="llava", num_layers=4, image_tokens=36, grid=(6, 6), stages=STAGES)


def counted(layers: int, tokens: int) -> int:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=50, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.zeros(1, tokens, 64), logits_to_keep=1, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_layers_and_head_are_what_torch_counts(tokens: int) -> None:
    assert operations.layer(SPEC, tokens) == counted(2, tokens) - counted(1, tokens)
    unpruned = PLAN.model_copy(update={"stages": (), "image_tokens": tokens})
    profile = PROFILE.model_copy(update={"prefix_tokens": 0, "image_tokens": tokens, "text_tokens": 0})
    assert operations.cost(SPEC, unpruned, profile).decoder == counted(4, tokens)


def test_what_is_needed_stops_at_the_diagonal() -> None:
    built = operations.cost(SPEC, PLAN, PROFILE.model_copy(update={"batch": 2}), "float16")
    above = [sum(1 for row in range(n) for column in range(n) if column > row) for n in (50, 32, 20, 14)]
    products = 2 * 2 * 16 * 4  # of scores and of weighted values, multiplied and added, in all heads
    assert built.decoder - built.needed == 2 * products * sum(above)


def test_segments_selection_and_caches_add_up() -> None:
    built = operations.cost(SPEC, PLAN, PROFILE, "float16")
    assert built.segments == tuple(operations.layer(SPEC, tokens) for tokens in (50, 32, 20, 14))
    assert built.selection == (2 * 36 * 36 * 64 + 2 * 50 * 64, 2 * 32 * 64, 0)
    assert built.head == 2 * 64 * 50
    assert (
        built.prefill == sum(built.segments) + sum(built.selection) + built.head == built.decoder + sum(built.selection)
    )
    rows = sum(tokens + 6 for tokens in (50, 32, 20, 14))
    assert built.cache_bytes == rows * 2 * 2 * 16 * 2
    wide = operations.cost(SPEC, PLAN, PROFILE.model_copy(update={"batch": 3}), "float32")
    assert wide.cache_bytes == 6 * built.cache_bytes
    assert (wide.prefill, wide.decode) == (3 * built.prefill, 3 * built.decode)


def test_rules_that_look_elsewhere() -> None:
    text = operations.selection(SPEC, PLAN.model_copy(update={"importance": "mean-text"}), 1, PROFILE)
    assert text == 10 * 2 * 32 * 64
    assert operations.selection(SPEC, PLAN.model_copy(update={"importance": "random"}), 1, PROFILE) == 0
    pivots = PLAN.model_copy(update={"importance": "pivot-distance", "stages": STAGES[1:2]})
    assert operations.selection(SPEC, pivots, 0, PROFILE) == 2 * 6 * 36 * 64
