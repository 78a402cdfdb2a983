"""What the lengths of an attention call say about it: prefill, decode, too short, or unknown.

Guards are a cost, a compile for each value that breaks them, so static facts come first and a guard is added only
where it decides between two useful graphs.
"""

from __future__ import annotations

from torch import SymInt

from flexprefill_compile.report import SkipReason
from flexprefill_compile.torch_internals import guard_or_false

Refusal = tuple[SkipReason, str]


def refuse_lengths(query_length: int | SymInt, key_length: int | SymInt, min_length: int) -> Refusal | None:
    """Return why a causal call of these lengths can't or shouldn't run sparse, or None if it should.

    May add two guards: that the lengths are equal, where dynamo gave them different symbols, and on which side of
    ``min_length`` the prompt is. Sizes that depend on data can't be guarded on and are refused.
    """
    if not guard_or_false(query_length == key_length):
        return SkipReason.LENGTHS_DIFFER, f"{query_length} queries, {key_length} keys"
    if not guard_or_false(query_length >= min_length):
        return SkipReason.TOO_SHORT, f"{query_length} < {min_length}"
    return None
