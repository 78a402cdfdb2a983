"""Tensors to block masks: which blocks of attention a prompt needs, estimated at run time."""

if not __name__.startswith("flexprefill_compile."):
    raise ImportError("import flexprefill_compile.block_masks: a second import as 'block_masks' would register ops twice")

from flexprefill_compile.block_masks.prefill import create_prefill_block_mask

__all__ = ["create_prefill_block_mask"]
