"""What the benchmarks attend over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import causal_attention
from torch import Tensor

from flexprefill_compile.bench.inputs.kinds import create_inputs
from flexprefill_compile.bench.inputs.rotary import create_rotary_inputs
from flexprefill_compile.bench.inputs.saved import load_inputs
from flexprefill_compile.errors import UsageError


def test_rotary_heads_look_where_they_should() -> None:
    query, key, _ = create_rotary_inputs(5, 1, 1536, 64, "cpu", torch.float32)
    weights = (query[0, :, -1:] @ key[0].mT / 8).softmax(-1).squeeze(1)
    sink, _, topic, window, diagonal = weights
    assert sink.argmax() == 0
    assert topic[-512:].sum() > 0.9
    assert window[-128:].sum() > 0.7
    assert abs(int(diagonal.argmax()) - (1535 - 512)) <= 1


def test_real_inputs_are_what_a_layer_attends_over(tmp_path: Path) -> None:
    query, key, value = create_inputs("real", (1, 1), 200, 1, "cpu", torch.float32, None)
    assert query.shape == (1, 9, 200, 64)
    assert key.shape == value.shape == (1, 3, 200, 64)
    # A trained head's attention is no noise: the first key, its sink, draws more than its share.
    attended: Tensor = (query[0] @ key[0].repeat_interleave(3, 0).mT / 8)[:, -1].softmax(-1)
    assert attended[:, 0].mean() > 0.1
    assert causal_attention(query, key, value).isfinite().all()


@pytest.mark.parametrize("heads", [(4, 3, 3), (4, 2, 4)])
def test_saved_inputs_must_fit(tmp_path: Path, heads: tuple[int, int, int]) -> None:
    path = tmp_path / "inputs.pt"
    with pytest.raises(UsageError, match="must hold query, key and value: FileNotFoundError"):
        load_inputs(path, 8, "cpu", torch.float32)
    torch.save(tuple(torch.randn(1, count, 8, 16) for count in heads), path)
    with pytest.raises(UsageError, match=r"must hold \(1, H, S, D\) and twice \(1, Hkv, S, D\), got"):
        load_inputs(path, 8, "cpu", torch.float32)
