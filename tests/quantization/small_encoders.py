"""Small encoders of every family."""

from __future__ import annotations

import torch

from geneformer_fast import Encoder, EncoderConfig, Ragged

#: Every variant that a block has.
FAMILIES = {
    "geneformer": {},
    "geneformer, gelu": dict(activation="gelu", head_activation="gelu"),
    "bionemo": dict(
        norm="pre", activation="gelu_tanh", head_activation="gelu", embedding_norm=False, final_norm=True,
        n_token_types=0,
    ),
    "aido.cell": dict(
        norm="pre", activation="swiglu", head_activation="gelu", embedding_norm=False, final_norm=True,
        n_token_types=0, inputs="values", vocab_size=0, pad_id=-2, tied_decoder=False, n_bins=7,
    ),
    "pre-norm without a last norm": dict(norm="pre", activation="gelu", embedding_norm=True, final_norm=False),
    "post-norm with a last norm": dict(final_norm=True),
}  # fmt: skip


def encoder_of(family: str, head: str | None = None, **changes: object) -> Encoder:
    """Weights away from the trivial start: biases, norms, and rows whose mean is not zero."""
    geometry = dict(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=60, max_len=40)
    torch.manual_seed(4)
    encoder = Encoder(EncoderConfig(**{**geometry, **FAMILIES[family], **changes}), head, n_classes=3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15 + (0.1 if parameter.ndim == 1 else 0.0))
    return encoder.eval()


def cells_of(encoder: Encoder, lengths: tuple[int, ...] = (7, 1, 12, 3)) -> Ragged:
    """Cells of unequal lengths."""
    generator = torch.Generator().manual_seed(len(lengths))
    if encoder.config.inputs == "values":
        return Ragged.from_cells([torch.rand(n, generator=generator) * 5 for n in lengths])
    return Ragged.from_cells([torch.randint(1, encoder.config.vocab_size, (n,), generator=generator) for n in lengths])
