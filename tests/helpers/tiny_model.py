"""A causal language model that is made in no time, saved as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def create_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer of 256 tokens, one for each byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def create_tiny_llama(num_layers: int = 2) -> LlamaForCausalLM:
    """Create a Llama with random weights, the same at each call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_hidden_layers=num_layers, eos_token_id=None, **sizes)
    ).eval()


def save_tiny_model(folder: Path) -> Path:
    """Save the model and its tokenizer to a folder, and return it."""
    create_byte_tokenizer().save_pretrained(folder)
    create_tiny_llama().save_pretrained(folder)
    return folder
