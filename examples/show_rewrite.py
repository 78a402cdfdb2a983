"""Print the graph of one attention layer before and after the pass: what docs/how-it-works.md shows.

Run: python examples/show_rewrite.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally, with four query heads to a key head."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def readable(graph_module: GraphModule) -> str:
    """Return a graph as code, without the notes on where a line comes from and what it frees."""
    lines = graph_module.print_readable(print_output=False).splitlines()
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    return re.sub(r";  [\w =]+ = None$", "", "\n".join(lines).strip(), flags=re.MULTILINE)


def graphs_before_and_after() -> tuple[str, str]:
    """Return the readable code of the dynamo graph of ``attend``, and of the same graph rewritten."""
    shown: list[str] = []

    def show(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        shown.append(readable(graph_module))
        SparsePrefillPass(SparsePrefillConfig(), failures={})(graph_module)
        shown.append(readable(graph_module))
        return graph_module.forward

    query, key, value = (torch.randn(1, heads, 4096, 64) for heads in (8, 2, 2))
    with torch.no_grad():
        torch.compile(attend, backend=show)(query, key, value)
    before, after = shown
    return before, after


if __name__ == "__main__":
    print(*graphs_before_and_after(), sep="\n\n")
