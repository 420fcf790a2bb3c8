"""Real cells: lists of symbols that Geneformer's dictionaries know, for files of Ensembl ids and of symbols."""

from __future__ import annotations

import json
import shutil

import anndata
import numpy as np
import pytest
from value_files import FAMILIES
from value_oracles import aido_row, aligned, scbert_row, scgpt_bins

from geneformer_fast.data.values import cells_of_folder
from geneformer_fast.tokenization.pickles import read_pickle
from geneformer_fast.tokenization.run import tokenize

N_GENES = {"aido-cell": 19_264, "scgpt": 60_694, "scbert": 16_906}
N_CELLS = 40


@pytest.fixture(scope="module")
def symbol_of(shared_dir):
    """Ensembl id -> symbol of Geneformer V2's dictionaries."""
    known = read_pickle(shared_dir / "data" / "dicts" / "gene_name_id_dict_gc95M.pkl")
    return {gene: symbol for symbol, gene in sorted(known.items(), reverse=True)}


@pytest.fixture(scope="module")
def real_lists(tmp_path_factory, shared_dir, symbol_of, lists, cells):
    """Folder per family, of as many symbols as its models have, with the dictionary of other ids beside it."""
    folders, rng = {}, np.random.default_rng(0)
    # Most genes of the published lists are in most files.
    measured = rng.permutation(cells[1].var_names.to_numpy(dtype=object))[:16_000].tolist()
    others = rng.permutation(sorted(set(symbol_of.values()) - set(measured))).tolist()
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        chosen = rng.permutation([*measured, *others][: N_GENES[family]]).tolist()
        if family == "scgpt":
            numbered = {name: i for i, name in enumerate([*chosen, "<pad>", "<cls>", "<eoc>"])}
            (folder / "vocab.json").write_text(json.dumps(numbered))
        else:
            name = {"aido-cell": "OS_scRNA_gene_index.19264.tsv", "scbert": "gene2vec_16906.tsv"}[family]
            lines = [f"{gene}\t{i}\n" for i, gene in enumerate(chosen)]
            (folder / name).write_text("gene_name\tindex\n" + "".join(lines))
        shutil.copy(shared_dir / "data" / "dicts" / "ensembl_mapping_dict_gc95M.pkl", folder)
        shutil.copy(shared_dir / "data" / "dicts" / "gene_name_id_dict_gc95M.pkl", folder)
    return folders


@pytest.fixture(scope="module")
def cells(tmp_path_factory, shared_dir, symbol_of):
    """The first cells of pbmc3k under Ensembl ids, and under the symbols of these."""
    adata = anndata.read_h5ad(shared_dir / "data" / "pbmc3k" / "pbmc3k.h5ad")[:N_CELLS]
    adata = adata[:, adata.var["ensembl_id"].astype(str).isin(symbol_of)].copy()
    folder = tmp_path_factory.mktemp("pbmc3k")
    adata.write_h5ad(folder / "ensembl.h5ad")
    named = anndata.AnnData(adata.X.copy())
    named.obs_names = adata.obs_names
    ids = adata.var["ensembl_id"].astype(str)
    named.var_names = [symbol_of[gene] for gene in ids]
    assert named.var_names.is_unique
    named.write_h5ad(folder / "symbols.h5ad")
    return folder, named


@pytest.mark.parametrize("family", FAMILIES)
def test_real_cells(family, real_lists, cells, tmp_path):
    folder, named = cells
    given = {"family": family, "dictionary": real_lists[family], "progress": False}
    given |= {"options": {"min_genes": 1}} if family == "scbert" else {}
    with tokenize(folder / "symbols.h5ad", tmp_path / "symbols", **given) as tokens:
        tokens.on_read = cells_of_folder(tokens)
        values, bounds = tokens.read(np.arange(tokens.n_cells))
        assert tokens.n_cells == N_CELLS
        genes = tokens.manifest["inputs"][0]["genes"]
    with tokenize(folder / "ensembl.h5ad", tmp_path / "ensembl", **given) as again:
        again.on_read = cells_of_folder(again)
        same, _ = again.read(np.arange(again.n_cells))
        assert again.manifest["inputs"][0]["genes"]["aliased"] > 0.7 * genes["matched"]
    assert np.array_equal(values, same)
    names = _names(real_lists[family])
    assert len(names) == N_GENES[family] or family == "scgpt"
    counts, there = aligned(named, names)
    for cell in range(0, N_CELLS, 7):
        found = values[bounds[cell] : bounds[cell + 1]]
        if family == "aido-cell":
            assert len(found) == 19_266
            expected = aido_row(counts[cell], there).astype(np.float32)
            np.testing.assert_array_max_ulp(found, expected, maxulp=1)
        elif family == "scbert":
            assert len(found) == 16_907
            assert found.tolist() == scbert_row(counts[cell]).tolist()
        else:
            places = np.flatnonzero(counts[cell])
            bins = scgpt_bins(counts[cell][places], np.full(len(places), 0.5))
            expected = dict(zip(places.tolist(), bins.tolist(), strict=True))
            kept = dict(zip(found[1:, 0].astype(int).tolist(), found[1:, 1].astype(int).tolist(), strict=True))
            assert len(kept) == min(1199, len(places))
            assert kept.items() <= expected.items()


def _names(folder):
    """The names of a list, in the order of their numbers."""
    if (folder / "vocab.json").exists():
        return [name for name in json.loads((folder / "vocab.json").read_text()) if name[0] != "<"]
    (table,) = folder.glob("*.tsv")
    return [line.split("\t")[0] for line in table.read_text().splitlines()[1:]]
