"""Small encoders of every kind, cells for them, and what is read off them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.gpu.models import Stock, StockBert, StockPreNorm
from geneformer_fast import Encoder, EncoderConfig, Ragged

SMALL = EncoderConfig(
    n_layers=3, width=64, n_heads=2, ff_width=96, vocab_size=101, max_len=160, dropout=0.1, attention_dropout=0.1,
    n_token_types=2,
)  # fmt: skip
CONFIGS = {
    "small": SMALL,
    "gelu": replace(SMALL, activation="gelu", head_activation="gelu", n_heads=1),
    "pre-norm": replace(
        SMALL, norm="pre", activation="gelu_tanh", head_activation="gelu", embedding_norm=False, final_norm=True,
        n_token_types=0,
    ),
    "v1-10m": EncoderConfig.preset("geneformer-v1-10m"),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The same cells packed and padded, some tokens masked."""

    tokens: Ragged
    rows: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor


def batch(config: EncoderConfig, where: str, *, seed: int = 1) -> Batch:
    """Cells of length 1, of odd lengths, at and around multiples of a tile; few and short where it takes long."""
    lengths = [17, 1, 40] if where == "interpreted" else [65, 1, 130, 2, 64, 33, 160]
    if config.max_len > 1000:
        lengths = [2048, 1, 700, 333] if where == "cuda" else [70, 1, 9]
    device = torch.device("cuda" if where == "cuda" else "cpu")
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randint(2, config.vocab_size, (n,), generator=generator) for n in lengths]
    tokens = Ragged.from_cells(cells)
    rows = (torch.rand(tokens.n_tokens, generator=generator) < 0.2).nonzero().squeeze(1)
    targets = torch.randint(2, config.vocab_size, (len(rows),), generator=generator)
    tokens = tokens.to(device)
    return Batch(tokens, rows.to(device), targets.to(device), tokens.to_padded(0), tokens.mask())


def config_of(name: str, where: str) -> EncoderConfig:
    """One of :data:`CONFIGS`, with two layers or one where kernels are interpreted."""
    if where != "interpreted":
        return CONFIGS[name]
    return replace(CONFIGS[name], n_layers=1 if name == "gelu" else 2)


def stock_of(encoder: Encoder) -> Stock:
    """The same function by stock parts, in float32."""
    return (StockBert(encoder, "eager") if encoder.config.norm == "post" else StockPreNorm(encoder)).eval()


def stock_hidden(stock: Stock, cells: Batch) -> torch.Tensor:
    return stock(cells.ids, cells.mask.long())[cells.mask]


def loss_of(encoder: Encoder, cells: Batch) -> torch.Tensor:
    return encoder.mlm_loss(encoder(cells.tokens), cells.rows, cells.targets)


def gradients_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in encoder.named_parameters()}
    assert [name for name, grad in found.items() if grad is None] == []
    return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
