"""Run the samples of the tasks on a model, prefilled dense and prefilled sparse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..errors import UsageError
from ..settings.config import SparsePrefillConfig
from ..torch_internals import maybe_mark_dynamic
from .comparison import Comparison
from .sample import ANSWER_ROOM, Sample
from .scoring import Score, count_text_tokens, score_sample

Step = Callable[[str], object]
Samples = Mapping[tuple[str, int], Sequence[Sample]]


def evaluate(
    model: Any, samples: Samples, configs: Mapping[str, SparsePrefillConfig], step: Step = lambda _: None
) -> list[Comparison]:
    """Score samples after dense prefill and after sparse prefill.

    Dense is the model as it is. Each config compiles it once for all lengths and tasks; compiled code of before is
    forgotten.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
        samples: By task and length.
        configs: What to select, by the name to print.
        step: Called before each sample with what is under way.

    Returns:
        A comparison for each task, length and config.

    Raises:
        UsageError: The model keeps no cache to decode from.
    """
    text_tokens = count_text_tokens(sample for group in samples.values() for sample in group)
    dense: dict[tuple[str, int], list[Score]] = {}
    for (task, length), group in samples.items():
        dense[task, length] = []
        for sample in group:
            step(f"dense: {task} at {length}")
            dense[task, length].append(score_sample(model, model, sample, text_tokens))
    comparisons = []
    lengths = {length for _, length in samples}
    for name, config in configs.items():
        prefill = CompiledPrefill(model, config, is_dynamic=len(lengths) > 1)
        for (task, length), group in samples.items():
            sparse, densities = [], []
            for sample in group:
                step(f"{name}: {task} at {length}" if prefill.is_compiled else f"{name}: compiling")
                sparse.append(score_sample(prefill, model, sample, text_tokens))
                densities.append(prefill.density)
            depths = [sample.depth for sample in group]
            comparisons.append(Comparison(task, length, name, depths, dense[task, length], sparse, densities))
    return comparisons


class CompiledPrefill:
    """A model compiled for sparse prefill, which notes what it computes.

    Attributes:
        density: Share of causal blocks computed in the last call, mean over attention calls and heads; a call that
            stayed dense counts as 1.
        backend: Its report tells of each attention call.
    """

    def __init__(self, model: Any, config: SparsePrefillConfig, *, is_dynamic: bool) -> None:
        """Forget compiled code, else torch's limit of compilations a model is soon reached, and prepare to compile.

        Args:
            model: A Hugging Face causal language model.
            config: What to select.
            is_dynamic: Whether prompts of several lengths will come: one graph then serves them all.
        """
        torch.compiler.reset()
        self.backend = FlexPrefillBackend()
        self.density = 1.0
        # With dynamic=True torch would make the scale of attention symbolic too, find that out, and trace all again.
        self._is_dynamic = is_dynamic
        dynamic = None if is_dynamic else False
        self._compiled: Callable[..., Any] = torch.compile(
            model, backend=self.backend, dynamic=dynamic, options=config.as_options()
        )

    @property
    def is_compiled(self) -> bool:
        """Whether a call has been compiled."""
        return bool(self.backend.report.sites)

    def __call__(self, prompt: Tensor, **kwargs: Any) -> Any:
        """Prefill (B, S) tokens as the model does."""
        if self._is_dynamic:
            maybe_mark_dynamic(prompt, 1)
        with record_densities() as densities:
            output = self._compiled(prompt, **kwargs)
        num_calls = len({site.name for site in self.backend.report.sites})
        if densities:
            sparse = torch.stack([density.mean() for density in densities]).sum().item()
            self.density = (sparse + num_calls - len(densities)) / num_calls
        else:
            self.density = 1.0
        return output


def check_lengths(lengths: Sequence[int], configs: Iterable[SparsePrefillConfig]) -> None:
    """Raise if a prompt would have less than two blocks.

    Raises:
        UsageError: It would.
    """
    block_size = max(config.block_size for config in configs)
    needed = 2 * block_size + ANSWER_ROOM
    for length in lengths:
        if length < needed:
            raise UsageError(
                f"length must be at least {needed} tokens, two blocks of {block_size} and {ANSWER_ROOM} for the answer,"
                f" got {length}"
            )


def check_model(model: Any, lengths: Sequence[int]) -> None:
    """Raise if a model can't be asked.

    Raises:
        UsageError: It is no causal language model, or was made for shorter texts.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and max(lengths) > longest:
        raise UsageError(f"length must be at most the {longest} tokens that the model takes, got {max(lengths)}")
