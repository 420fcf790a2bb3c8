"""Corpus medians against numpy's, exactly, whatever the memory."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.cli import main
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.tokenization import medians as module
from geneformer_fast.tokenization.medians import medians
from geneformer_fast.tokenization.quantiles import MedianSearch
from geneformer_fast.tokenization.vocabulary import Vocabulary

anndata = pytest.importorskip("anndata")

GENES = [f"ENSG{i:011d}" for i in range(40)]


def _search(groups, memory_bytes, block=7):
    """Medians of lists of positive numbers through the search, and how many passes it took."""
    genes = np.concatenate([np.full(len(group), i, dtype=np.int32) for i, group in enumerate(groups)])
    values = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    order = np.random.default_rng(0).permutation(len(genes))
    genes, values = genes[order], values[order]
    search, n_passes = MedianSearch(len(groups), memory_bytes), 0
    while not search.is_done:
        for start in range(0, max(len(genes), 1), block):
            search.add(genes[start : start + block], values[start : start + block])
        search.end_pass()
        n_passes += 1
        assert n_passes < 40, "the search does not converge"
    return search, n_passes


def _numpy(groups):
    return [np.median(group) if len(group) else np.nan for group in groups]


POSITIVE = st.one_of(
    st.floats(1e-300, 1e300, allow_nan=False),
    st.sampled_from([0.5, 1.0, 1.0 + 2**-52, 3.3e-7, 1e4, 2.0**-12, 2.0**15, 5e-324, 1.7e308]),
)


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.lists(POSITIVE, max_size=30), min_size=1, max_size=5), memory=st.sampled_from([0, 64, 10**6]))
def test_any_numbers_in_any_memory(groups, memory):
    search, _ = _search(groups, memory)
    assert search.counts.tolist() == [len(group) for group in groups]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(search.medians, _numpy(groups))


@pytest.mark.parametrize(("memory", "most_passes"), [(0, 20), (100_000, 8), (10**8, 2)])
def test_many_values(memory, most_passes):
    """Heavy ties, two far modes of equal size (the middle straddles), values outside of the first interval."""
    rng = np.random.default_rng(1)
    groups = [
        rng.lognormal(1, 1, 20_001),
        rng.lognormal(1, 1, 20_000),
        np.full(9_999, 3.25),
        np.repeat([1.0, 4096.5], 5_000),
        rng.integers(1, 4, 10_001) / 3,
        rng.random(5_000) * 1e-9 + 1e-12,
        rng.random(5_001) * 1e9 + 1e6,
        np.repeat([1e-9, 2.0], 500),
        np.repeat([2.0, 1e9], 500),
    ]
    search, n_passes = _search(groups, memory, block=4096)
    np.testing.assert_array_equal(search.medians, _numpy(groups))
    assert n_passes <= most_passes


def _brute(adata, ids, n_counts):
    x = np.asarray(adata.X.todense() if sp.issparse(adata.X) else adata.X, dtype=np.float64)
    genes = sorted(set(ids))
    summed = np.stack([x[:, [i for i, other in enumerate(ids) if other == gene]].sum(1) for gene in genes], axis=1)
    values = summed / np.asarray(n_counts, dtype=np.float64)[:, None] * 10000
    return {
        gene: np.median(column[column > 0]) for gene, column in zip(genes, values.T, strict=True) if (column > 0).any()
    }


def _adata(seed, n_cells=60, ids=GENES):
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(
        (rng.poisson(1.5, (n_cells, len(ids))) * (rng.random((n_cells, len(ids))) < 0.4)).astype("float32")
    )
    adata = anndata.AnnData(x)
    adata.obs_names = [f"{seed}-{i}" for i in range(n_cells)]
    adata.var["ensembl_id"] = list(ids)
    adata.var_names = [f"g{i}" for i in range(len(ids))]
    adata.obs["n_counts"] = np.asarray(x.sum(1)).ravel() + 5.0
    return adata


def test_versions_and_duplicates_are_one_gene(tmp_path):
    ids = [*GENES[:30], GENES[0], f"{GENES[1]}.4", *GENES[30:38]]
    adata = _adata(1, ids=ids)
    got = medians(adata)
    want = _brute(adata, [i.split(".")[0] for i in ids], adata.obs["n_counts"])
    assert got.medians == want
    assert list(got.token_ids) == sorted(want)
    assert set(got.token_ids.values()) == set(range(4, 4 + len(want)))


@pytest.mark.parametrize("workers", [1, 3])
def test_several_files_and_both_totals(tmp_path, workers):
    parts = [_adata(2, ids=GENES[:35]), _adata(3, ids=GENES[5:])]
    for i, part in enumerate(parts):
        part.write_h5ad(tmp_path / f"part{i}.h5ad")
    dense = np.zeros((120, 40))
    dense[:60, :35], dense[60:, 5:] = parts[0].X.toarray(), parts[1].X.toarray()
    whole = anndata.AnnData(dense)
    totals = np.concatenate([part.obs["n_counts"] for part in parts])
    got = medians(tmp_path, tmp_path / "vocabulary", workers=workers, name="mine", family="v1")
    assert got.medians == _brute(whole, GENES, totals)
    saved = Vocabulary.from_folder(tmp_path / "vocabulary")
    assert saved.fingerprint == got.fingerprint
    assert (saved.name, saved.family, min(saved.token_ids.values())) == ("mine", "v1", 2)
    corpus = json.loads((tmp_path / "vocabulary" / "corpus.json").read_text())
    detected = (dense > 0).sum(0)
    assert corpus["cells_per_gene"] == {gene: int(n) for gene, n in zip(GENES, detected, strict=True) if n}
    computed = medians(sorted(tmp_path.glob("*.h5ad")), n_counts="computed", workers=workers)
    assert computed.medians == _brute(whole, GENES, np.maximum(dense.sum(1), 1e-300))


def test_filter_pass_and_min_cells():
    adata = _adata(4)
    adata.obs["filter_pass"] = np.arange(60) % 3 == 0
    kept = adata[adata.obs["filter_pass"]].copy()
    assert medians(adata).medians == _brute(kept, GENES, kept.obs["n_counts"])
    assert medians(adata, filter_pass=False).medians == _brute(adata, GENES, adata.obs["n_counts"])
    detected = np.asarray((kept.X > 0).sum(0)).ravel()
    cut = int(np.median(detected))
    assert set(medians(adata, min_cells=cut).token_ids) == {GENES[i] for i in np.flatnonzero(detected >= cut)}
    with pytest.raises(InputError, match="1000 cells or more"):
        medians(adata, min_cells=1000)


def test_command_and_what_it_refuses(tmp_path, capsys):
    _adata(5).write_h5ad(tmp_path / "a.h5ad")
    arguments = ["medians", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / "v"), "--family", "v1", "--quiet"]
    assert main(arguments) == 0
    assert Vocabulary.from_folder(tmp_path / "v").family == "v1"
    assert main(arguments) == 2
    assert "holds a vocabulary already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    with pytest.raises(OutputError, match="no folder"):
        medians(tmp_path / "a.h5ad", tmp_path / "a.h5ad")


def test_real_cells_and_the_official_mapping(shared_dir):
    """Every gene of 3,774 real cells, collapsed by the official mapping, against numpy."""
    adata = anndata.read_h5ad(shared_dir / "data/pbmc_facs/pbmc_facs.h5ad")
    mapping = Vocabulary.from_folder(shared_dir / "data/dicts", "v2")
    got = medians(shared_dir / "data/pbmc_facs/pbmc_facs.h5ad", dictionary=mapping, name="pbmc")
    targets = [mapping.aliases.get(i.upper()) for i in adata.var["ensembl_id"]]
    genes = sorted({gene for gene in targets if gene in mapping.token_ids})
    index = {gene: i for i, gene in enumerate(genes)}
    rows = [i for i, gene in enumerate(targets) if gene in index]
    collapse = sp.csr_matrix(
        (np.ones(len(rows)), (rows, [index[targets[i]] for i in rows])), (adata.n_vars, len(genes))
    )
    summed = (adata.X.astype(np.float64) @ collapse).tocsc()
    totals = adata.obs["n_counts"].to_numpy()
    for i in range(len(genes)):
        column = slice(summed.indptr[i], summed.indptr[i + 1])
        values = summed.data[column] / totals[summed.indices[column]] * 10000
        assert (got.medians.get(genes[i]) if len(values) else None) == (np.median(values) if len(values) else None)


def test_one_process_at_a_time_and_nothing_of_another_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "vocabulary"
    with folder_lock(out), pytest.raises(OutputError, match="is being written by another process"):
        medians(_adata(1), out)
    out.rmdir()
    with pytest.raises(InputError, match="no gene is found"):
        medians(_adata(1), out, min_cells=10_000)
    assert not out.exists()

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.undo()
        medians(_adata(2), folder)  # another process comes first, and ends
        with folder_lock(folder):
            yield

    monkeypatch.setattr(module, "folder_lock", late)
    with pytest.raises(OutputError, match="holds a vocabulary already"):
        medians(_adata(1), out)
    assert Vocabulary.from_folder(out).medians == medians(_adata(2)).medians
