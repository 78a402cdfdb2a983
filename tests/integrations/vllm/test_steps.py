"""Steps over a paged cache, without vLLM: dense attention at gamma 1, and below it the compiled call's blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.models import relative_error
from helpers.serving.paged_engine import LAYOUTS
from helpers.serving.sparse_engine import DENSE, OPTIONS, build, run
from torch import Tensor

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import masked_prefill, prefill

# At gamma 1 it is dense attention


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_steps_are_dense_attention(layout: str) -> None:
    engine = build(DENSE, layout)
    old, long, short, cached = engine.add(40), engine.add(200), engine.add(50), engine.add(170)
    with without_code_generation():
        run(engine, [(old, 40), (cached, 64)])  # below min_length: all vLLM's
        run(engine, [(old, 1), (long, 131), (short, 50), (cached, 106)], padding=2)
        run(engine, [(short, 1), (long, 69), (old, 1)])
        run(engine, [(long, 1), (cached, 1)])
    assert engine.impl.seen == [104, 51, 2, 2]  # each sparse token was left out there
    assert engine.builder.fast_builds == 2


def test_a_step_of_one_prompt_needs_nothing_of_vllm() -> None:
    engine = build(DENSE)
    with without_code_generation():
        run(engine, [(engine.add(200), 200)])
    assert engine.impl.seen == []


def test_chunks_are_the_whole_prompt() -> None:
    engine = build(DENSE)
    request = engine.add(300)
    with without_code_generation():
        parts = [run(engine, [(request, count)])[0] for count in (97, 33, 100, 70)]
    whole = engine.expect(request, 0, 300)
    assert relative_error(torch.cat(parts), whole.double()) < 1e-5
    assert engine.impl.seen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": (99, 0)},
        {"sliding_window": (249, 0)},
        {"logits_soft_cap": 2.0},
        {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0])},
        {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0]), "sliding_window": (99, 0)},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
    ],
)
def test_forms_of_attention(changes: dict[str, Any]) -> None:
    engine = build(DENSE, **changes)
    request, other = engine.add(300), engine.add(110)
    with without_code_generation():
        run(engine, [(request, 130)])
        run(engine, [(request, 170), (other, 110)])
    assert engine.impl.seen == [], "it was left to vLLM"


def test_pages_before_a_window_are_not_read() -> None:
    engine = build(DENSE, sliding_window=(99, 0))
    request = engine.add(300)
    with without_code_generation():
        run(engine, [(request, 200)])
        before = request.pages[: (200 - 99) // 16].long()
        request.pages[: len(before)] = engine.free[-1]  # vLLM frees them; nothing was ever written there
        run(engine, [(request, 100)])
    assert engine.impl.seen == []


def test_a_layer_without_keys_of_its_own() -> None:
    engine = build(DENSE, kv_sharing_target_layer_name="model.layers.2.self_attn.attn")
    request, old = engine.add(200), engine.add(20)
    with without_code_generation():
        run(engine, [(request, 200), (old, 20)], has_keys=False)
    assert engine.impl.seen == [20]


# Below it, the blocks are those of the compiled model


def record_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    tables: list[tuple[Tensor, ...]] = []
    for module in (prefill, masked_prefill):
        monkeypatch.setattr(module, "record", lambda selected, *_: tables.append(tuple(selected)))
    return tables


@pytest.mark.parametrize("first", [384, 200])
def test_the_blocks_are_those_of_the_compiled_call(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"gamma": 0.6}
    tables = record_tables(monkeypatch)
    engine = build(options)
    request = engine.add(384)
    with without_code_generation(is_dense=False), torch.no_grad():
        outputs = [engine.step([(request, n)])[0] for n in (first, 384 - first) if n]
        of_steps = list(tables)
        tables.clear()

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
            )

        expected = []
        for begin, end in [(0, first), (first, 384)][: len(outputs)]:
            mask = None if begin == 0 else torch.ones(end, end, dtype=torch.bool).tril()[begin:]
            stretch = slice(begin, end)
            tensors = (request.query[stretch], request.key[:end], request.value[:end])
            batch = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in tensors]
            compiled = torch.compile(attend, backend=FlexPrefillBackend(), options=options)
            expected.append(compiled(*batch, mask)[0].transpose(0, 1))
    assert len(of_steps) == len(tables) == len(outputs)
    for own, other in zip(of_steps, tables, strict=True):
        assert all(map(torch.equal, own, other))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    blocks = -(-first // 32)
    assert (of_steps[0][0] + of_steps[0][2]).sum() < 4 * blocks * (blocks + 1) // 2, "nothing was left out"


def test_all_lengths_share_one_compilation() -> None:
    engine = build(DENSE)
    for length in (130, 200, 131, 333):
        run(engine, [(engine.add(length, 0), length)])
    assert engine.impl.seen == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_all_chunks_share_one_compilation() -> None:
    engine = build(DENSE)
    with without_code_generation():
        for first, second, third in ((40, 128, 33), (70, 33, 97), (32, 101, 64), (50, 64, 64)):
            request = engine.add(300)
            run(engine, [(request, first)])
            run(engine, [(request, second)])
            run(engine, [(request, third), (engine.add(20), 20)])
    assert engine.impl.seen == [40, 20, 70, 20, 32, 20, 50, 20]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
