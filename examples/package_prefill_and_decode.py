"""Export a Hugging Face model as two programs of one AOTInductor package, a sparse prefill and a decode step; run it.

Run: python examples/package_prefill_and_decode.py --model FOLDER_OR_GGUF --text FILE --output model.pt2

A program takes and returns tensors: the cache travels as keys and values, (layers, B, Hkv, S, D) each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.package import load_package, package_aoti
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache

from flexprefill_compile import export, export_report
from flexprefill_compile.models import load_model, read_tokens


class Prefill(nn.Module):
    """Tokens (B, S) to the logits of the last (B, vocabulary), keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefill a prompt."""
        output = self.model(input_ids, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], *stack(output.past_key_values)


class Decode(nn.Module):
    """A token (B, 1), keys and values to the logits (B, vocabulary), and one more of each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, layer)
        output = self.model(token, past_key_values=cache, use_cache=True)
        return output.logits[:, -1], *stack(output.past_key_values)


def stack(cache: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of a cache."""
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


def export_both(model: nn.Module, options: Mapping[str, Any], longest: int) -> dict[str, ExportedProgram]:
    """Export a prefill that runs sparse and a decode step, for all lengths from ``min_length`` to the longest.

    Args:
        model: A causal language model of transformers.
        options: Of the prefill; ``min_length`` is among them.
        longest: Prompt and answer, in tokens.
    """
    length = Dim("length", min=options["min_length"], max=longest)
    tokens = torch.zeros(1, options["min_length"] + 1, dtype=torch.int64)
    prefill = export(Prefill(model), tokens, options=options, dynamic_shapes=({1: length},))
    with torch.no_grad():
        _, keys, values = Prefill(model)(tokens)
        shapes = (None, {3: length}, {3: length})
        decode = export(Decode(model), tokens[:, :1], keys, values, dynamic_shapes=shapes)  # which leaves a step dense
    return {"prefill": prefill, "decode": decode}


def package(programs: Mapping[str, ExportedProgram], path: Path, **settings: Any) -> None:
    """Compile programs with AOTInductor and write one package.

    Args:
        programs: By name.
        path: Of the package, *.pt2.
        **settings: Of inductor.
    """
    files = {}
    for name, program in programs.items():
        args, kwargs = program.example_inputs
        with torch.no_grad():
            module = program.module(check_guards=False)
            files[name] = torch._inductor.aot_compile(
                module, args, kwargs, options={"aot_inductor.package": True} | settings
            )
    package_aoti(str(path), files)


def generate(path: Path, input_ids: Tensor, num_tokens: int) -> Tensor:
    """Continue a prompt greedily with the programs of a package.

    Args:
        path: Of the package.
        input_ids: (1, S) int64.
        num_tokens: How many to add.

    Returns:
        (1, num_tokens) int64.
    """
    prefill, decode = (load_package(str(path), name) for name in ("prefill", "decode"))
    logits, keys, values = prefill(input_ids)
    tokens = [logits.argmax(-1, keepdim=True)]
    for _ in range(num_tokens - 1):
        logits, keys, values = decode(tokens[-1], keys, values)
        tokens.append(logits.argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


def main() -> None:
    """Export, package, load and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or a GGUF file; SmolLM2 if left out")
    parser.add_argument("--text", type=Path, help="a file; a text of the package if left out")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--output", type=Path, default=Path("model.pt2"))
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, "cpu")
    input_ids, _ = read_tokens(tokenizer, arguments.text, max_tokens=arguments.tokens)
    programs = export_both(model, {"min_length": 1024, "min_budget": 512}, longest=8192)
    print(export_report(programs["prefill"]))
    package(programs, arguments.output)
    print(tokenizer.decode(generate(arguments.output, input_ids, num_tokens=32)[0]))


if __name__ == "__main__":
    main()
