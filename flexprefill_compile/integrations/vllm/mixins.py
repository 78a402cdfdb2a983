"""What stands before vLLM's own classes: long prefills attend sparsely, the rest as vLLM does.

builder.build(step)               vLLM's metadata, and a StepPlan beside it where prompts are long
impl.forward(..., metadata)       prefills of the plan: keys and values out of the pages, selection, sparse attention
                                  the rest: vLLM's forward, of their tokens alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .layer_attention import LayerAttention
from .pages import reserve
from .plan import Rest, StepPlan, find_prefills, find_refusal, log_once, take_rest
from .settings import Settings

if TYPE_CHECKING:  # of vLLM's classes, which come after these in the order of methods, what these use

    class _Builder:
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...

    class _Impl:
        num_heads: int
        num_kv_heads: int
        head_size: int

        def forward(self, *arguments: Any) -> Tensor: ...
else:
    _Builder = _Impl = object

_PLAN = "flexprefill_plan"


class PlansPrefills(_Builder):
    """A metadata builder that notes which requests of a step run sparse.

    Attributes:
        settings: Of the engine.
        has_speculation: Whether drafts are verified, whose rows have lengths that only the device knows.
    """

    settings: Settings
    has_speculation: bool = False
    # The rest's metadata holds rows of a block table: each cache group builds its own.
    supports_update_block_table = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build a step's metadata: vLLM's interface."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        setattr(metadata, _PLAN, self._plan(common_prefix_len, common_attn_metadata))
        return metadata

    def _plan(self, common_prefix_len: int, common: Any) -> StepPlan | None:
        min_length, block_size = self.settings.min_length, self.settings.config.block_size
        if common.max_seq_len < min_length or common.max_query_len <= block_size:
            return None
        refusal = "speculative decoding" if self.has_speculation else find_refusal(common, common_prefix_len)
        if refusal is not None:
            log_once(refusal)
            return None
        prefills = find_prefills(common, min_length, block_size)
        if not prefills:
            return None
        rest = take_rest(common, prefills)
        if rest is None:
            return StepPlan(prefills, None)
        own, tokens = rest
        # fast_build: what vLLM schedules ahead of time would overwrite the whole step's, in the same buffer
        return StepPlan(prefills, Rest(tokens, super().build(0, own, fast_build=True)))


class AttendsSparsely(_Impl):
    """An attention implementation that runs the prefills of a plan sparse.

    Attributes:
        settings: Of the engine.
        max_tokens: The longest context and the most tokens of a step, for which the profiling run allocates.
    """

    settings: Settings
    max_tokens: tuple[int, int]
    _attention: LayerAttention | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend to a step's tokens: vLLM's interface.

        Args:
            layer: vLLM's attention layer, with its ``layer_name``.
            query: (tokens, H, D).
            key: (tokens, Hkv, D).
            value: (tokens, Hkv, D).
            kv_cache: The layer's pages; the step's keys and values are in them already.
            attn_metadata: Of the step; None in the profiling run at start-up.
            output: (tokens, H, D), written to.
            output_scale: Of quantised output, which is left to vLLM.
            output_block_scale: The same.

        Raises:
            InvalidOptionError: The settings by layer or head don't fit the model; in the profiling run.
            AttentionSkippedError: ``on_skip="raise"`` and the attention has to stay dense.
        """
        attention = self._find_attention(layer, query)
        plan: StepPlan | None = getattr(attn_metadata, _PLAN, None)
        scales = (output_scale, output_block_scale)
        if plan is None or not attention.is_sparse or scales != (None, None):
            return self._leave(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        for prefill in plan.prefills:
            attended = attention.attend(prefill, (query, key, value), kv_cache, attn_metadata.block_table)
            if attended is None:
                return self._leave(layer, query, key, value, kv_cache, attn_metadata, output)
            own = output[prefill.tokens]
            own.copy_(attended.reshape(own.shape))
        if plan.rest is not None:
            self._attend_to_rest(plan.rest, layer, (query, key, value), kv_cache, output)
        return output

    def _leave(self, *arguments: Any) -> Tensor:
        """Attend as vLLM does."""
        return super().forward(*arguments)

    def _attend_to_rest(
        self, rest: Rest, layer: Any, inputs: tuple[Tensor | None, ...], kv_cache: Tensor, output: Tensor
    ) -> None:
        """Write the output of what the plan leaves to vLLM. Layers that share a cache may have no keys of their own."""
        taken = [None if x is None else x.index_select(0, rest.tokens) for x in inputs]
        own = output.new_empty(len(rest.tokens), *output.shape[1:])
        self._leave(layer, *taken, kv_cache, rest.metadata, own)
        output.index_copy_(0, rest.tokens, own)

    def _find_attention(self, layer: Any, query: Tensor) -> LayerAttention:
        """Return the layer's own attention, made in the first step, which is the profiling run."""
        if self._attention is None:
            self._attention = LayerAttention(self, self.settings, layer.layer_name)
            if self._attention.is_sparse:
                self._reserve(query)
        return self._attention

    def _reserve(self, query: Tensor) -> None:
        """Take, for a moment, the memory that a prefill will take, so that vLLM leaves it free."""
        longest, most = self.max_tokens
        block_size = self.settings.config.block_size
        pages = 2 * longest * self.num_kv_heads * self.head_size * query.element_size()
        blocks = self.num_heads * -(-most // block_size) * -(-longest // block_size)
        reserve(pages + _BYTES_PER_BLOCK * blocks, query.device)


# Of the grid of blocks, at most: `block_masks.masked_prefill.select_masked_prefill_blocks`.
_BYTES_PER_BLOCK = 40
