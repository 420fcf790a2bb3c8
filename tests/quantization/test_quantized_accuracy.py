"""Real cells, and weights that were trained on them: what users see of a model survives eight bits.

Random weights have no outliers, and cells of their making are all alike; so a small encoder is trained here, and in the
slow test one of Geneformer V1-10M's shape.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from outliers import with_outliers

import geneformer_fast as gf
from bench import quantize_real
from geneformer_fast import Encoder, EncoderConfig, Vocabulary
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.loader import read_ragged
from geneformer_fast.data.masking import Masking, mask_genes
from geneformer_fast.data.random import CellRandom
from geneformer_fast.quantization.build import quantized
from geneformer_fast.quantization.calibrate import as_anywhere, calibrate
from geneformer_fast.quantization.check import check
from geneformer_fast.quantization.choices import SCHEMES
from geneformer_fast.quantization.quantize import quantize

N_GENES, MAX_LEN, STEPS, BATCH_CELLS = 400, 48, 100, 10


@pytest.fixture(scope="module")
def tokens(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 sorted cells in the genes that vary most between them."""
    import anndata

    file = shared_dir / "data" / "pbmc_facs" / "pbmc_facs_test100.h5ad"
    adata = anndata.read_h5ad(file)
    logs = np.log1p(adata.X.toarray())
    chosen = np.sort(np.argsort(-logs.var(0), kind="stable")[:N_GENES])
    genes = [str(gene) for gene in adata.var["ensembl_id"].iloc[chosen]]
    medians = dict(zip(genes, logs[:, chosen].mean(0).tolist(), strict=True))
    words = Vocabulary.from_medians(medians, "v1", name="variable", max_len=MAX_LEN)
    folder = tmp_path_factory.mktemp("accuracy") / "tokens"
    gf.tokenize(str(file), folder, dictionary=words, allow_few_genes=True, progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(tokens: Path) -> Encoder:
    """An encoder that has learned a little of which genes go together: its loss has fallen."""
    torch.manual_seed(0)
    with gf.open_tokens(tokens) as folder:
        identity = folder.vocabulary
        assert identity is not None
        config = EncoderConfig(
            n_layers=3, width=64, n_heads=2, ff_width=128, vocab_size=identity["n_tokens"], max_len=MAX_LEN,
            dropout=0.0, attention_dropout=0.0, vocabulary=identity["name"],
            vocabulary_fingerprint=identity["fingerprint"],
        )  # fmt: skip
        made, kinds = Encoder(config, head="mlm").train(), TokenKinds.of(identity, config)
        optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
        rng, losses = np.random.default_rng(0), []
        for step in range(STEPS):
            slots = rng.choice(folder.n_cells, BATCH_CELLS, replace=False)
            batch = mask_genes(read_ragged(folder, slots), kinds, Masking(), CellRandom(0, step, slots))
            loss = made.mlm_loss(made(batch.tokens), batch.rows, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    return made.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_users_see_of_a_trained_model_holds(trained: Encoder, tokens: Path, scheme: str) -> None:
    found = check(trained, as_anywhere(quantize(trained, scheme=scheme)), tokens, layer="last", progress=False)
    assert found.is_held, found.as_text()


def test_outliers_miss_it_and_calibration_brings_it_back(trained: Encoder, tokens: Path) -> None:
    made = with_outliers(copy.deepcopy(trained), 100.0)
    plain = check(made, as_anywhere(quantize(made)), tokens, layer="last", progress=False)
    assert not plain.is_held, plain.as_text()
    calibrated = calibrate(made, tokens)
    smoothed = {name for name, choice in calibrated.choices.items() if choice.smooth is not None}
    assert smoothed == {f"blocks.{index}.{layer}" for index in range(3) for layer in ("out", "down")}
    found = check(made, as_anywhere(quantized(made, calibrated.choices)), tokens, layer="last", progress=False)
    assert found.is_held, found.as_text()


@pytest.mark.slow
def test_a_model_of_the_published_shape_holds(shared_dir: Path, tmp_path: Path) -> None:
    """Everything the study does, with less training: some minutes of one core."""
    arguments = ["--work", str(tmp_path), "--seconds", "240", "--cells", "300", "--calibration-cells", "64"]
    arguments += ["--classifier-cells", "400", "--classifier-tokens", "128", "--classifier-epochs", "2"]
    rows = quantize_real.run(quantize_real.arguments_of(arguments))
    assert len(rows) == 3 * len(SCHEMES)
    for name, row in rows.items():
        best = row.get("calibrated", row["plain"])
        assert best["is_held"], (name, best)
    assert rows["trained, int8"]["plain"]["is_held"]
    assert not rows["with outliers, int8"]["plain"]["is_held"]
