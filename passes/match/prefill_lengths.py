"""Tell from its lengths whether attention is a prefill, a later chunk of one, too short, or unknown.

Guards are a cost, a compile for each value that breaks them, so static facts come first and a guard is added only
where it decides between two useful graphs.
"""

from __future__ import annotations

from torch import SymInt

from flexprefill_compile.report import SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.torch_internals import guard_or_false, statically_known_true

from .refusals import Refusal


def refuse_lengths(
    query_length: int | SymInt, key_length: int | SymInt, config: SparsePrefillConfig, *, is_causal: bool
) -> Refusal | None:
    """Return why attention of these lengths can't or shouldn't run sparse, or None if it should.

    May add guards: that the lengths are equal, where that is what causal means and dynamo gave them different symbols;
    on which side of ``min_length`` the prompt is; and for a chunk of a prompt, on which side of a block its length is.
    Sizes that depend on data can't be guarded on and are refused.

    Args:
        query_length: In tokens.
        key_length: In tokens: the length of the prompt, of which the queries may be a later chunk.
        config: Prompts shorter than its ``min_length``, and chunks shorter than a block, stay dense.
        is_causal: Whether query i sees keys 0 to i, which says what it means for equal lengths only. Else a mask tells
            where the queries stand among the keys.
    """
    if is_causal and not guard_or_false(query_length == key_length):
        return SkipReason.LENGTHS_DIFFER, f"{query_length} queries, {key_length} keys"
    is_whole = is_causal or statically_known_true(query_length == key_length)
    if not is_whole and not guard_or_false(query_length >= config.block_size):
        return SkipReason.TOO_SHORT, f"a chunk of {query_length} < {config.block_size}"
    length = query_length if is_whole else key_length
    if config.min_length is not None and not guard_or_false(length >= config.min_length):
        return SkipReason.TOO_SHORT, f"{length} < {config.min_length}"
    return None
