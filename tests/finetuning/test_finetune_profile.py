"""Fine-tuning reports how fast its first model is trained, with what is frozen and which head there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from typed_cells import SHORT, SHORT_GENES, gene_classes

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.report import Report

TWO_EPOCHS = dataclasses.replace(SHORT, epochs=2)


def test_cells(home: Path, tmp_path: Path) -> None:
    gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", folds=2, eval_share=0, recipe=TWO_EPOCHS,
        profile=True,
    )  # fmt: skip
    report = Report.load(tmp_path / "out" / "profile" / "report.json")
    assert (tmp_path / "out" / "profile" / "report.html").stat().st_size > 1000
    assert report.flops.basis == "formula"
    tokens, config = report.tokens, gf.EncoderConfig.from_dict(report.subject.geometry or {})
    assert report.flops.model == 3 * (
        encoder_flops(config, tokens.n_real, tokens.n_real_squares) + head_flops(config, report.cells.n, "cells", 3)
    )
    # Replaced with everything else that was made there.
    gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", eval_share=0, recipe=TWO_EPOCHS, overwrite=True
    )
    assert not (tmp_path / "out" / "profile").exists()


def test_genes_and_frozen_layers(home: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT_GENES, epochs=2)
    gf.finetune_genes(
        home / "tokens", home / "model", gene_classes(), tmp_path / "out", folds=0, recipe=recipe, freeze_layers=2,
        freeze_embeddings=True, profile=tmp_path / "fast.json",
    )  # fmt: skip
    report = Report.load(tmp_path / "fast.json")
    tokens, config = report.tokens, gf.EncoderConfig.from_dict(report.subject.geometry or {})
    blocks = encoder_flops(config, tokens.n_real, tokens.n_real_squares)
    # Nothing of the blocks learns: a forward pass, and the head's weights.
    assert blocks < report.flops.model < 1.05 * blocks  # type: ignore[operator]


def test_the_command(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "fast.json"
    code = main(
        [
            *("finetune", "cells", str(home / "tokens"), "--model", str(home / "model"), "--label", "kind", "--out"),
            *(str(tmp_path / "out"), "--epochs", "3", "--batch-cells", "8", "--eval-share=0", "--quiet", "--profile"),
            str(place),
        ]
    )
    assert code == 0
    assert Report.load(place).subject.mode == "train"
