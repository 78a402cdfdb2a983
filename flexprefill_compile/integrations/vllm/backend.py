"""What vLLM loads as its attention backend CUSTOM: its FlashAttention, with sparse prefill before it."""

from __future__ import annotations

import os
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from ...settings.rank_groups import RankGroup
from .mixins import AttendsSparsely, PlansPrefills
from .settings import Settings, make_settings, read_options
from .versions import check_version

check_version(vllm.__version__)
logger = init_logger("vllm.flexprefill")

_SMALLEST_HEAD = 16


def settings_of(vllm_config: Any) -> Settings:
    """Return the settings of an engine.

    Raises:
        InvalidOptionError: They don't parse, a name is unknown, or a value is out of range.
    """
    ranks = get_tp_group()
    group = RankGroup("tp", ranks.world_size, ranks.rank_in_group) if ranks.world_size > 1 else None
    options = read_options(vllm_config.additional_config, os.environ)
    settings = make_settings(options, torch.device(vllm_config.device_config.device_type), group)
    logger.info_once(
        "prefills run sparse from %d tokens on, with %s", settings.min_length, str(dict(options) or "the defaults")
    )
    return settings


class FlexPrefillMetadataBuilder(PlansPrefills, FlashAttentionMetadataBuilder):
    """FlashAttention's, with a plan of the prefills."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings = settings_of(vllm_config)
        self.has_speculation = vllm_config.speculative_config is not None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Let CUDA graphs hold decode steps alone: a replay would repeat what one prefill selected."""
        own = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(own, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)


class FlexPrefillImpl(AttendsSparsely, FlashAttentionImpl):
    """FlashAttention's, with sparse prefill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        self.settings = settings_of(vllm_config)
        self.max_tokens = (
            vllm_config.model_config.max_model_len,
            vllm_config.scheduler_config.max_num_batched_tokens,
        )


class FlexPrefillBackend(FlashAttentionBackend):
    """The backend."""

    @staticmethod
    def get_name() -> str:
        """Return the name by which vLLM's registry knows it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlexPrefillImpl]:
        """Return the class of its attention."""
        return FlexPrefillImpl

    @staticmethod
    def get_builder_cls() -> type[FlexPrefillMetadataBuilder]:
        """Return the class of its metadata builder."""
        return FlexPrefillMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Tell whether both kernels take a head dimension."""
        return head_size >= _SMALLEST_HEAD and bool(super().supports_head_size(head_size))

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Tell that what is selected depends on how a prompt is cut into chunks."""
        return False
