"""The published way beside which AIDO.Cell is timed computes the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.cpu import aido_rival
from geneformer_fast import Encoder, EncoderConfig, Ragged, save


def test_the_rival_computes_the_same(tmp_path: Path) -> None:
    config = EncoderConfig.preset("aido-cell-3m", n_layers=2, width=32, n_heads=2, ff_width=48, max_len=70)
    torch.manual_seed(0)
    encoder = Encoder(config, "mlm").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    weights = load_file(save(encoder, tmp_path / "model") / "model.safetensors")
    values = torch.where(torch.rand(3, 70) < 0.5, torch.rand(3, 70) * 5, torch.zeros(3, 70))
    values[0, 4], values[1, 6] = -1.0, -2.0
    shape = {"n_layers": config.n_layers, "n_heads": config.n_heads, "eps": config.eps}
    found = aido_rival.embeddings(weights, values, **shape)
    hidden = encoder(Ragged.from_cells(list(values)))
    expected = torch.stack([rows.mean(0) for rows in hidden.cells()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
