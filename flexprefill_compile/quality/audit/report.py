"""What an audit found, as data: a table by ``str()``, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from ...text_table import format_table
from ..predictions import PredictionComparison
from .attention_call import BlockPicture

_WORST_HEADS = 8
_FIGURES = ("JS distance", "density", "recall", "p10", "worst row", "error")


@dataclasses.dataclass(frozen=True)
class HeadAudit:
    """One head of one attention call.

    Attributes:
        pattern: FlexPrefill's pattern, "query-aware", "vertical-slash", or "mixed" over prompts; else the estimator.
        distance: The Jensen-Shannon distance that decided, None where there is none.
        density: Share computed of the blocks that dense attention computes.
        recall_mean: Share of the attention that falls into the selected blocks, mean over the sampled rows.
        recall_p10: Its 10th percentile.
        recall_worst: Its least.
        error: |output - dense output| / |dense output| over the sampled rows.
    """

    pattern: str
    distance: float | None
    density: float
    recall_mean: float
    recall_p10: float
    recall_worst: float
    error: float


@dataclasses.dataclass(frozen=True)
class CallAudit:
    """One rewritten attention call.

    Attributes:
        name: Where it stands in the model.
        heads: Its query heads.
        shorter_prompts: Density of the prompt's first tokens as a prompt of their own, by their number.
    """

    name: str
    heads: tuple[HeadAudit, ...]
    shorter_prompts: dict[int, float]

    def mean(self, field: str) -> float:
        """Return the mean over heads of one of their numbers, NaN where there is none."""
        values = [value for head in self.heads if (value := getattr(head, field)) is not None]
        return statistics.fmean(values) if values else math.nan

    def worst(self, field: str) -> float:
        """Return the least over heads of one of their numbers."""
        return float(min(getattr(head, field) for head in self.heads))


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What one sparse prefill kept and lost; ``str()`` is a table.

    Attributes:
        num_tokens: Tokens a prompt.
        num_prompts: Prompts of the batch.
        num_rows: Query rows of each head on which recall and error are exact.
        options: What was given to ``torch.compile``; as text where it is no number, text or truth value.
        num_attention_calls: Of the model, rewritten or not.
        predictions: What became of the model's predictions.
        calls: The rewritten attention calls, in the order they ran.
        pictures: For each of them its head of least recall; not part of the JSON.
    """

    num_tokens: int
    num_prompts: int
    num_rows: int
    options: dict[str, Any]
    num_attention_calls: int
    predictions: PredictionComparison
    calls: tuple[CallAudit, ...]
    pictures: tuple[BlockPicture, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def mean(self, field: str) -> float:
        """Return the mean over calls and heads of one of the heads' numbers."""
        return statistics.fmean(call.mean(field) for call in self.calls)

    @property
    def shorter_prompts(self) -> dict[int, float]:
        """Mean density by prompt length, this prompt's own included; of the calls without a mask."""
        plain = [call for call in self.calls if call.shorter_prompts]
        lengths = sorted(plain[0].shorter_prompts) if plain else []
        means = {length: statistics.fmean(call.shorter_prompts[length] for call in plain) for length in lengths}
        return means | {self.num_tokens: self.mean("density")}

    def __str__(self) -> str:
        """Return the model's figures, a line for each attention call, and the heads of least recall."""
        return "\n\n".join([self._summarise(), self._tabulate_calls(), self._tabulate_worst_heads()])

    def to_json(self) -> str:
        """Return all but the pictures as JSON; ``from_json`` reads it."""
        fields = dataclasses.asdict(dataclasses.replace(self, pictures=()))
        del fields["pictures"]
        fields["predictions"]["perplexity_ratio"] = self.predictions.perplexity_ratio
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """Read what ``to_json`` wrote."""
        fields = json.loads(text)
        del fields["predictions"]["perplexity_ratio"]
        fields["predictions"] = PredictionComparison(**fields["predictions"])
        fields["calls"] = tuple(
            CallAudit(
                call["name"],
                tuple(HeadAudit(**head) for head in call["heads"]),
                {int(length): density for length, density in call["shorter_prompts"].items()},
            )
            for call in fields["calls"]
        )
        return cls(**fields)

    def _summarise(self) -> str:
        predictions = self.predictions
        prompts = "" if self.num_prompts == 1 else f" in each of {self.num_prompts} prompts"
        rows = [
            ("perplexity", f"{math.exp(predictions.dense_loss):.3f}", f"{math.exp(predictions.sparse_loss):.3f}"),
            ("loss, nats", f"{predictions.dense_loss:.4f}", f"{predictions.sparse_loss:.4f}"),
            ("perplexity ratio", "1", f"{predictions.perplexity_ratio:.4f}"),
            ("top-1 agreement", "100%", f"{predictions.agreement:.1%}"),
            ("KL divergence, nats", "0", f"{predictions.divergence:.4f}"),
            ("blocks computed", "100%", f"{self.mean('density'):.1%}"),
            ("attention recall", "1", f"{self.mean('recall_mean'):.3f}"),
            ("attention error", "0", f"{self.mean('error'):.3f}"),
        ]
        return (
            f"{self.num_tokens} tokens{prompts}, {len(self.calls)} of {self.num_attention_calls} attention calls "
            f"sparse; recall and error are exact on {self.num_rows} rows of each head\n\n"
            + format_table(("", "dense", "sparse"), rows)
        )

    def _tabulate_calls(self) -> str:
        rows = [
            (
                call.name,
                ", ".join(f"{n} {pattern}" for pattern, n in Counter(head.pattern for head in call.heads).items()),
                *_format_figures(call.mean, call.worst("recall_worst")),
            )
            for call in self.calls
        ]
        return format_table(("attention call", "patterns", *_FIGURES), rows)

    def _tabulate_worst_heads(self) -> str:
        heads = [(call, number, head) for call in self.calls for number, head in enumerate(call.heads)]
        heads.sort(key=lambda entry: entry[2].recall_mean)
        rows = [
            (f"{call.name} head {number}", head.pattern, *_format_figures(partial(getattr, head), head.recall_worst))
            for call, number, head in heads[:_WORST_HEADS]
        ]
        return format_table(("heads of least recall", "pattern", *_FIGURES), rows)


def _format_figures(get: Callable[[str], float | None], worst_row: float) -> list[str]:
    distance = get("distance")
    is_missing = distance is None or math.isnan(distance)
    return [
        "-" if is_missing else f"{distance:.3f}",
        f"{get('density'):.1%}",
        f"{get('recall_mean'):.3f}",
        f"{get('recall_p10'):.3f}",
        f"{worst_row:.3f}",
        f"{get('error'):.3f}",
    ]
