"""The study of unequal classes, on made-up cells: it runs, is not computed twice, and judges what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from bench import machine
from bench.child import ChildRun
from bench.imbalance import __main__ as command
from bench.imbalance import process, report
from bench.imbalance.findings import difference, findings
from bench.imbalance.objectives import MaskedBins, MaskedValues
from bench.imbalance.study import MODELS, WAYS, Asked, Row, Study
from geneformer_fast.data.random import CellRandom
from geneformer_fast.ragged import Ragged

# Most genes of a file are not among those that vary most, as in real files; here they are not expressed.
N_GENES, N_SILENT, N_CELLS = 40, 400, 90
SMALL = {
    "genes-per-file": 9, "max-len": 24, "n-layers": 2, "width": 32, "pretraining-steps": 3, "steps": 2,
    "batch-cells": 8, "folds": 2,
}  # fmt: skip


def made_up(path: Path, seed: int) -> Path:
    """Three types, each with genes of its own."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(N_CELLS) % 3
    rates = np.where(np.arange(N_GENES)[None] % 3 == kinds[:, None], 3.0, 0.5)
    ids = [f"ENSG{gene:011d}" for gene in range(1, N_GENES + N_SILENT + 1)]
    adata = anndata.AnnData(sp.csr_matrix(np.pad(rng.poisson(rates), ((0, 0), (0, N_SILENT))).astype(np.float32)))
    adata.var = pd.DataFrame({"ensembl_id": ids}, index=ids)
    adata.obs = pd.DataFrame(
        {"kind": pd.Categorical.from_codes(kinds, ["a", "b", "c"])}, index=[f"{seed}-{cell}" for cell in range(N_CELLS)]
    )
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("cells")
    return made_up(place / "cells.h5ad", 0), made_up(place / "others.h5ad", 1)


def arguments(files: tuple[Path, Path], work: Path) -> list[str]:
    cells, others = files
    asked = ["--work", str(work), "--cells", str(cells), "--label", "kind", "--rare", "b"]
    return [*asked, "--unlabelled", str(others), *(f"--{name}={value}" for name, value in SMALL.items())]


def in_this_process(study: Study, name: str, what: str, seconds: float) -> ChildRun:
    """What a process of its own does, without its start."""
    process.main(str(study.work), name, what, seconds)
    return ChildRun(1.0, 1.0, 10**9)


@pytest.mark.slow
def test_a_process_per_model(files, tmp_path, monkeypatch) -> None:
    """No time is given: everything is prepared, and each model begins no training but says so."""
    monkeypatch.setenv(machine.OUT, str(tmp_path / "out"))
    assert command.main([*arguments(files, tmp_path / "work"), "--seconds=0"]) == 0
    result = json.loads((tmp_path / "out/imbalance.json").read_text())
    assert result["n_rows"] == 0
    assert [finding["verdict"] for finding in result["findings"][:2]] == [None, None]
    assert all(5e7 < result["models"][name]["peak_bytes"] < 2e10 for name in MODELS)


def test_the_whole_study(files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(machine.OUT, str(tmp_path / "out"))
    monkeypatch.setattr(command, "_child", in_this_process)
    asked = arguments(files, tmp_path / "work")
    assert command.main(asked) == 0
    result = json.loads((tmp_path / "out/imbalance.json").read_text())
    assert result["n_rows"] == result["n_rows_asked"] == 2 * (4 * 16 - 3)
    for name in MODELS:
        model = result["models"][name]
        assert model["peak_bytes"] == 10**9
        assert model["seconds_per_epoch"] > 0
        assert set(result["rows"][name]["0.05"]) == set(WAYS)
        assert all("rare_f1" in row for table in result["rows"][name].values() for row in table.values())
    # Dense for scBERT, the genes of the list and one position; ranks with CLS and EOS for Geneformer.
    assert (
        result["models"]["scbert"]["longest"]
        == len(json.loads((tmp_path / "work/genes.json").read_text())["genes"]) + 1
    )
    assert result["models"]["geneformer"]["longest"] <= SMALL["max-len"]
    # Genes tell the types apart, so that PCA does wherever enough cells are left.
    assert result["rows"]["pca"]["1"]["plain"]["macro_f1"]["mean"] > 0.7
    assert (tmp_path / "out/imbalance.svg").stat().st_size > 1000
    assert "over-sampling helps all three models" in capsys.readouterr().out

    def nothing(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(command, "_child", nothing)
    assert command.main(asked) == 0
    title, header, rows, _, note = report.table(json.loads((tmp_path / "out/imbalance.json").read_text()))
    assert "other files" in title
    assert len(rows) == 4 * 16 - 3
    assert {len(row) for row in rows} == {len(header)}
    assert sum("**" in row[2] for row in rows) >= 4
    assert "scBERT needs least memory; here" in note
    assert "were computed" not in note
    with pytest.raises(SystemExit, match="asked for otherwise"):
        command.main([*asked, "--steps=9"])


def test_only_training_cells_of_one_class_are_cut(files, tmp_path) -> None:
    cells, others = files
    study = Study(tmp_path, Asked(str(cells), "kind", "b", (str(others),), folds=3))
    codes, names = study.labels()
    whole, fifth, least = (study.split(share, 1) for share in (1.0, 0.2, 0.01))
    counts = [np.bincount(codes[split.train], minlength=3).tolist() for split in (whole, fifth, least)]
    assert names == ["a", "b", "c"]
    assert counts == [[20, 20, 20], [20, 4, 20], [20, 1, 20]]
    assert set(least.train) < set(fifth.train) < set(whole.train)
    assert whole.test.tolist() == least.test.tolist()
    assert not set(whole.train) & set(whole.test)


def test_a_row_that_is_there_is_not_missing(files, tmp_path) -> None:
    study = Study(tmp_path, Asked(str(files[0]), "kind", "b", (str(files[1]),), folds=2))
    row = Row("scgpt", 0.2, "focal", 1)
    assert row in study.missing("scgpt")
    study.keep(row, {"error": "the loss is nan"})
    assert row not in study.missing("scgpt")
    assert study.found() == {row: {"error": "the loss is nan"}}


def table(plain, other, way="over-sampled", whole=0.8):
    return {
        "1": {"plain": {"fold_numbers": [0, 1, 2], "macro_f1": {"mean": whole, "folds": [whole] * 3}}},
        "0.2": {
            "plain": {"fold_numbers": [0, 1, 2], "macro_f1": {"folds": plain}},
            way: {"fold_numbers": [0, 1, 2], "macro_f1": {"folds": other}},
        },
    }


def test_what_was_published_is_judged_by_the_rows() -> None:
    better = table([0.5, 0.6, 0.7], [0.61, 0.7, 0.79])
    mean, error = difference(better, "over-sampled")
    assert (mean, error) == pytest.approx((0.1, 0.01 / 3**0.5))
    sizes = {
        name: {"peak_bytes": size, "seconds_per_epoch": size} for name, size in zip(MODELS, (3, 1, 2), strict=True)
    }
    baseline = {"pca": table([], [], whole=0.9)}
    found = findings({**baseline, **dict.fromkeys(MODELS, better)}, sizes)
    assert [finding["verdict"] for finding in found] == [True, None, False, True]
    # One model that it does not help is enough; a difference within the noise is no help.
    noisy = table([0.5, 0.6, 0.7], [0.8, 0.4, 0.7])
    assert findings({**baseline, "scgpt": noisy}, {})[0]["verdict"] is False
    under = dict.fromkeys(MODELS, table([0.5, 0.6, 0.7], [0.3, 0.4, 0.6], "under-sampled"))
    assert findings({**baseline, **under}, {})[1]["verdict"] is True
    # Who has learned nothing shows nothing, whichever way it goes, and that is said.
    guesses = dict.fromkeys(MODELS, table([0.03, 0.03, 0.03], [0.07, 0.08, 0.09], whole=0.4))
    (over, *_) = findings({**baseline, **guesses}, {})
    assert over["verdict"] is None
    assert "scBERT +0.050 ± 0.006, but it has learned too little" in over["ours"]
    assert findings(guesses, {})[0]["verdict"] is None
    assert [finding["verdict"] for finding in findings({}, {})] == [None] * 4
    # Folds are paired by their numbers: one that failed on either side leaves both out.
    broken = table([0.5, 0.6, 0.7], [0.7])
    broken["0.2"]["over-sampled"]["fold_numbers"] = [2]
    assert difference(broken, "over-sampled") is None


def test_values_are_hidden_and_cls_is_not() -> None:
    genes = torch.stack([torch.arange(200).float(), torch.full((200,), 7.0)], 1)
    cells = Ragged.from_lengths(genes, [120, 80])
    batch = MaskedValues().collate(cells, np.arange(2), CellRandom(0, 0, np.arange(2)))
    shown = batch.tokens.values
    assert 40 < len(batch.rows) < 120
    assert shown[batch.rows, 1].unique().tolist() == [-1.0]
    assert batch.targets.unique().tolist() == [7.0]
    assert torch.equal(shown[:, 0], genes[:, 0])
    assert (shown[[0, 120], 1] == 7).all()
    assert (genes[:, 1] == 7).all()
    assert MaskedValues().error(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])).item() == 4.0


def test_bins_of_expressed_genes_alone_are_hidden() -> None:
    bins = torch.tensor([0, 3] * 300)
    batch = MaskedBins().collate(Ragged.from_lengths(bins, [600]), np.arange(1), CellRandom(0, 0, np.arange(1)))
    assert 20 < len(batch.rows) < 80
    assert batch.targets.unique().tolist() == [3]
    assert batch.tokens.values[batch.rows].unique().tolist() == [6]
    assert (bins[::2] == batch.tokens.values[::2]).all()
