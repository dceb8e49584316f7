"""Masks reach each model in the form it understands, windows included."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, Qwen2Config

from redraft.models.masks import layer_masks, model_masks

POSITIONS = torch.arange(8)[None]
TINY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_without_windows_a_mask_stays_as_it_is():
    mask = torch.rand(1, 1, 8, 8) > 0.5
    assert layer_masks(LlamaConfig(), mask, POSITIONS, POSITIONS) is mask
    assert layer_masks(LlamaConfig(), None, POSITIONS, POSITIONS) is None


def test_a_window_wider_than_the_sequence_costs_nothing():
    config = Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert layer_masks(config, None, POSITIONS, POSITIONS) is None


def test_a_window_lies_over_its_own_layers_only():
    config = Qwen2Config(**TINY, use_sliding_window=True, sliding_window=2, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    masks = layer_masks(config, None, POSITIONS, POSITIONS)
    assert masks["full_attention"].all()
    distance = (POSITIONS[0][:, None] - POSITIONS[0][None]).abs()
    assert torch.equal(masks["sliding_attention"][0, 0], distance <= 2)


def test_a_query_block_over_cached_keys_is_windowed_by_position():
    config = Qwen2Config(**TINY, use_sliding_window=True, sliding_window=2, max_window_layers=1)
    masks = layer_masks(config, torch.ones(1, 1, 4, 8, dtype=torch.bool), POSITIONS[:, 4:], POSITIONS)
    assert masks["sliding_attention"][0, 0, 0].tolist() == [False, False, True, True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_gets_an_additive_mask(dtype):
    config = Gemma2Config(
        **TINY, num_key_value_heads=2, head_dim=16, sliding_window=64, pad_token_id=0, attn_implementation="eager"
    )
    model = Gemma2ForCausalLM(config).to(dtype)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    added = model_masks(model, mask, POSITIONS, POSITIONS)
    assert added.dtype == dtype
    assert torch.equal(added == 0, mask)
    assert added.min() == torch.finfo(dtype).min
    assert model_masks(model, None, POSITIONS, POSITIONS) is None
