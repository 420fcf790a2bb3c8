"""``python every_kernel.py OPERATION [DEVICE]`` launches every kernel of an operation once, and says which ones.

Sizes are odd, so that tiles have edges. Whatever watches memory sees all kernels in seconds, with nothing around them.
The interpreter, which is slow, has fewer sizes: that each kernel is launched is all that it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from geneformer_kernels import (
    embed_tokens,
    favor_attention,
    feed_forward,
    feed_forward_layernorm,
    int8_feed_forward,
    int8_linear,
    mlm_cross_entropy,
    quantize_weight,
    rank_genes,
    residual_layernorm,
    residual_layernorm_int8,
    varlen_attention_qkv,
)

FP16, FP32 = torch.float16, torch.float32


def drawn(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = FP32) -> list[torch.Tensor]:
    """Leaves with values around 0.1."""
    return [(torch.randn(shape) * 0.5 + 0.1).to(device, dtype).requires_grad_() for shape in shapes]


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def run_varlen_attention(device: str) -> None:
    is_card = device == "cuda"
    bounds = torch.tensor([0, 65, 65, 66, 99] if is_card else [0, 5, 5, 6, 23], dtype=torch.int32, device=device)
    for head_dim in (32, 64, 128, 20) if is_card else (20,):
        for dropout_p in (0.0, 0.1):
            (qkv,) = drawn(device, (int(bounds[-1]), 3, 2, head_dim), dtype=FP16)
            backward(varlen_attention_qkv(qkv, cu_seqlens=bounds, dropout_p=dropout_p, impl="triton"))


def run_favor_attention(device: str) -> None:
    is_card = device == "cuda"
    bounds = torch.tensor([0, 65, 65, 66, 99] if is_card else [0, 5, 5, 6, 23], dtype=torch.int32, device=device)
    for head_dim, dtype in ((20, FP16), (64, FP16), (128, FP16), (64, FP32)) if is_card else ((20, FP16),):
        for stabiliser in ("cell", "batch"):
            (qkv,) = drawn(device, (int(bounds[-1]), 3, 2, head_dim), dtype=dtype)
            projection = torch.randn(37, head_dim, device=device)
            arguments = dict(cu_seqlens=bounds, stabiliser=stabiliser, impl="triton")
            backward(favor_attention(*qkv.unbind(1), projection, **arguments))
            with torch.no_grad():
                favor_attention(*qkv.unbind(1), projection, **arguments)


def run_feed_forward(device: str) -> None:
    # One kernel where that is planned: halves of width 128. Products and passes elsewhere.
    for width, ff_width, dtype in ((128, 192, FP16), (70, 51, FP16), (70, 51, FP32)):
        for activation in ("relu", "swiglu"):
            rows = ff_width * (2 if activation == "swiglu" else 1)
            x, residual, norm, shift = drawn(device, (37, width), (37, width), (width,), (width,))
            weights = drawn(device, (rows, width), (rows,), (width, ff_width), (width,), dtype=dtype)
            x = x.detach().to(dtype).requires_grad_()
            for place in ("post", "pre"):
                options = dict(activation=activation, norm=place, eps=1e-5, dropout_p=0.1, impl="triton")
                backward(*feed_forward_layernorm(x, residual, *weights, norm, shift, **options))
                with torch.no_grad():
                    feed_forward_layernorm(x, residual, *weights, norm, shift, **options | dict(dropout_p=0.0))
            backward(feed_forward(x, *weights, activation=activation, impl="triton"))


def run_residual_layernorm(device: str) -> None:
    for width, dtype in ((256, FP16), (769, FP32)):
        for norm in ("post", "pre"):
            x, residual, weight, bias = drawn(device, (21, width), (21, width), (width,), (width,))
            x = x.detach().to(dtype).requires_grad_()
            backward(*residual_layernorm(x, residual, weight, bias, eps=1e-5, norm=norm, dropout_p=0.1, impl="triton"))
            with torch.no_grad():
                residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm=norm, smooth=weight, impl="triton")


def run_embed_tokens(device: str) -> None:
    bounds = torch.tensor([0, 65, 65, 66, 99], dtype=torch.int32, device=device)
    ids = ((torch.arange(99) * 7) % 31).to(device)
    for width in (64, 300) if device == "cuda" else (64,):
        leaves = drawn(device, (31, width), (70, width), (width,), (width,), (width,))
        backward(*embed_tokens(ids, bounds, *leaves, dropout_p=0.1, out_dtype=FP16, impl="triton"))


def run_mlm_cross_entropy(device: str) -> None:
    targets = ((torch.arange(70) * 11) % 203 - 1).to(device)
    for width, dtype in ((100, FP16), (64, FP32)):
        hidden, weight, bias = drawn(device, (70, width), (203, width), (203,))
        hidden = hidden.detach().to(dtype).requires_grad_()
        backward(mlm_cross_entropy(hidden, weight, bias, targets, ignore_index=-1, impl="triton"))


def run_int8_linear(device: str) -> None:
    for n_rows, width, n_columns in ((37, 131, 70), (64, 256, 128)):
        x, weight, bias = drawn(device, (n_rows, width), (n_columns, width), (n_columns,))
        integers, scale = quantize_weight(weight.detach())
        for dtype in (FP16, FP32):
            for mode in ("dynamic", "weight_only"):
                int8_linear(x.detach().to(dtype), integers, scale, bias.detach(), mode=mode, impl="triton")


def run_int8_feed_forward(device: str) -> None:
    for activation in ("gelu", "swiglu"):
        n_hidden = 131 * (2 if activation == "swiglu" else 1)
        x, up, up_bias, down, down_bias = drawn(device, (37, 70), (n_hidden, 70), (n_hidden,), (50, 131), (50,))
        layers = *quantize_weight(up), up_bias.detach(), *quantize_weight(down), down_bias.detach()
        for dtype in (FP16, FP32):
            int8_feed_forward(x.detach(), *layers, activation=activation, out_dtype=dtype, impl="triton")


def run_rank_genes(device: str) -> None:
    # A row wider than the widest sort, an empty one, short ones; two columns of one gene, and one of none. The
    # interpreter would look for repeated columns in such a row for half a minute: there its entries are no row's.
    n_genes, lengths = 9001, [700, 0, 5, 8999] if device == "cuda" else [410, 0, 5]
    places = torch.arange(9704, dtype=torch.int32)
    indices = torch.cat([torch.randperm(n_genes, dtype=torch.int32)[:n] for n in (700, 5, 8999)])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    columns = torch.arange(n_genes)
    columns[1], columns[2] = 0, -1
    block = (bounds, indices, 1.0 + places % 7, torch.full((len(lengths),), 5000.0))
    genes = dict(
        column_to_gene=columns, token_ids=torch.arange(n_genes) + 3, medians=torch.arange(n_genes).double() % 5 + 1
    )
    block, genes = [each.to(device) for each in block], {name: each.to(device) for name, each in genes.items()}
    for padded_length in (None, 600):
        rank_genes(*block, **genes, keep=500, first=1, last=2, padded_length=padded_length, impl="triton")


RUNS: dict[str, Callable[[str], None]] = {
    "rank_genes": run_rank_genes,
    "embed_tokens": run_embed_tokens,
    "varlen_attention": run_varlen_attention,
    "favor_attention": run_favor_attention,
    "residual_layernorm": run_residual_layernorm,
    "feed_forward": run_feed_forward,
    "int8_linear": run_int8_linear,
    "int8_feed_forward": run_int8_feed_forward,
    "mlm_cross_entropy": run_mlm_cross_entropy,
}


def launched_by(operation: str, device: str) -> set[str]:
    """Names of the kernels that are launched."""
    from triton.runtime.jit import KernelInterface

    found, plain = set(), KernelInterface.__getitem__

    def noted(kernel, grid):
        found.add(kernel.fn.__name__)
        return plain(kernel, grid)

    KernelInterface.__getitem__ = noted
    try:
        torch.manual_seed(0)
        RUNS[operation](device)
    finally:
        KernelInterface.__getitem__ = plain
    return found


if __name__ == "__main__":
    print("begun", flush=True)
    names = launched_by(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda")
    torch.cuda.synchronize()
    print("launched", *sorted(names), flush=True)
