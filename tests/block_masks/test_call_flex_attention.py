"""A BlockMask of selected blocks in the caller's own ``flex_attention``: compiled it holds, uncompiled it warns."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.inputs import random_qk
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexprefill_compile import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.block_masks import create_prefill_block_mask


def test_compiled_flex_attention_takes_the_selection_and_uncompiled_warns() -> None:
    query, key = (x.float() for x in random_qk(0, 1, 2, 1, 300, 16))
    value = torch.randn_like(key)
    mask = create_prefill_block_mask(query, key, SparsePrefillConfig(block_size=32, min_budget=0, gamma=0.3))
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparse = torch.compile(flex_attention)(query, key, value, block_mask=mask, enable_gqa=True)
    assert not [warning for warning in caught if "not compiled" in str(warning.message)]
    visible = mask.to_dense().bool().repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :300, :300].tril()
    exact = scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    assert (sparse - exact).abs().max() < 1e-5
    assert (sparse - dense).abs().max() > 0.01
    with pytest.warns(UserWarning, match="it ignores the selected blocks and computes dense causal attention"):
        uncompiled = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    assert (uncompiled - dense).abs().max() < 1e-5


def test_a_dict_as_config_is_refused() -> None:
    query, key = random_qk(0, 1, 2, 1, 100, 16)
    with pytest.raises(InvalidOptionError, match=r"^config must be a SparsePrefillConfig, .* got \{'gamma': 0.9\}$"):
        create_prefill_block_mask(query, key, {"gamma": 0.9})  # type: ignore[arg-type]
