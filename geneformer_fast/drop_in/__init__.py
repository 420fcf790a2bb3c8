"""Packed computing for models of Hugging Face's transformers, one model at a time or by the name of an attention."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    from geneformer_fast.errors import UnsupportedError

    raise UnsupportedError(
        "accelerating Hugging Face models needs transformers: pip install 'geneformer-fast[hf]'"
    ) from error

from geneformer_fast.drop_in.attention import register_attention
from geneformer_fast.drop_in.patch import Handle, accelerate

__all__ = ["Handle", "accelerate", "register_attention"]
