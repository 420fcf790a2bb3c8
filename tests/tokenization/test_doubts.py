"""Warnings about what can be read but is probably not meant, with the consequence; and the maximal length."""

from __future__ import annotations

import json
import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from corpus import GENES, make_cells, small_vocabulary
from oracle import as_lists

from geneformer_fast.cli import main
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.tokenization import run
from geneformer_fast.tokenization.medians import medians
from geneformer_fast.tokenization.run import tokenize, tokenize_anndata
from geneformer_fast.tokenization.vocabulary import Vocabulary


def with_totals(factor, n_cells=100):
    adata = make_cells(n_cells)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel().astype(np.float64) * factor
    return adata


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.0, None),
        (1.2, None),  # a few genes were removed
        (np.where(np.arange(100) % 20 == 0, 0.5, 1.0), None),  # 5 % of the cells
        (2.0, "98 of 98 cells have counts that add up to less than 80% of n_counts: genes were removed"),
        (0.5, "98 of 98 cells have counts that add up to more than obs column n_counts says: these are not the counts"),
        (np.where(np.arange(100) % 4 == 0, 0.5, 1.0), "25 of 98 cells"),
    ],
)
def test_totals_that_do_not_fit(factor, said, tmp_path, capsys):
    adata = with_totals(factor)
    vocabulary = small_vocabulary()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = tokenize(adata, tmp_path / "tokens", dictionary=vocabulary)
        memory = tokenize_anndata(adata, vocabulary)
        medians(adata, tmp_path / "medians")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (0 if said is None else 3)
    assert all(said in message and "--n-counts computed" in message for message in messages)
    assert tokens.manifest["cells"] == memory.report["cells"]
    corpus = json.loads((tmp_path / "medians" / "corpus.json").read_text())
    assert [said in message for message in corpus["inputs"][0]["warnings"]] == ([] if said is None else [True])
    vocabulary.save(tmp_path / "dictionary")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--dictionary", str(tmp_path / "dictionary"), "--out", str(tmp_path / "again")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["tokenize", str(tmp_path / "cells.h5ad"), *arguments]) == 0
    assert ("warning: " in capsys.readouterr().out) == (said is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_anndata(adata, vocabulary, n_counts="computed")


def test_totals_are_looked_at_where_a_pass_begins_also_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BLOCK_ROWS", 16)
    path = tmp_path / "cells.h5ad"
    with_totals(2.0).write_h5ad(path)
    options = {"dictionary": small_vocabulary(), "shard_bytes": 200}
    original, done = run.TokenOutput.write, []

    def stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.TokenOutput, "write", stop)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="less than 80%"):
        tokenize(path, tmp_path / "out", **options)
    monkeypatch.setattr(run.TokenOutput, "write", original)
    tokens = tokenize(path, tmp_path / "out", resume=True, **options)
    assert tokens.manifest["cells"][0]["totals_below"] == tokens.manifest["cells"][0]["totals_looked_at"] == 14


def large_vocabulary(n_genes=12_000):
    return Vocabulary.from_medians({f"ENSG{i:011d}": 1.0 + i % 5 for i in range(n_genes)})


@pytest.mark.parametrize(("n_genes", "is_selection"), [(2000, True), (3000, True), (5000, True), (8000, False)])
def test_a_selection_of_variable_genes(n_genes, is_selection, tmp_path):
    counts = sp.random(30, n_genes, density=0.05, format="csr", random_state=0)
    counts.data[:] = 3
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = [f"ENSG{i:011d}" for i in range(n_genes)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.obs_names = [f"other{i}" for i in range(30)]
    adata.write_h5ad(tmp_path / "b.h5ad")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = tokenize(tmp_path, tmp_path / "tokens", dictionary=large_vocabulary())
    said = [str(warning.message) for warning in caught]
    assert len(said) == is_selection, "files with the same genes are named once"
    assert all(f"X has only {n_genes:,} genes" in message and "highly variable" in message for message in said)
    assert [len(entry["warnings"]) for entry in tokens.manifest["inputs"]] == [is_selection] * 2


def test_a_small_vocabulary_knows_no_selections():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_anndata(make_cells(30), small_vocabulary())


@pytest.mark.parametrize("family", ["v1", "v2", "bionemo"])
def test_max_len_cuts_as_the_official_tool_does(family, tmp_path):
    """The longest cells keep their highest ranks, between CLS and EOS where the family has them."""
    vocabulary, adata = small_vocabulary(family, max_len=130), make_cells(60)
    whole = as_lists(*tokenize_anndata(adata, vocabulary)[:2])
    for max_len in (3, 17, 130):
        cut = tokenize_anndata(adata, vocabulary, max_len=max_len)
        kept = max_len - (vocabulary.cls_id is not None) - (vocabulary.eos_id is not None)
        first, last = vocabulary.cls_id is not None, vocabulary.eos_id is not None
        expected = []
        for cell in whole:
            genes = cell[first : len(cell) - last]
            expected.append([*cell[:first], *genes[:kept], *cell[len(cell) - last :]])
        assert as_lists(*cut[:2]) == expected
        assert max(map(len, expected)) <= max_len
        assert cut.report["options"]["max_len"] == max_len
        assert cut.report["cells"][0]["full"] == sum(len(cell) == max_len for cell in expected)
        assert cut.report["vocabulary"]["fingerprint"] == vocabulary.fingerprint, "still the model's vocabulary"


@pytest.mark.parametrize("max_len", [0, 2, -5, 41, 4096])
def test_max_len_out_of_range(max_len):
    with pytest.raises(InputError, match=rf"max_len \(--max-len\) must be a whole number from 3 to 40.*{max_len!r}"):
        tokenize_anndata(make_cells(20), small_vocabulary(), max_len=max_len)


def test_max_len_and_few_genes_on_the_command_line(tmp_path, capsys):
    small_vocabulary().save(tmp_path / "dictionary")
    adata = make_cells(30)
    adata.var_names = [gene if i < 30 else f"{gene}/x" for i, gene in enumerate(GENES)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = [
        str(tmp_path / "cells.h5ad"),
        "--dictionary",
        str(tmp_path / "dictionary"),
        "--out",
        str(tmp_path / "t"),
    ]
    assert main(["tokenize", *arguments]) == 2
    assert "30 of 120 gene ids match" in capsys.readouterr().err
    assert main(["tokenize", *arguments, "--allow-few-genes", "--max-len", "9"]) == 0
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert (manifest["options"]["max_len"], manifest["options"]["allow_few_genes"]) == (9, True)
    assert manifest["cells"][0]["full"] > 0
    assert main(["tokenize", *arguments, "--allow-few-genes", "--max-len", "50", "--overwrite"]) == 2
    assert "from 3 to 40" in capsys.readouterr().err
    assert main(["medians", arguments[0], "--dictionary", arguments[2], "--out", str(tmp_path / "m")]) == 2
    assert (
        main(["medians", arguments[0], "--dictionary", arguments[2], "--out", str(tmp_path / "m"), "--allow-few-genes"])
        == 0
    )


def test_resuming_with_another_length_is_refused(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_cells(30).write_h5ad(path)
    tokenize(path, tmp_path / "out", dictionary=small_vocabulary(), max_len=9)
    with pytest.raises(OutputError, match=r"options\.max_len: begun with 9, now 10"):
        tokenize(path, tmp_path / "out", dictionary=small_vocabulary(), max_len=10, resume=True)
