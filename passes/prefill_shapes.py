"""What the lengths of an attention call say about it: prefill, decode, too short, or unknown.

Guards are a cost, a compile for each value that breaks them, so static facts come first and a guard is added only
where it decides between two useful graphs.
"""

from __future__ import annotations

from torch import SymInt

from flexprefill_compile.report import SkipReason
from flexprefill_compile.torch_internals import guard_or_false

Refusal = tuple[SkipReason, str]


def refuse_lengths(
    query_length: int | SymInt, key_length: int | SymInt, min_length: int, *, is_causal: bool
) -> Refusal | None:
    """Return why attention of these lengths can't or shouldn't run sparse, or None if it should.

    May add two guards: that the lengths are equal, where dynamo gave them different symbols, and on which side of
    ``min_length`` the prompt is. Sizes that depend on data can't be guarded on and are refused.

    Args:
        query_length: In tokens.
        key_length: In tokens: the length of the prompt, of which the queries may be a later chunk.
        min_length: Shorter prompts stay dense.
        is_causal: Whether query i sees keys 0 to i, which says what it means for equal lengths only. Else a mask tells
            where the queries stand among the keys.
    """
    if is_causal and not guard_or_false(query_length == key_length):
        return SkipReason.LENGTHS_DIFFER, f"{query_length} queries, {key_length} keys"
    if not guard_or_false(key_length >= min_length):
        return SkipReason.TOO_SHORT, f"{key_length} < {min_length}"
    return None
