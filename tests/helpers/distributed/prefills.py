"""Prefills that ranks run, and compare with one process: functions for ``RankPool.run``, on CPU tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import masked_prefill, prefill
from flexprefill_compile.block_masks.layout import unpack_blocks
from flexprefill_compile.parallel import broadcast_last, gather_cache, take_stretch

from ..checked_attention import without_code_generation
from ..models import TwoLayers

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 64}
LENGTH, CHUNK = 384, 160
VOCABULARY = 128


@contextlib.contextmanager
def recorded_blocks() -> Iterator[list[Tensor]]:
    """Collect the blocks of every selection made meanwhile, (B, H, num_q_blocks, num_k_blocks) bool each."""
    blocks: list[Tensor] = []

    def record(tables: Any, *_: Any) -> None:
        partial, full = (
            unpack_blocks(counts, indices, indices.shape[-1])
            for counts, indices in ((tables[0], tables[1]), (tables[2], tables[3]))
        )
        blocks.append(partial | full)

    with mock.patch.object(prefill, "record", record), mock.patch.object(masked_prefill, "record", record):
        yield blocks


def compile_and_run(
    model: Callable[..., Any], options: dict[str, Any], *, has_code: bool = False, **settings: Any
) -> Callable[..., Any]:
    """Return a function that compiles and calls the model, and returns its output, its blocks and its report.

    Args:
        model: What to compile.
        options: Of the backend, beside ``OPTIONS``.
        has_code: Whether inductor generates code; else the rewritten graph runs as it is, its tables checked.
        **settings: Of ``torch.compile``.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor], Any]:
        torch.compiler.reset()
        backend = FlexPrefillBackend()
        with recorded_blocks() as blocks, nullcontext() if has_code else without_code_generation(is_dense=False):
            output = torch.compile(model, backend=backend, options=OPTIONS | options, **settings)(*args, **kwargs)
        return output, blocks, backend.report

    return run


def on_first_rank(run: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0 computes as a process of its own."""
    results = [run() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(results)
    return results[0]


def gather_heads(blocks: list[Tensor], group: Any = None) -> list[Tensor]:
    """Join the selections of all ranks along the heads."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, blocks, group)
    return [torch.cat(parts, dim=1) for parts in zip(*gathered, strict=True)]


def compare(actual: Tensor, expected: Tensor, blocks: list[Tensor], expected_blocks: list[Tensor]) -> dict[str, Any]:
    """Return what a test asserts of a prefill on ranks; its density is that of the blocks that a causal mask allows."""
    same = len(blocks) == len(expected_blocks) and all(map(torch.equal, blocks, expected_blocks))
    causal = [torch.ones_like(own).tril(own.shape[-1] - own.shape[-2]) for own in blocks]
    density = sum(int(own.sum()) for own in blocks) / sum(int(own.sum()) for own in causal) if blocks else 1.0
    return {"error": (actual - expected).abs().max().item(), "same_blocks": same, "density": density}


def spread_layers(gamma: Any, dynamic: bool) -> dict[str, Any]:
    """Prefill two layers of 4 query and 2 key heads."""
    world = dist.group.WORLD
    model, x = TwoLayers().eval(), torch.randn(1, LENGTH, 64)
    options = {"gamma": gamma}
    settings = {"has_code": True, "dynamic": dynamic}
    expected, expected_blocks = on_first_rank(lambda: compile_and_run(model, options, **settings)(x)[:2])
    run = compile_and_run(model, options | {"sequence_parallel": world}, **settings)
    actual, blocks, report = run(take_stretch(x, world))
    result = compare(actual, take_stretch(expected, world), gather_heads(blocks), expected_blocks)
    return result | {"rewritten": report.num_rewritten, "keys": report.sites[0].shapes.key}


def create_llama(kv_heads: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


def create_prompt(kind: str) -> dict[str, Tensor]:
    """Return the inputs of a whole prompt: "causal", "padding" on the left of one of two prompts, or "packing"."""
    tokens = torch.randint(1, VOCABULARY, (2 if kind == "padding" else 1, LENGTH))
    inputs = {"input_ids": tokens, "position_ids": torch.arange(LENGTH).expand(tokens.shape)}
    if kind == "padding":
        padding = torch.ones_like(tokens)
        padding[0, :100] = 0
        inputs |= {"attention_mask": padding, "position_ids": (padding.cumsum(-1) - 1).clamp(min=0)}
    if kind == "packing":
        inputs["position_ids"] = torch.cat([torch.arange(150), torch.arange(LENGTH - 150)])[None]
    return inputs


def cut_chunk(inputs: dict[str, Tensor], start: int, stop: int, group: Any = None) -> dict[str, Tensor]:
    """Return the inputs of a chunk, or of this rank's stretch of it; a padding mask covers the earlier chunks too."""
    chunk = {name: x[:, start:stop] for name, x in inputs.items()}
    if group is not None:
        chunk = {name: take_stretch(x, group) for name, x in chunk.items()}
    if "attention_mask" in chunk:
        chunk["attention_mask"] = torch.cat([inputs["attention_mask"][:, :start], chunk["attention_mask"]], 1)
    return chunk


def spread_llama(kind: str, dynamic: bool) -> dict[str, Any]:
    """Prefill a Hugging Face model in two chunks, gather its cache, and decode a token on every rank."""
    from transformers import DynamicCache  # noqa: PLC0415

    world, model, inputs = dist.group.WORLD, create_llama(), create_prompt(kind)
    # With a cache transformers looks for no packed sequences in the positions. Without one there are no chunks.
    has_cache = kind != "packing"
    ends = (0, CHUNK, LENGTH) if has_cache else (0, LENGTH)

    def run_chunks(group: Any) -> tuple[list[Tensor], list[Tensor], Tensor | None, int]:
        cache = DynamicCache() if has_cache else None
        run = compile_and_run(model, {"gamma": 0.7, "sequence_parallel": group}, dynamic=dynamic)
        logits, blocks, num_rewritten = [], [], 0
        for start, stop in itertools.pairwise(ends):
            chunk = cut_chunk(inputs, start, stop, group)
            output, own, report = run(**chunk, past_key_values=cache, use_cache=has_cache)
            logits.append(output.logits)
            blocks += own
            num_rewritten += report.num_rewritten
            if group is not None and has_cache:
                gather_cache(cache, group, past=start)
        last = logits[-1][:, -1:] if group is None else broadcast_last(logits[-1], group)
        return logits, blocks, decode(model, last, cache, inputs), num_rewritten

    expected, expected_blocks, expected_decoded = on_first_rank(lambda: run_chunks(None)[:3])
    logits, blocks, decoded, num_rewritten = run_chunks(world)
    is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None]
    pairs = [
        (own * take_stretch(seen, world), take_stretch(whole * seen, world))
        for own, whole, seen in zip(logits, expected, is_token.tensor_split(ends[1:-1], 1), strict=True)
    ]
    actual, whole = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    result = compare(actual, whole, gather_heads(blocks), expected_blocks)
    decode_error = 0.0 if decoded is None else (decoded - expected_decoded).abs().max().item()
    return result | {"rewritten": num_rewritten, "decode_error": decode_error}


def decode(model: Any, logits: Tensor, cache: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return the logits of one more token."""
    if cache is None:
        return None
    mask = inputs.get("attention_mask")
    longer = {} if mask is None else {"attention_mask": F.pad(mask, (0, 1), value=1)}
    positions = inputs["position_ids"][:, -1:] + 1
    output = model(logits.argmax(-1), past_key_values=cache, position_ids=positions, **longer)
    return output.logits  # type: ignore[no-any-return]


def shard_transformers(folder: str, options: dict[str, Any], has_code: bool) -> dict[str, Any]:
    """Prefill a model that transformers shards over all ranks."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.distributed import DistributedConfig  # noqa: PLC0415

    world, tokens = dist.group.WORLD, create_prompt("causal")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    run = compile_and_run(whole, options, has_code=has_code)
    expected, expected_blocks = on_first_rank(lambda: _logits(run(tokens)))
    sharding = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", distributed_config=sharding).eval()
    run = compile_and_run(model, options | {"tensor_parallel": world}, has_code=has_code)
    output, blocks, report = run(tokens)
    result = compare(output.logits, expected, gather_heads(blocks), expected_blocks)
    return result | {"rewritten": [site.rewritten for site in report.sites]}


def shard_and_spread(options: dict[str, Any]) -> dict[str, Any]:
    """Prefill on a mesh of 2 x 2: the heads of a layer over one dimension, the prompt over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp"))
    model, inputs = create_llama(), create_prompt("causal")
    expected, expected_blocks = on_first_rank(
        lambda: _logits(compile_and_run(model, options)(**inputs, use_cache=False))
    )
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
    both = {"tensor_parallel": mesh["tp"], "sequence_parallel": (mesh, "sp")}
    stretch = {name: take_stretch(x, mesh["sp"]) for name, x in inputs.items()}
    output, blocks, report = compile_and_run(model, options | both)(**stretch, use_cache=False)
    result = compare(output.logits, take_stretch(expected, mesh["sp"]), gather_heads(blocks), expected_blocks)
    return result | {"rewritten": report.num_rewritten}


def _logits(result: tuple[Any, list[Tensor], Any]) -> tuple[Tensor, list[Tensor]]:
    return result[0].logits, result[1]
