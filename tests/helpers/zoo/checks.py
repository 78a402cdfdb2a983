"""What each family of the zoo has to do right, compiled against uncompiled, and the count of what was rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.report import Site
from helpers.models import OPTIONS, relative_error

# gamma = 1 computes every pair that the masks allow, so only rounding differs: each sum of up to 220 float32 terms is
# off by about 220 ** 0.5 * 6e-8 = 1e-6, and a few layers at peaked attention make of it ten times that. A key too many
# or too few shows at 1e-3 and more.
TOLERANCE = 1e-4
LENGTH, SHORT_LENGTH, CHUNK_LENGTH = 150, 101, 70  # no multiples of the block, and longer than the window
SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})


@dataclasses.dataclass
class Phase:
    """One way to call a model.

    Attributes:
        error: Relative error of the logits of real tokens against the uncompiled model.
        calls: Attention calls of the uncompiled model.
        sites: What the compiler's report says of the compiled one.
        graph_breaks: How often dynamo gave up on a whole graph.
    """

    error: float
    calls: int
    sites: tuple[Site, ...]
    graph_breaks: int = 0

    @property
    def rewritten(self) -> int:
        """How many calls run sparse."""
        return sum(site.rewritten for site in self.sites)

    @property
    def reasons(self) -> list[str]:
        """Why the other calls stayed dense, each reason once."""
        reasons = [site.reason.value for site in self.sites if site.reason is not None]
        unseen = ["not recognised as attention"] if len(self.sites) < self.calls else []
        return list(dict.fromkeys(reasons + unseen))


class AttentionCounter(TorchFunctionMode):
    """Count a model's attention calls as it runs uncompiled, fused or written out.

    Attributes:
        calls: Calls of SDPA, and of softmax over a row of at least as many scores as there are keys for each query.
    """

    def __init__(self, query_length: int, key_length: int) -> None:
        super().__init__()
        self.lengths = query_length, key_length
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.calls += 1
        elif func in SOFTMAX and result.dim() >= 3:
            # at least: sinks are one more key, and a window's cache holds fewer keys than there are tokens
            query_length, key_length = self.lengths
            self.calls += result.shape[-2] == query_length and min(key_length, query_length) <= result.shape[-1]
        return result


def check_family(model: Any, *, is_thorough: bool = True) -> dict[str, Phase]:
    """Compare a compiled model with the uncompiled one: prefill, padded batch, second chunk.

    Args:
        model: One of the zoo.
        is_thorough: Also decode and prefill without cache, and let dynamo make later lengths dynamic, as by default;
            else all lengths are static, which takes half the time.

    Raises:
        AssertionError: A result differs by more than rounding.
    """
    results: dict[str, Phase] = {}
    for check in (run_chunks, run_padded, run_uncached)[: 3 if is_thorough else 2]:
        torch.compiler.reset()
        counters.clear()
        results |= check(Comparison(model, is_thorough))
    for name, phase in results.items():
        assert phase.error < TOLERANCE, f"{name}: relative error {phase.error:.1e}"
    return results


def run_uncached(run: Comparison) -> dict[str, Phase]:
    """Compare a prefill without mask and without cache."""
    return {"prefill, no cache": run({"input_ids": _random_tokens(2, LENGTH), "use_cache": False})[0]}


def run_padded(run: Comparison) -> dict[str, Phase]:
    """Compare two prompts of unlike lengths, the shorter one padded at its end and then at its start."""
    tokens, mask = _random_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, SHORT_LENGTH:] = 0
    results = {}
    for name, padding in (("padded right", mask), ("padded left", mask.flip(-1))):
        inputs = {"input_ids": tokens * padding, "attention_mask": padding, "use_cache": True}
        results[name] = run(inputs, real=padding.bool())[0]
    return results


def run_chunks(run: Comparison) -> dict[str, Phase]:
    """Compare a prefill with cache, a second chunk of the prompt after it, and one step of decoding."""
    results: dict[str, Phase] = {}
    caches: list[Any] = [None, None]
    lengths = {"prefill": LENGTH, "second chunk": CHUNK_LENGTH} | ({"decode": 1} if run.is_thorough else {})
    for name, length in lengths.items():
        inputs = {"input_ids": _random_tokens(2, length), "use_cache": True}
        results[name], caches = run(inputs, caches)
    return results


class Comparison:
    """A model compiled once, and what each further call of it adds to the report."""

    def __init__(self, model: Any, is_thorough: bool = True) -> None:
        self.model = model
        self.is_thorough = is_thorough
        self.backend = FlexPrefillBackend()
        options = OPTIONS | {"gamma": 1.0}
        dynamic = None if is_thorough else False
        self.compiled = torch.compile(model, backend=self.backend, dynamic=dynamic, options=options)
        self.tokens_seen = 0

    def __call__(
        self, inputs: dict[str, Any], caches: list[Any] | None = None, real: Tensor | None = None
    ) -> tuple[Phase, list[Any]]:
        before, breaks_before = len(self.backend.report.sites), sum(counters["graph_break"].values())
        given = [{} if cache is None else {"past_key_values": cache} for cache in caches or (None, None)]
        query_length = inputs["input_ids"].shape[1]
        self.tokens_seen = query_length + (self.tokens_seen if given[0] else 0)
        with torch.no_grad(), AttentionCounter(query_length, self.tokens_seen) as counter:
            expected = self.model(**inputs, **given[0])
        with torch.no_grad():
            actual = self.compiled(**inputs, **given[1])
        logits = [output.logits if real is None else output.logits[real] for output in (actual, expected)]
        phase = Phase(
            relative_error(logits[0], logits[1].double()),
            counter.calls,
            self.backend.report.sites[before:],
            sum(counters["graph_break"].values()) - breaks_before,
        )
        return phase, [getattr(output, "past_key_values", None) for output in (expected, actual)]


def _random_tokens(batch: int, length: int) -> Tensor:
    """Return (batch, length) tokens of the zoo's vocabulary, none of them special; the same ones each time."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))
