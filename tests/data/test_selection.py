"""Which cells are taken: by values of columns of every type, and by a draw that a seed decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import toys

import geneformer_fast as gf
from geneformer_fast.cli import build_parser, main
from geneformer_fast.cli.selection import parsed_where
from geneformer_fast.counts.source import CountSource
from geneformer_fast.data.selection import Selection
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.tokenization.inputs import ReadOptions

N = 40
COLUMNS = ("kind", "batch", "share", "is_primary", "word", "patchy")


def cells(n: int = N, *, prefix: str = "cell", empty: tuple[int, ...] = ()) -> anndata.AnnData:
    made = toys.cells(n, prefix=prefix, empty=empty)
    made.obs["kind"] = pd.Categorical([("B", "NK", "T cell, naive")[i % 3] for i in range(n)])
    made.obs["batch"] = np.arange(n) % 4
    made.obs["share"] = (np.arange(n) % 5) / 4
    made.obs["is_primary"] = np.arange(n) % 2 == 0
    made.obs["word"] = [str(i % 4) for i in range(n)]
    made.obs["patchy"] = [None if i % 2 else "there" for i in range(n)]
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, adata = tmp_path_factory.mktemp("selection"), cells()
    adata.write_h5ad(folder / "cells.h5ad")
    words = toys.vocabulary()
    gf.tokenize(adata, folder / "tokens", dictionary=words, obs=COLUMNS, progress=False)
    gf.save(toys.encoder(words), folder / "model")
    words.save(folder / "model")
    return folder


def taken(home: Path, source: str, **asked: Any) -> list[int]:
    """The rows that are taken of one source."""
    selection = Selection.of(asked.get("where"), asked.get("max_cells"), asked.get("seed"))
    assert selection is not None
    if source == "tokens":
        with gf.open_tokens(home / "tokens") as folder:
            return selection.cells_of(folder).tolist()
    data = home / "cells.h5ad" if source == "file" else anndata.read_h5ad(home / "cells.h5ad")
    rows, everywhere = selection.rows_of([data], ReadOptions())
    assert rows[0].tolist() == everywhere.tolist()
    return everywhere.tolist()


@pytest.mark.parametrize("source", ["tokens", "file", "anndata"])
@pytest.mark.parametrize(
    ("where", "is_wanted"),
    [
        ({"kind": "NK"}, lambda i: i % 3 == 1),
        ({"kind": ["NK", "T cell, naive"]}, lambda i: i % 3 > 0),
        ({"kind": np.array(["B"])}, lambda i: i % 3 == 0),
        ({"batch": 2}, lambda i: i % 4 == 2),
        ({"batch": ("2", "3")}, lambda i: i % 4 > 1),
        ({"share": 0.25}, lambda i: i % 5 == 1),
        ({"share": ["1", "0.50"]}, lambda i: i % 5 in (4, 2)),
        ({"is_primary": True}, lambda i: i % 2 == 0),
        ({"is_primary": "false"}, lambda i: i % 2 == 1),
        ({"word": 2}, lambda i: i % 4 == 2),
        ({"patchy": "there"}, lambda i: i % 2 == 0),
        ({"kind": "B", "batch": [0, 1], "is_primary": True}, lambda i: i % 3 == 0 and i % 4 == 0),
        ({"obs_names": ["cell7", "cell3"]}, lambda i: i in (3, 7)),
    ],
)
def test_values_of_every_type(home: Path, source: str, where: dict[str, Any], is_wanted: Any) -> None:
    assert taken(home, source, where=where) == [i for i in range(N) if is_wanted(i)]


@pytest.mark.parametrize("source", ["tokens", "file", "anndata"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"sex": "f"}, r"no column 'sex' to choose cells by; there are .*kind, .*batch"),
        ({"kind": ["B", "nk"]}, "no cell has kind 'nk'; there are B, NK, T cell, naive$"),
        ({"batch": "two"}, "no cell has batch 'two'; there are 0, 1, 2, 3$"),
        ({"batch": 0.5}, "no cell has batch '0.5'"),
        ({"is_primary": "yes"}, "no cell has is_primary 'yes'; there are False, True$"),
        ({"patchy": "None"}, "no cell has patchy 'None'; there are there$"),
        ({"obs_names": "x"}, r"there are cell0, cell1, .*and 20 more$"),
        ({"is_primary": True, "batch": 1}, "no cell is left to take, with is_primary True and batch 1"),
    ],
)
def test_what_is_not_there_is_refused(home: Path, source: str, where: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        taken(home, source, where=where)


def test_a_draw_is_the_same_from_counts_and_tokens_and_differs_by_seed(home: Path) -> None:
    where = {"kind": ["B", "NK"]}
    drawn = [taken(home, source, where=where, max_cells=6) for source in ("tokens", "file", "anndata")]
    assert drawn[0] == drawn[1] == drawn[2] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 6
    assert all(i % 3 < 2 for i in drawn[0])
    assert taken(home, "tokens", where=where, max_cells=6, seed=0) == drawn[0]
    assert taken(home, "tokens", where=where, max_cells=6, seed=1) != drawn[0]
    assert taken(home, "tokens", where=where, max_cells=1000) == taken(home, "tokens", where=where)


def test_options_that_select_nothing_or_twice() -> None:
    assert Selection.of(None, None, None) is None
    assert Selection.of({}, None, None) is None
    for asked, said in (
        (({"kind": []}, None, None), "'kind' needs a value"),
        (({"kind": None}, None, None), "'kind' needs a value"),
        (({"kind": ["B", float("nan")]}, None, None), "'kind' needs a value"),
        ((None, 0, None), "max_cells must be at least 1"),
        ((None, None, 3), "seed .* is of the draw of cells"),
        ((None, 3, -1), "seed must not be negative"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            Selection.of(*asked)


def test_what_the_command_line_says() -> None:
    assert parsed_where(["kind=B,NK", "donor=d=1"]) == {"kind": ["B", "NK"], "donor": ["d=1"]}
    assert parsed_where(['kind="T cell, naive",B']) == {"kind": ["T cell, naive", "B"]}
    for entries in (["kind"], ["=B"], ["kind="], ["kind=B", "kind=NK"]):
        with pytest.raises(UnsupportedError, match=f"--where {entries[-1]}"):
            parsed_where(entries)


@pytest.mark.parametrize("command", ["embed", "predict"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--where", "kind"], "--where kind: write COLUMN=VALUE"),
        (["--max-cells", "0"], "--max-cells must be at least 1"),
        (["--seed", "3"], "--seed is of the draw of cells"),
    ],
)
def test_the_command_says_so_before_anything_is_loaded(
    command: str, options: list[str], said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "z.parquet"
    arguments = [command, str(home / "tokens"), "--model", str(home / "model"), "--out", str(out), *options]
    args = build_parser([command]).parse_args(arguments)
    with pytest.raises(UnsupportedError, match=said):
        args.check(args)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_several_files_are_one_draw_and_only_what_is_near_is_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the result are the cells that were taken, of whatever file; far from them nothing is read."""
    for name, n in (("a", 30), ("b", 700)):
        cells(n, prefix=f"{name}_").write_h5ad(tmp_path / f"{name}.h5ad")
    read: list[tuple[int, int]] = []
    blocks = CountSource.blocks

    def watched(self: CountSource, start: int = 0, stop: int | None = None, rows: int = 4096) -> Any:
        read.append((start, self.n_cells if stop is None else stop))
        return blocks(self, start, stop, rows)

    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    everything = gf.embed(files, home / "model", dtype="float32", progress=False)
    monkeypatch.setattr(CountSource, "blocks", watched)
    named = ["a_4", "a_29", "b_1", "b_2", "b_600"]
    frame = gf.embed(
        files, home / "model", where={"obs_names": named}, dtype="float32", progress=False, as_frame=True
    )  # fmt: skip
    assert frame.index.tolist() == named
    assert frame["source_row"].tolist() == [4, 29, 1, 2, 600]
    np.testing.assert_allclose(
        frame.filter(like="embedding_").to_numpy(), everything[[4, 29, 31, 32, 630]], atol=2e-6
    )  # fmt: skip
    assert read == [(4, 30), (1, 3), (600, 601)]
    one = gf.embed(files, home / "model", where={"obs_names": "b_3"}, progress=False, as_frame=True)
    assert one["source_file"].tolist() == [str(files[1])], "a file without any of the cells"


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "mtx"])
def test_however_counts_are_stored(layout: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to be read as a whole is read once, not once for every cell."""
    import scipy.io
    import scipy.sparse as sp

    adata = cells(700)
    path = tmp_path / "cells.h5ad"
    if layout == "mtx":
        path = tmp_path / "cells"
        path.mkdir()
        scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(adata.X.T.astype(int)))
        (path / "barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n")
        (path / "genes.tsv").write_text("".join(f"{gene}\t{gene}\n" for gene in adata.var_names))
    else:
        adata.X = {"csr": adata.X, "csc": sp.csc_matrix(adata.X), "dense": adata.X.toarray()}[layout]
        adata.write_h5ad(path)
    calls: list[int] = []
    blocks = CountSource.blocks

    def watched(self: CountSource, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return blocks(self, *args, **options)

    expected = gf.embed(path, home / "model", dtype="float32", progress=False)
    monkeypatch.setattr(CountSource, "blocks", watched)
    rows = [2, 3, 300, 690]
    found = gf.embed(
        path, home / "model", where={"obs_names": [f"cell{i}" for i in rows]}, dtype="float32", progress=False
    )
    np.testing.assert_allclose(found, expected[rows], atol=2e-6)
    assert len(calls) == (3 if layout in ("csr", "dense") else 1)


@pytest.mark.parametrize("backed", [None, "r"])
def test_an_anndata_in_memory_and_backed(backed: Any, home: Path) -> None:
    adata = anndata.read_h5ad(home / "cells.h5ad", backed=backed)
    gf.embed(adata, home / "model", where={"kind": "B"}, max_cells=5, dtype="float32", progress=False)
    found = adata.obsm["X_geneformer"]
    taken = np.flatnonzero(~np.isnan(found).any(1))
    assert len(found) == N
    assert len(taken) == 5
    assert set(taken % 3) == {0}
    whole = gf.embed(home / "cells.h5ad", home / "model", dtype="float32", progress=False)
    np.testing.assert_allclose(found[taken], whole[taken], atol=2e-6)


def test_cells_that_are_no_cells_are_not_drawn_and_empty_ones_are_nan(home: Path, tmp_path: Path) -> None:
    adata = cells(empty=(3,))
    adata.obs["filter_pass"] = (np.arange(N) != 5).astype(int)
    with_nan = gf.embed(adata, home / "model", where={"batch": [1, 3]}, copy=True, progress=False).obsm["X_geneformer"]
    assert np.flatnonzero(~np.isnan(with_nan).any(1)).tolist() == [i for i in range(N) if i % 2 and i not in (3, 5)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = gf.embed(tmp_path / "cells.h5ad", home / "model", tmp_path / "z.npy", where={"batch": [1, 3]}, progress=False)
    array = np.load(out)
    assert len(array) == 19
    assert np.flatnonzero(np.isnan(array).any(1)).tolist() == [1]
    table = pd.read_parquet(tmp_path / "z.cells.parquet")
    assert table["obs_names"].tolist() == [f"cell{i}" for i in range(N) if i % 2 and i != 5]
    assert table["length"].tolist()[1] == 0
    np.testing.assert_allclose(array[2:], with_nan[7::2], atol=2e-6)


def test_it_is_recorded(home: Path, tmp_path: Path) -> None:
    out = gf.embed(
        home / "tokens", home / "model", tmp_path / "z.npy", where={"kind": "B", "batch": 2}, max_cells=2, seed=7,
        progress=False,
    )  # fmt: skip
    said = json.loads((tmp_path / "z.npy.json").read_text())
    assert json.loads(said["where"]) == {"kind": ["B"], "batch": ["2"]}
    assert (said["max_cells"], said["seed"], said["cells"]) == (2, 7, 2)
    assert len(np.load(out)) == 2
    adata = anndata.read_h5ad(home / "cells.h5ad")
    gf.embed(adata, home / "model", where={"kind": "B"}, progress=False)
    adata.write_h5ad(tmp_path / "out.h5ad")
    uns = dict(anndata.read_h5ad(tmp_path / "out.h5ad").uns["X_geneformer"])
    assert json.loads(uns["where"]) == {"kind": ["B"]}
    assert not {"max_cells", "seed"} & set(uns)
    gf.embed(adata, home / "model", progress=False)
    assert "where" not in adata.uns["X_geneformer"]


def test_genes_are_averaged_over_the_cells_that_are_taken(home: Path) -> None:
    adata = anndata.read_h5ad(home / "cells.h5ad")
    some = gf.embed(adata, home / "model", pool="gene", where={"kind": "B"}, as_frame=True, progress=False)
    alone = gf.embed(adata[adata.obs["kind"] == "B"].copy(), home / "model", pool="gene", as_frame=True, progress=False)
    pd.testing.assert_frame_equal(some, alone, atol=1e-5)
