"""Operations on tensors for transformer encoders over cells. Knows nothing of genes, checkpoints or files.

Every operation is a folder under ``ops`` with a reference (what it means), a plan (how to launch), a kernel (device
code) and an op (the public function). Names load on first use: importing this package imports no torch and probes no
device.
"""

from __future__ import annotations

from typing import Any

_HOME = {
    "rank_genes": "geneformer_kernels.ops.rank_genes.op",
    "embed_tokens": "geneformer_kernels.ops.embed_tokens.op",
    "varlen_attention": "geneformer_kernels.ops.varlen_attention.op",
    "varlen_attention_qkv": "geneformer_kernels.ops.varlen_attention.op",
    "attention_cells": "geneformer_kernels.ops.varlen_attention.op",
    "attention_scores": "geneformer_kernels.ops.varlen_attention.op",
    "favor_attention": "geneformer_kernels.ops.favor_attention.op",
    "residual_layernorm": "geneformer_kernels.ops.residual_layernorm.op",
    "residual_layernorm_int8": "geneformer_kernels.ops.residual_layernorm.int8",
    "linear": "geneformer_kernels.ops.linear.op",
    "feed_forward": "geneformer_kernels.ops.feed_forward.op",
    "feed_forward_layernorm": "geneformer_kernels.ops.feed_forward.op",
    "int8_linear": "geneformer_kernels.ops.int8_linear.op",
    "quantize_rows": "geneformer_kernels.ops.int8_linear.op",
    "quantize_weight": "geneformer_kernels.ops.int8_linear.op",
    "int8_mode": "geneformer_kernels.ops.int8_linear.op",
    "int8_feed_forward": "geneformer_kernels.ops.int8_feed_forward.op",
    "fp8_linear": "geneformer_kernels.ops.fp8_linear.op",
    "quantize_rows_fp8": "geneformer_kernels.ops.fp8_linear.op",
    "quantize_weight_fp8": "geneformer_kernels.ops.fp8_linear.op",
    "mlm_cross_entropy": "geneformer_kernels.ops.mlm_cross_entropy.op",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
