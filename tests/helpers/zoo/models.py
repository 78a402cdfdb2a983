"""Tiny models with random weights of the causal language models that the installed transformers has.

``FAMILIES`` names them all; ``LEFT_OUT`` says why the other classes are none, or can't be built from a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASS_NAMES

VOCABULARY = 128
WINDOW = 64
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")  # fields that name the kind of each layer

# What each config gets of this, as far as it has the field, by the field's own or by its common name.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
    # Weights large enough for peaked attention: at the usual 0.02 it is all but uniform, whatever the masks say.
    "initializer_range": 0.2,
    "init_std": 0.2,
    # sizes
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "dim_ff": 96,
    "dff": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "dim_head": 16,
    "rotary_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "word_embed_proj_dim": 64,
    # windows
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    # latent attention and indexed attention
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 32,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    # linear attention and state spaces, in models that have attention too
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 32,
    "ssm_state_size": 16,
    "chunk_size": 32,
}
LATENT = {"num_key_value_heads": 4}  # latent attention has as many key as query heads

# What the table above can't say, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},  # shares weights among its hybrid layers
    "zaya": {"num_experts_per_tok": 1},
}

# A second config of a family that attends in another way.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}),
}

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "encoder, or decoder of an encoder": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
        *("camembert", "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus"),
        *("plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr"),
        *("whisper", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ),
    "not causal by its config's default": ("cpmant", "xlm", "xlnet"),
    "no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    "images or sound; the text model has its own line, if it has a class": (
        *("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4"),
        *("mllama", "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5"),
        *("qwen3_5_moe", "qwen4_exp"),
    ),
    "needs the states of another model": ("gemma4_assistant", "gemma4_unified_assistant"),
    "uncompiled, it fails on prompts longer than its window": ("dory",),
    "the class of another line": ("gpt-sw3", "internlm3", "iquestcoder"),
    "config of parts that no common table fits": (
        "blt",
        "cohere_compass_text",
        "dots3_note_text",
        "qwen4_exp_text",
        "reformer",
    ),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A way to make a tiny model.

    Attributes:
        name: As transformers calls the model type, and the variant.
        model_type: Key of transformers' config mapping.
        overrides: Fields of the config beside the common ones.
    """

    name: str
    model_type: str
    overrides: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        """The class of the model."""
        name: str = CLASS_NAMES[self.model_type]
        return name


# Families of which more is checked: one or two of each kind of mask, of heads and of attention.
THOROUGH = ("bloom", "falcon, alibi", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen3_moe")


def list_families() -> dict[str, Family]:
    """Return every family that can be built, by name."""
    left_out = {model_type for model_types in LEFT_OUT.values() for model_type in model_types}
    families = [Family(name, name, OVERRIDES.get(name, {})) for name in CLASS_NAMES if name not in left_out]
    families += [
        Family(name, model_type, OVERRIDES.get(model_type, {}) | overrides)
        for name, (model_type, overrides) in VARIANTS.items()
    ]
    return {family.name: family for family in sorted(families, key=lambda family: family.name)}


FAMILIES = list_families()


def create_config(family: Family) -> Any:
    """Return the tiny config of a family: two layers, or one of each kind if there are more."""
    config_class = CONFIG_MAPPING[family.model_type]
    names = config_class.attribute_map
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = TINY | (LATENT if "kv_lora_rank" in fields else {})
    given = {names.get(name, name): value for name, value in sizes.items() if names.get(name, name) in fields}
    given |= {name: value for name, value in sizes.items() if name in fields}
    kinds = _list_layer_kinds(config_class, fields)
    kinds |= {name: value for name, value in family.overrides.items() if name in LAYER_KINDS}
    given[names.get("num_hidden_layers", "num_hidden_layers")] = num_layers = max([2, *map(len, kinds.values())])
    given |= {name: (layers * num_layers)[:num_layers] for name, layers in kinds.items()}
    return config_class(**given | family.overrides)


def _list_layer_kinds(config_class: Any, fields: set[str]) -> dict[str, list[str]]:
    """Return, for each field that names the kinds of layers, those of the default config, in their first order."""
    names = [name for name in LAYER_KINDS if name in fields]
    default = config_class() if names else None
    kinds = {name: list(dict.fromkeys(getattr(default, name) or ())) for name in names}
    return {name: layers for name, layers in kinds.items() if layers}


def build_model(family: Family) -> Any:
    """Build the tiny model of a family for inference: float32, random weights, the same ones each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(create_config(family), dtype=torch.float32).eval()
