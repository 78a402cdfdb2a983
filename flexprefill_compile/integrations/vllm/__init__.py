"""The vLLM plugin: ``vllm serve MODEL --attention-backend CUSTOM`` attends to long prompts sparsely.

a step's metadata   ->  which requests are long prefills   ->  keys and values out of their pages  ->  sparse attention
                        the others, and decode             ->  vLLM's FlashAttention

Only ``backend`` imports vLLM.
"""

from __future__ import annotations

BACKEND = "flexprefill_compile.integrations.vllm.backend.FlexPrefillBackend"


def register() -> None:
    """Give vLLM's attention backend CUSTOM a meaning: the entry point, which vLLM calls in each of its processes.

    It must not fail, for it is called whatever backend is asked for. What is wrong is said when this one is.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend  # noqa: PLC0415
    except ImportError:  # a vLLM without a registry: it can't ask for this backend either
        return
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
