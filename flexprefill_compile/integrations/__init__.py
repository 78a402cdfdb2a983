"""Sparse prefill where others run the model: each library's own way to switch attention, imported when asked for."""

from __future__ import annotations


def register_transformers() -> None:
    """Make ``attn_implementation="flexprefill"`` known to transformers, for models that are not compiled.

    It must be called once in each process, before a model is loaded with that name: transformers has no entry point
    through which it would find the implementation by itself. Settings are ``model.config.flexprefill``, a mapping of
    the fields of SparsePrefillConfig. See docs/serving.md.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from .transformers import register  # noqa: PLC0415, an extra
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("transformers is not installed: pip install 'flexprefill-compile[hf]'") from None
    register()
