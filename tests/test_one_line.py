"""What a notebook shows of a result is one line, however large the result is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys

import geneformer_fast as gf
from geneformer_fast.finetuning.outputs import Finetuned
from geneformer_fast.quantization.report import Layer
from geneformer_fast.quantization.report import Report as Quantized


def test_tokens_in_memory() -> None:
    tokenized = gf.tokenize(toys.cells(9), dictionary=toys.vocabulary())
    told = f"TokenizedCells(9 cells, {len(tokenized.values)} tokens)"
    assert repr(tokenized) == str(tokenized) == told


def test_a_packed_batch() -> None:
    batch = gf.Ragged.from_cells([torch.arange(3), torch.arange(2000)])
    assert repr(batch) == "Ragged(2 cells, values [2003] torch.int64 on cpu, max_len=2000)"


@pytest.mark.parametrize(
    ("tasks", "told"),
    [({"kind": {}, "sex": {}}, "kind, sex, 1,234 cells tested"), ({}, "no scores, nothing tested")],
)
def test_a_fine_tuning(tasks: dict[str, object], told: str) -> None:
    scores = {"tasks": tasks, "n": 1234, "of": "cells", "n_folds": 1}
    assert repr(Finetuned(Path("out"), None, scores)) == f"Finetuned('out': {told})"


def test_a_quantized_model() -> None:
    layers = [Layer(f"blocks.{i}", "int8", False, 40.0, 2_000_000, 1_000_000, "", None) for i in range(50)]
    found = repr(Quantized("int8", layers, 5_000_000, 5_000_000))
    assert found == "Report(int8: 50 of 50 layers in eight bits, 105.0 MB -> 55.0 MB)"
