"""What a folder stands for: every input once, nothing left out without a word, no cell twice."""

from __future__ import annotations

import gzip
import shutil
import warnings

import anndata
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from corpus import GENES, make_cells, small_vocabulary
from formats import written

from geneformer_fast.cli import main
from geneformer_fast.counts import expand_inputs, open_source
from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.run import tokenize


def dense_of(source):
    rows = [
        sp.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, source.n_genes)).toarray()
        for block in source.blocks()
    ]
    return np.concatenate(rows)


def with_dense(n_cells=20, seed=0):
    adata = make_cells(n_cells, seed, storage="dense")
    adata.obs = adata.obs[["cluster"]]
    return adata


def cell_ranger_outs(folder):
    """outs/ of Cell Ranger: the filtered and the raw matrix, each as .h5 and as a folder, and other files."""
    outs = folder / "outs"
    outs.mkdir()
    for name, n_cells in (("filtered", 20), ("raw", 50)):
        adata = with_dense(50)[:n_cells].copy()
        written("10x_h5", adata, folder).rename(outs / f"{name}_feature_bc_matrix.h5")
        written("10x", adata, folder).rename(outs / f"{name}_feature_bc_matrix")
    with h5py.File(outs / "molecule_info.h5", "w") as file:
        file["barcode_idx"] = np.arange(3)
    (outs / "web_summary.html").write_text("<html>")
    return outs


def test_cell_rangers_outs_name_their_choices(tmp_path):
    outs = cell_ranger_outs(tmp_path)
    for given in (outs, f"{outs}/*.h5", f"{outs}/*_matrix"):
        with pytest.raises(InputError, match="holds the same cells more than once") as caught:
            expand_inputs(str(given))
        assert "filtered_feature_bc_matrix" in str(caught.value)
        assert "raw_feature_bc_matrix" in str(caught.value)
    chosen = outs / "filtered_feature_bc_matrix.h5"
    tokens = tokenize(chosen, tmp_path / "tokens", dictionary=small_vocabulary())
    assert tokens.manifest["cells"][0]["read"] == 20


def test_molecules_and_summaries_are_no_counts(tmp_path):
    outs = cell_ranger_outs(tmp_path)
    for name in ("raw_feature_bc_matrix.h5", "raw_feature_bc_matrix", "filtered_feature_bc_matrix"):
        shutil.rmtree(outs / name) if (outs / name).is_dir() else (outs / name).unlink()
    with pytest.warns(UserWarning, match=r"left out: molecule_info\.h5, web_summary\.html"):
        assert expand_inputs(outs) == [outs / "filtered_feature_bc_matrix.h5"]


@pytest.mark.parametrize(
    ("names", "is_twice"),
    [
        (["a.h5ad", "a.zarr"], True),
        (["donor1_raw.h5ad", "donor1_filtered.h5ad"], True),
        (["raw.h5ad", "filtered.h5ad"], True),
        (["cells_x_genes.mature.mtx", "cells_x_genes.nascent.mtx"], True),
        (["a.h5ad", "b.h5ad", "B_cell.h5ad", "T_cell.h5ad", "total.h5ad", "cell.h5ad"], False),
        (["GSM1_filtered.h5", "GSM2_raw.h5"], False),
        (["CD34+.h5ad", "CD34-.h5ad", "αβ.h5ad", "γδ.h5ad", "s(1).h5ad", "s(2).h5ad", "T.h5ad", "t.h5ad"], False),
    ],
)
def test_names_of_the_same_cells(tmp_path, names, is_twice):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith(".zarr") else (tmp_path / name).touch()
        if name.endswith(".zarr"):
            (tmp_path / name / ".zgroup").touch()
    if any(name.endswith(".mtx") for name in names):
        (tmp_path / "cells_x_genes.genes.txt").touch()
        (tmp_path / "cells_x_genes.barcodes.txt").touch()
    if is_twice:
        with pytest.raises(InputError, match="same cells more than once"):
            expand_inputs(tmp_path)
    else:
        assert len(expand_inputs(tmp_path)) == len(names)
    # who names the files one by one means it
    assert len(expand_inputs([tmp_path / name for name in names])) == len(names)


def test_what_a_folder_holds_besides_is_named(tmp_path):
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "b.h5ad.gz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden").write_text("")
    with pytest.warns(UserWarning, match=r"1 inputs are read.*left out: b\.h5ad\.gz, notes\.txt; decompress"):
        assert expand_inputs(tmp_path) == [tmp_path / "a.h5ad"]
    with pytest.raises(InputError, match=r"not a supported format.* Decompress it first"):
        open_source(write_text(tmp_path / "c.h5ad.gz", "anything"))
    (tmp_path / "c.h5ad.gz").unlink()
    (tmp_path / "a.h5ad").unlink()
    with pytest.raises(InputError, match=r"holds no input.*compressed files: decompress"):
        expand_inputs(tmp_path)
    (tmp_path / "b.h5ad.gz").unlink()
    (tmp_path / "outs").mkdir()
    with pytest.raises(InputError, match=r"holds no input.*name one of them \(outs\)"):
        expand_inputs(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no input.* It holds tokens already"):
        expand_inputs(tmp_path)
    (tmp_path / "state.json").unlink()
    (tmp_path / "counts.mtx").write_text("")
    names = r"counts\.features\.tsv and counts\.barcodes\.tsv"
    with pytest.raises(InputError, match=rf"holds no input.* counts\.mtx needs its .* beside it: name them {names}"):
        expand_inputs(tmp_path)


def test_a_matrix_folder_is_silent_unless_other_counts_lie_in_it(tmp_path):
    folder = written("10x", with_dense(), tmp_path)
    (folder / "notes.txt").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expand_inputs(folder) == [folder]
    make_cells(20).write_h5ad(folder / "a.h5ad")
    with pytest.warns(UserWarning, match=r"only the matrix folder .* itself is read.*left out: a\.h5ad"):
        assert expand_inputs(folder) == [folder]


def test_the_same_barcodes_in_two_inputs(tmp_path, capsys):
    vocabulary = small_vocabulary()
    make_cells(200, 1).write_h5ad(tmp_path / "all.h5ad")
    make_cells(200, 1)[:40].copy().write_h5ad(tmp_path / "some.h5ad")
    other = make_cells(200, 2)
    other.obs_names = [*make_cells(200, 1).obs_names[:10], *other.obs_names[10:]]  # 5 %, as by chance
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.warns(UserWarning, match=r"some\.h5ad and .*all\.h5ad share 100% of the cell names") as caught:
        tokens = tokenize(tmp_path, tmp_path / "tokens", dictionary=vocabulary)
    assert len([warning for warning in caught if "cell names" in str(warning.message)]) == 1
    assert ["share 100%" in str(entry["warnings"]) for entry in tokens.manifest["inputs"]] == [False, False, True]
    vocabulary.save(tmp_path / "dictionary")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("all", "some")]
    arguments = ["--dictionary", str(tmp_path / "dictionary"), "--out", str(tmp_path / "again")]
    with pytest.warns(UserWarning, match="share 100%"):
        assert main(["tokenize", *files, *arguments]) == 0
    assert "  warning: " in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(files, tmp_path / "allowed", dictionary=vocabulary, allow_duplicate_cells=True)


def test_row_numbers_are_no_barcodes(tmp_path):
    for name in "ab":
        adata = make_cells(30, 1)
        adata.obs_names = [str(i) for i in range(30)]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tmp_path, tmp_path / "tokens", dictionary=small_vocabulary())


def test_many_names_are_compared_by_a_sample(tmp_path, monkeypatch):
    from geneformer_fast.tokenization import doubts

    monkeypatch.setattr(doubts, "_MOST_HASHES", 500)
    names = doubts.CellNames()
    for seed in (1, 2, 1):
        adata = make_cells(1000, seed)
        with open_source(adata) as source:
            source.name = f"{seed}.{len(names._inputs)}"
            names.add(source)
    assert sum(map(len, names._hashes)) <= 500
    assert list(names.messages()) == ["1.2"]


GEO = {
    "GSM1_a_": ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"),
    "GSM2_b_": ("matrix.mtx", "barcodes.tsv", "genes.tsv"),
    "GSM3.": ("matrix.mtx.gz", "barcodes.tsv.gz", "genes.tsv.gz"),
}


def write_text(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def geo_folder(folder):
    """Prefixed triplets as GEO's archives hold them. Returns prefix -> counts."""
    made = {}
    for seed, (prefix, (matrix, barcodes, features)) in enumerate(GEO.items(), start=1):
        adata = with_dense(20, seed)
        plain = written("10x", adata, folder)
        for old, new in (("matrix.mtx", matrix), ("barcodes.tsv", barcodes), ("features.tsv", features)):
            write_text(folder / f"{prefix}{new}", (plain / old).read_text())
        shutil.rmtree(plain)
        made[prefix] = adata.X
    return made


def test_geos_prefixed_triplets(tmp_path):
    folder = tmp_path / "GSE1_RAW"
    folder.mkdir()
    made = geo_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = expand_inputs(folder)
    assert [path.name for path in found] == ["GSM1_a_matrix.mtx.gz", "GSM2_b_matrix.mtx", "GSM3.matrix.mtx.gz"]
    for path, counts in zip(found, made.values(), strict=True):
        with open_source(path) as source:
            np.testing.assert_array_equal(dense_of(source), counts)
            assert source.gene_ids().tolist() == GENES
    tokens = tokenize(folder, tmp_path / "tokens", dictionary=small_vocabulary())
    assert [tally["read"] for tally in tokens.manifest["cells"]] == [20, 20, 20]
    with pytest.raises(InputError, match=r"several matrices \(GSM1_a_matrix\.mtx\.gz, .*give one of them"):
        open_source(folder)
    (folder / "GSM3.barcodes.tsv.gz").unlink()
    with pytest.warns(UserWarning, match=r"left out: GSM3\.genes\.tsv\.gz, GSM3\.matrix\.mtx\.gz"):
        assert len(expand_inputs(folder)) == 2
    with pytest.raises(InputError, match=r"GSM3\.barcodes\.tsv \(or \.gz\) is missing beside the matrix"):
        open_source(folder / "GSM3.matrix.mtx.gz")


@pytest.mark.parametrize("n_cells", [20, len(GENES)], ids=["oblong", "square"])
def test_kb_pythons_cells_by_genes(tmp_path, n_cells):
    """bustools writes cells x genes; where both are as many, the shape does not tell."""
    adata = with_dense(n_cells)
    scipy.io.mmwrite(tmp_path / "cells_x_genes.mtx", sp.coo_matrix(adata.X), field="real")
    (tmp_path / "cells_x_genes.genes.txt").write_text("".join(f"{gene}.3\n" for gene in GENES))
    (tmp_path / "cells_x_genes.barcodes.txt").write_text("".join(f"{name}\n" for name in adata.obs_names))
    (tmp_path / "cells_x_genes.genes.names.txt").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expand_inputs(tmp_path) == [tmp_path / "cells_x_genes.mtx"]
    for data in (tmp_path / "cells_x_genes.mtx", tmp_path):
        with open_source(data) as source:
            np.testing.assert_array_equal(dense_of(source), adata.X)
            assert source.cell_names().tolist() == adata.obs_names.tolist()
    tokens = tokenize(tmp_path, tmp_path / "tokens", dictionary=small_vocabulary())
    assert tokens.manifest["inputs"][0]["genes"]["versioned"] == len(GENES)


@pytest.mark.parametrize("header", ["integer", "real"])
def test_powers_of_ten_in_a_matrix(tmp_path, monkeypatch, header):
    """R writes 100000 as 1e+05: as a count, and as the number of a cell."""
    from geneformer_fast.counts import tenx_mtx

    monkeypatch.setattr(tenx_mtx, "_BLOCK_BYTES", 256)
    n_cells = 100_001
    entries = [(1 + i % 3, 1 + 7 * i, 2 + i) for i in range(200)]
    lines = [f"{gene} {cell} {count}" for gene, cell, count in entries]
    lines += ["1 99999 1e+05", "3 1e+05 4", "2 100001 2e+00"]
    text = f"%%MatrixMarket matrix coordinate {header} general\n%\n3 {n_cells} {len(lines)}\n" + "\n".join(lines)
    (tmp_path / "matrix.mtx").write_text(text)
    (tmp_path / "genes.tsv").write_text("".join(f"{gene}\n" for gene in GENES[:3]))
    (tmp_path / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(n_cells)))
    expected = np.zeros((n_cells, 3))
    for gene, cell, count in [*entries, (1, 99_999, 100_000), (3, 100_000, 4), (2, 100_001, 2)]:
        expected[cell - 1, gene - 1] = count
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(dense_of(source), expected)


@pytest.mark.parametrize("entry", ["1 2 1.5e+00", "1 2 3e+10", "1 2.5 1", "1 2 many", "1 2 nan"])
def test_numbers_that_are_none_of_a_matrix(tmp_path, entry):
    (tmp_path / "matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate integer general\n3 2 2\n1 1 1\n{entry}\n")
    (tmp_path / "genes.tsv").write_text("".join(f"{gene}\n" for gene in GENES[:3]))
    (tmp_path / "barcodes.tsv").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"matrix\.mtx|X"), open_source(tmp_path) as source:
        dense_of(source)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_marks_of_editors_and_ends_of_lines_are_no_part_of_ids(tmp_path, is_compressed):
    """Files saved on Windows: the mark of UTF-8 before the first id, two characters at the end of a line."""
    adata = with_dense()
    plain = written("10x", adata, tmp_path)
    marked = plain.rename(tmp_path / "marked")
    plain = written("10x", adata, tmp_path)
    for path in sorted(marked.iterdir()):
        content = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(content)
        if is_compressed:
            path.unlink()
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    with open_source(plain) as want, open_source(marked) as got:
        assert got.gene_ids().tolist() == want.gene_ids().tolist() == GENES
        assert got.cell_names().tolist() == want.cell_names().tolist()
        np.testing.assert_array_equal(dense_of(got), dense_of(want))


def test_mudata_says_how_to_take_one_modality(tmp_path):
    path = tmp_path / "cells.h5mu"
    with h5py.File(path, "w") as file:
        for key in ("mod/rna/X", "mod/prot/X", "obs/a", "var/a"):
            file[key] = np.zeros(2)
    with pytest.raises(
        InputError, match=r"MuData .*\(prot, rna\).*read_h5mu\('.*cells\.h5mu'\)\.mod\['rna'\]\.write_h5ad"
    ):
        open_source(path)
    with pytest.raises(InputError, match=r"holds no input.* MuData \(cells\.h5mu\) is not read whole: save one"):
        expand_inputs(tmp_path)
    zarr = pytest.importorskip("zarr", minversion="3")
    zarr.open_group(str(tmp_path / "cells.zarr"), mode="w", zarr_format=2).create_group("mod/rna")
    with pytest.raises(InputError, match=r"mudata\.read_zarr\('.*cells\.zarr'\)\.mod\['rna'\]"):
        open_source(tmp_path / "cells.zarr")

    class MuData:
        mod = ("rna", "prot")

    with pytest.raises(InputError, match=r"from a MuData; give a path or an AnnData: one modality of it"):
        open_source(MuData())


def test_the_parts_of_a_copied_anndata_are_untouched():
    adata = anndata.AnnData(sp.csr_matrix(with_dense().X))
    before = adata.X.copy()
    adata.var["feature_types"] = ["Peaks", *["Gene Expression"] * (adata.n_vars - 1)]
    with open_source(adata) as source:
        np.testing.assert_array_equal(dense_of(source), before.toarray()[:, 1:])
    np.testing.assert_array_equal(adata.X.toarray(), before.toarray())


@pytest.mark.parametrize(
    ("matrix", "features", "barcodes"),
    [
        ("GSM1_matrix_a.mtx.gz", "GSM1_features_a.tsv.gz", "GSM1_barcodes_a.tsv.gz"),
        ("GSM1_counts.mtx", "GSM1_counts.genes.tsv", "GSM1_counts.barcodes.tsv"),
        ("sample.mtx", "sample_genes.txt", "sample_barcodes.txt"),
    ],
)
def test_other_names_of_triplets(tmp_path, matrix, features, barcodes):
    adata = with_dense()
    plain = written("10x", adata, tmp_path)
    for old, new in (("matrix.mtx", matrix), ("features.tsv", features), ("barcodes.tsv", barcodes)):
        write_text(tmp_path / new, (plain / old).read_text())
    shutil.rmtree(plain)
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(dense_of(source), adata.X)
    assert expand_inputs(tmp_path) == [tmp_path / matrix]


def test_a_folder_that_is_looked_at_again_is_spoken_of_once(tmp_path):
    """``embed`` looks three times; Python shows a warning once for each place in the code that gives it."""
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "notes.txt").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        expand_inputs(tmp_path)
        expand_inputs([tmp_path])
    assert len(caught) == 1
