"""Whether settings can leave anything of a prompt out: to know before a long run, not after it."""

from __future__ import annotations

from flexprefill_compile.block_masks.layout import count_blocks

from ..errors import UsageError
from ..settings.config import SparsePrefillConfig
from ..settings.policy import Policy


def check_sparsity(num_tokens: int, config: SparsePrefillConfig) -> None:
    """Check that a causal prefill can leave blocks out.

    A query row computes the first key block, its diagonal block and ``min_budget`` more. Dense settings pass: who asks
    for gamma 1 wants every block.

    Args:
        num_tokens: Of the prompt.
        config: What to select; of a policy's layers the least floor counts.

    Raises:
        UsageError: The prompt has less than two blocks, or the floor covers it whole.
    """
    block_size = config.block_size
    if num_tokens < 2 * block_size:
        raise UsageError(
            f"the text must be of two blocks at least, {2 * block_size} tokens, got {num_tokens}: "
            "take a longer text or a smaller block_size"
        )
    floor = min([config.floor_at(num_tokens), *_floors_of_layers(config)])
    covered = count_covered(floor, block_size)
    if num_tokens <= covered and not config.is_dense:
        raise UsageError(
            f"min_budget {floor} computes every block of a prompt of up to {covered} tokens, got {num_tokens}: "
            "take a longer text or a smaller min_budget"
        )


def count_covered(floor: int, block_size: int) -> int:
    """Return the tokens of the longest causal prompt of which a floor of so many tokens computes every block."""
    return (count_blocks(floor, block_size) + 2) * block_size


def _floors_of_layers(config: SparsePrefillConfig) -> list[int]:
    """Return the ``min_budget`` of each layer of the policy that has one."""
    if not isinstance(config.policy, Policy):
        return []
    settings = dict(config.policy.layers).values()
    return [own.min_budget for own in settings if own.min_budget is not None and not own.dense]
