"""From tensors to block masks at run time: which blocks of attention a prompt needs. Nothing here reads a graph."""

if not __name__.startswith("flexprefill_compile."):
    raise ImportError("import flexprefill_compile.block_masks; as 'block_masks' it would register its ops twice")

from . import density_ceiling as density_ceiling  # registers its kernels
from . import masked_prefill as masked_prefill  # registers its kernel, as the next does
from . import observed_attention as observed_attention
from .prefill import create_prefill_block_mask
from .recording import record_densities

__all__ = ["create_prefill_block_mask", "record_densities"]
