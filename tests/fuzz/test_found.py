"""What the campaign found, in the smallest form, and the right value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.checked_attention import check_tables, find_allowed, without_code_generation
from helpers.models import relative_error
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks.observed_attention import observe_attention
from flexprefill_compile.quality.audit.attention_call import CallMeasurement, measure_call
from flexprefill_compile.report import SkipReason

START, LENGTH = 20, 40
OPTIONS: dict[str, Any] = {"block_size": 16, "min_length": 1, "min_budget": 0, "tau": 0.0}


def qkv(num_queries: int = LENGTH, num_keys: int = LENGTH, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, 2, length, 16) for length in (num_queries, num_keys, num_keys)]


def by_key_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The bias has neither batch nor query: as a formula it has fewer dimensions than the scores."""
    mask = torch.where(torch.ones(query.shape[2], key.shape[2]).tril() == 1, 0.0, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask + bias[:, None, None, :])


def by_packed_chunk(query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
    """Documents are told apart in a chunk, whose queries are fewer than its keys."""
    row, column = torch.arange(START, START + query.shape[2])[:, None], torch.arange(key.shape[2])
    same = ids[:, None, START : START + query.shape[2], None] == ids[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(column <= row) & same)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@torch.no_grad()
def test_a_bias_without_a_batch_and_documents_in_a_chunk_run_sparse(gamma: float, dynamic: bool) -> None:
    ids = (torch.arange(START + LENGTH) // 25).expand(1, -1)
    for attend, inputs in (
        (by_key_bias, [*qkv(), torch.randn(1, LENGTH)]),
        (by_packed_chunk, [*qkv(LENGTH, START + LENGTH), ids]),
    ):
        backend = FlexPrefillBackend()
        compiled = torch.compile(attend, backend=backend, dynamic=dynamic, options=OPTIONS | {"gamma": gamma})
        with without_code_generation(is_dense=gamma == 1):
            actual = compiled(*inputs)
        assert backend.report.num_rewritten == 1
        assert gamma < 1 or relative_error(actual, attend(*inputs).double()) < 1e-6


@torch.no_grad()
def test_a_bias_of_positions_in_float64_is_generated_right() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        row = torch.arange(query.shape[2]).double()[:, None]
        column = torch.arange(key.shape[2])
        mask = torch.where(column <= row, 0.0, -torch.inf) + slopes[:, None, None] * (column - row)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))

    inputs = [*qkv(), torch.tensor([0.5, 0.25])]
    backend = FlexPrefillBackend()
    actual = torch.compile(attend, backend=backend, options=OPTIONS | {"gamma": 1.0})(*inputs)
    assert backend.report.num_rewritten == 1
    assert relative_error(actual, attend(*inputs).double()) < 1e-5


@torch.no_grad()
def test_queries_behind_the_last_key_are_no_chunk() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        row, column = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=column <= row + 3)

    for num_keys, is_chunk in ((LENGTH, False), (LENGTH + 2, False), (LENGTH + 3, True)):
        backend = FlexPrefillBackend()
        compiled = torch.compile(attend, backend=backend, dynamic=False, options=OPTIONS)
        with without_code_generation(is_dense=False):
            compiled(*qkv(LENGTH, num_keys))
        assert backend.report.sites[0].reason is (None if is_chunk else SkipReason.NOT_CAUSAL)


@torch.no_grad()
def test_a_chunk_under_a_given_mask_reaches_gamma_though_keys_follow_that_no_query_sees() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, buffer: Tensor) -> Tensor:
        row, column = torch.arange(START, START + query.shape[2])[:, None], torch.arange(key.shape[2])
        mask = buffer[START : START + query.shape[2], : key.shape[2]] & (column > row - 16)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)

    query, key, value = qkv(LENGTH, START + LENGTH + 16)
    buffer = torch.ones(96, 96, dtype=torch.bool).tril()
    visible = (buffer & ~buffer.tril(-16))[START : START + LENGTH, : key.shape[2]]
    computed: list[Tensor] = []

    def record(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, None, None]:
        computed.append(check_tables(find_allowed(query, key, others[2], others[6]), others[2], is_dense=False))
        return query, None, None

    options = OPTIONS | {"gamma": 0.8}
    with without_code_generation(attend=record):
        torch.compile(attend, backend=FlexPrefillBackend(), options=options)(query, key, value, buffer)
    weights = (0.5 * query @ key.mT).masked_fill(~visible, -torch.inf).softmax(-1)
    shares = (weights * computed[0])[:, :, -16:].sum(-1).mean(-1)
    assert (shares >= 0.8).all()


@torch.no_grad()
def test_a_prompt_padded_on_both_sides_under_a_given_mask_selects_alone_what_it_selects_in_a_batch() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, buffer: Tensor, first: Tensor, last: Tensor) -> Tensor:
        column = torch.arange(key.shape[2])
        is_token = (column >= first[:, None, None, None]) & (column <= last[:, None, None, None])
        mask = buffer[START : START + query.shape[2], : key.shape[2]] & is_token
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    query, key, value = (x.repeat(2, 1, 1, 1) for x in qkv(LENGTH, START + LENGTH))
    first, last = torch.tensor([START + 6, 0]), torch.tensor([START + LENGTH - 12, START + LENGTH])
    buffer = torch.ones(START + LENGTH, START + LENGTH, dtype=torch.bool).tril()
    computed: list[Tensor] = []

    def record(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, None, None]:
        computed.append(check_tables(find_allowed(query, key, others[2], others[6]), others[2], is_dense=False))
        return query, None, None

    for rows in (slice(None), slice(1)):
        with without_code_generation(attend=record):
            compiled = torch.compile(attend, backend=FlexPrefillBackend(), dynamic=False, options=OPTIONS)
            compiled(query[rows], key[rows], value[rows], buffer, first[rows], last[rows])
    assert torch.equal(computed[0][0], computed[1][0])


@pytest.mark.parametrize("offset", [-3, START, START + 9, 10_000])
@torch.no_grad()
def test_an_offset_that_is_data_may_be_any(offset: int) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
        row, column = torch.arange(query.shape[2])[:, None] + offset, torch.arange(key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=column <= row)

    inputs = [*qkv(LENGTH, START + LENGTH), torch.tensor(offset)]
    for gamma in (0.5, 1.0):
        backend = FlexPrefillBackend()
        with without_code_generation(is_dense=gamma == 1):
            actual = torch.compile(attend, backend=backend, options=OPTIONS | {"gamma": gamma})(*inputs)
        assert backend.report.num_rewritten == 1
    assert relative_error(actual[:, :, 3:], attend(*inputs)[:, :, 3:].double()) < 1e-6


def by_merged_heads(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Key heads are repeated, heads merged into the batch; the bias has neither batch nor head nor query."""
    batch, heads, length, width = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    scores = torch.bmm(query, key.mT).view(batch, heads, length, length) * 0.25 + bias
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1).view(batch * heads, length, length)
    return torch.bmm(weights, value).view(batch, heads, length, width)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("estimator", ["flexprefill", "pooled"])
@torch.no_grad()
def test_heads_merged_into_the_batch_are_observed(estimator: str, gamma: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 4 * LENGTH, 16) for heads in (4, 2, 2))
    inputs = [query, key, value, torch.randn(4 * LENGTH)]
    measured: list[CallMeasurement] = []
    backend = FlexPrefillBackend(observed_rows=8)
    options = OPTIONS | {"gamma": gamma, "estimator": estimator}
    compiled = torch.compile(by_merged_heads, backend=backend, options=options)
    with (
        without_code_generation(is_dense=gamma == 1),
        observe_attention(lambda call: measured.append(measure_call(call, 16))),
    ):
        actual = compiled(*inputs)
    assert backend.report.num_rewritten == len(measured) == 1
    is_exact = measured[0].recall > 0.9999
    assert is_exact.shape == (2, 4, 8)
    assert is_exact.all() == (gamma == 1)
    assert (measured[0].error < 1e-5).all() == (gamma == 1)
    assert gamma < 1 or relative_error(actual, by_merged_heads(*inputs).double()) < 1e-6
