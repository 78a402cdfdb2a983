"""What ranks run in the tests of many GPUs: functions of a process group, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.parallel import take_stretch

from .models import TwoLayers

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 64}


def stretch_of(x: Tensor) -> Tensor:
    return take_stretch(x, dist.group.WORLD)


def prefill_layers(length: int, gamma: float, dynamic: bool | None) -> tuple[int, float]:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    x = torch.randn(1, length, 64)
    options = OPTIONS | {"gamma": gamma}
    expected = torch.compile(model, backend=FlexPrefillBackend(), options=options, dynamic=dynamic)(x)
    torch.compiler.reset()
    backend = FlexPrefillBackend()
    spread = torch.compile(model, backend=backend, options=options | {"sequence_parallel": dist.group.WORLD}, dynamic=dynamic)
    actual = spread(stretch_of(x))
    error = (actual - stretch_of(expected)).abs().max().item()
    return backend.report.num_rewritten, error


def create_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, eos_token_id=None, **sizes)).eval()


def prefill_llama(kind: str, gamma: float, dynamic: bool) -> Any:
    from transformers import DynamicCache  # noqa: PLC0415

    model = create_llama()
    length = 384
    tokens = torch.randint(1, 128, (2 if kind == "padding" else 1, length))
    positions = torch.arange(length).expand(tokens.shape)
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
    if kind == "padding":
        padding = torch.ones_like(tokens)
        padding[0, :100] = 0
        inputs["attention_mask"] = padding
        inputs["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    if kind == "packing":
        inputs["position_ids"] = torch.cat([torch.arange(150), torch.arange(length - 150)])[None]

    def call(inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | ({"past_key_values": DynamicCache()} if kind != "packing" else {"use_cache": False})

    options = OPTIONS | {"gamma": gamma}
    expected = torch.compile(model, backend=FlexPrefillBackend(), options=options, dynamic=dynamic)(**call(inputs))
    torch.compiler.reset()
    backend = FlexPrefillBackend()
    spread = torch.compile(model, backend=backend, options=options | {"sequence_parallel": dist.group.WORLD}, dynamic=dynamic)
    actual = spread(**call({name: stretch_of(x) for name, x in inputs.items()}))
    difference = (actual.logits - stretch_of(expected.logits)).abs()
    if kind == "padding":
        difference = difference * stretch_of(inputs["attention_mask"])[..., None]
    return backend.report.num_rewritten, str(backend.report), difference.max().item()


def prefill_tensor_parallel(folder: str, gamma: float, kv: int) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.distributed import DistributedConfig  # noqa: PLC0415

    size = dist.get_world_size()
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    sharded = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", distributed_config=DistributedConfig(tp_size=size)
    ).eval()
    tokens = torch.randint(1, 128, (1, 320))
    options = OPTIONS | {"gamma": gamma}
    expected = torch.compile(whole, backend=FlexPrefillBackend(), options=options)(tokens).logits
    torch.compiler.reset()
    backend = FlexPrefillBackend()
    actual = torch.compile(sharded, backend=backend, options=options | {"tensor_parallel": dist.group.WORLD})(tokens).logits
    return backend.report.num_rewritten, str(backend.report), (actual - expected).abs().max().item()
