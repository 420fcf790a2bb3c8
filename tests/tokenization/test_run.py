"""The pass: same bytes however it runs, cells and columns where they belong, errors that leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import anndata
import numpy as np
import pyarrow as pa
import pytest
from corpus import GENES, folder_bytes, make_cells, small_vocabulary
from oracle import as_lists, oracle_tokens

from geneformer_fast.cli import main
from geneformer_fast.errors import ArgumentError, InputError, OutputError, VocabularyError
from geneformer_fast.files.checksums import with_digest
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.tokenization import output, pipeline, run
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize, tokenize_anndata

OBS = {"cluster": "leiden", "donor": "donor", "score": "score", "is_good": "is_good", "cell type": "cell_type"}


@pytest.fixture
def vocabulary():
    return small_vocabulary()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks out of few cells."""
    monkeypatch.setattr(run, "BLOCK_ROWS", 64)


@pytest.fixture
def corpus(tmp_path):
    """Three files, named so that directory order is not sorted order, stored in three ways."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, seed, storage in (("b", 2, "csc"), ("a", 1, "csr"), ("c", 3, "dense")):
        make_cells(300, seed, storage=storage).write_h5ad(folder / f"{name}.h5ad", compression="gzip")
    return folder


def _expected(seeds, vocabulary, storages=("csr", "csc", "dense")):
    """Tokens and (seed, row) of every cell, by the oracle."""
    cells, origins = [], []
    for seed, storage in zip(seeds, storages, strict=True):
        adata = make_cells(300, seed, storage=storage)
        adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel().astype("float64").clip(1e-9)
        adata.var["ensembl_id"] = GENES
        for row, cell in enumerate(oracle_tokens(adata, vocabulary, is_dense=storage == "dense")):
            if len(cell) > 2:
                cells.append(cell)
                origins.append((seed, row))
    return cells, origins


def test_cells_columns_and_sources(corpus, vocabulary, tmp_path):
    tokens = tokenize(corpus, tmp_path / "out", dictionary=vocabulary, obs=OBS, shard_bytes=30_000)
    assert isinstance(tokens, type(open_tokens(tmp_path / "out")))
    cells, origins = _expected((1, 2, 3), vocabulary)
    assert as_lists(*tokens.read(range(tokens.n_cells))) == cells
    assert tokens.column("length").to_pylist() == [len(cell) for cell in cells]
    assert tokens.column("source_row").to_pylist() == [row for _, row in origins]
    files = [str(corpus / f"{name}.h5ad") for name in "abc"]
    assert tokens.column("source_file").to_pylist() == [files[seed - 1] for seed, _ in origins]
    frames = {seed: make_cells(300, seed).obs for seed in (1, 2, 3)}
    for old, new in OBS.items():
        want = [frames[seed][old].iloc[row] for seed, row in origins]
        got = tokens.column(new).to_pylist()
        assert [None if value != value else value for value in got] == [
            None if value != value else value for value in want
        ]
    assert len(tokens.manifest["shards"]) > 2
    assert [tally["empty_rows"] for tally in tokens.manifest["cells"]] == [[3, 10]] * 3
    assert [tally["read"] for tally in tokens.manifest["cells"]] == [300] * 3
    assert sum(tally["full"] for tally in tokens.manifest["cells"]) == sum(len(cell) == 40 for cell in cells) > 0
    assert tokens.vocabulary["fingerprint"] == vocabulary.fingerprint
    assert tokens.manifest["options"]["obs"] == [["obs_names", "obs_names"], *map(list, OBS.items())]


@pytest.mark.parametrize("spelling", ["folder", "files", "glob", "doubled"])
def test_inputs_in_sorted_order_each_once(corpus, vocabulary, tmp_path, spelling):
    files = [corpus / f"{name}.h5ad" for name in "cab"]
    data = {"folder": corpus, "files": files, "glob": f"{corpus}/*.h5ad", "doubled": [*files, corpus]}[spelling]
    tokens = tokenize(data, tmp_path / "out", dictionary=vocabulary)
    cells, _ = _expected((1, 2, 3), vocabulary)
    assert as_lists(*tokens.read(range(tokens.n_cells))) == cells


def test_same_bytes_for_any_number_of_workers(corpus, vocabulary, tmp_path):
    want = None
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        tokenize(corpus, out, dictionary=vocabulary, obs=OBS, workers=workers, shard_bytes=20_000)
        got = folder_bytes(out)
        assert want is None or got == want
        want = got
    assert not [name for name in want if "UNFINISHED" in name or "tmp" in name or "part" in name]


@pytest.mark.parametrize("family", ["v1", "v2", "bionemo"])
def test_in_memory_is_what_is_written(family, tmp_path):
    vocabulary = small_vocabulary(family)
    adata = make_cells(200, 4)
    memory = tokenize_anndata(adata, vocabulary)
    tokens = tokenize(adata, tmp_path / "out", dictionary=vocabulary)
    values, cu_seqlens = tokens.read(range(tokens.n_cells))
    np.testing.assert_array_equal(memory.values, values)
    np.testing.assert_array_equal(memory.cu_seqlens, cu_seqlens)
    np.testing.assert_array_equal(memory.kept_rows, tokens.column("source_row").to_numpy())
    assert set(range(200)) - set(memory.kept_rows.tolist()) == {3, 10}
    assert values.dtype == memory.values.dtype == (np.int16 if family == "v1" else np.int32)
    first, last = values[cu_seqlens[:-1]], values[cu_seqlens[1:] - 1]
    assert (first == vocabulary.cls_id).all() if vocabulary.cls_id is not None else (first >= 2).all()
    assert (last == vocabulary.eos_id).all() if vocabulary.eos_id is not None else (last >= 2).all()


def test_totals_from_obs_computed_or_another_column(vocabulary):
    """Totals change the order only by rounding: float32 steps of odd totals do it here."""
    adata = make_cells(400, 5)
    sums = np.asarray(adata.X.sum(1)).ravel()
    rng = np.random.default_rng(0)
    odd = (sums * rng.uniform(1.1, 1.9, 400) + 1e-3).astype("float32")
    plain = tokenize_anndata(adata, vocabulary)
    adata.obs["n_counts"] = odd
    adata.obs["mine"] = odd
    assert tokenize_anndata(adata, vocabulary).report["inputs"][0]["n_counts_from"] == "obs/n_counts"
    computed = tokenize_anndata(adata, vocabulary, n_counts="computed")
    np.testing.assert_array_equal(computed.values, plain.values)
    assert computed.report["inputs"][0]["n_counts_from"] == "computed over all columns"
    mine = tokenize_anndata(adata, vocabulary, n_counts="mine")
    np.testing.assert_array_equal(mine.values, tokenize_anndata(adata, vocabulary).values)
    adata.var["ensembl_id"] = GENES
    kept = adata[mine.kept_rows].copy()
    assert as_lists(mine.values, mine.cu_seqlens) == oracle_tokens(kept, vocabulary)
    with pytest.raises(InputError, match="obs has no column 'yours' for the total counts; there are cluster"):
        tokenize_anndata(adata, vocabulary, n_counts="yours")
    adata.obs["text"] = "many"
    with pytest.raises(InputError, match="obs column text holds string, not numbers"):
        tokenize_anndata(adata, vocabulary, n_counts="text")
    for bad in (0, -1.0, np.nan, np.inf):
        adata.obs["n_counts"] = sums
        adata.obs.loc[adata.obs_names[3], "n_counts"] = bad  # an empty cell may have any
        tokenize_anndata(adata, vocabulary)
        adata.obs.loc[adata.obs_names[200], "n_counts"] = bad
        with pytest.raises(InputError, match=r"cell 200 has counts, but obs column n_counts is .*--n-counts computed"):
            tokenize_anndata(adata, vocabulary)


@pytest.mark.parametrize("values", ["bool", "int", "float with missing"])
def test_filter_pass(values, vocabulary):
    adata = make_cells(200, 6)
    passes = np.arange(200) % 3 == 0
    adata.obs["filter_pass"] = {"bool": passes, "int": passes.astype(int)}.get(values, np.where(passes, 1.0, np.nan))
    adata.obs["n_counts"] = np.where(passes, np.asarray(adata.X.sum(1)).ravel() + 1, np.nan)
    kept = tokenize_anndata(adata, vocabulary)
    assert kept.kept_rows.tolist() == [row for row in np.flatnonzero(passes) if row not in (3, 10)]
    assert kept.report["cells"][0]["filtered"] == (~passes).sum()
    alone = tokenize_anndata(adata[passes].copy(), vocabulary)
    np.testing.assert_array_equal(kept.values, alone.values)
    everything = tokenize_anndata(adata, vocabulary, filter_pass=False, n_counts="computed")
    assert len(everything.kept_rows) == 198


def test_columns_of_different_types_are_joined(vocabulary, tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        adata = make_cells(20, seed)
        adata.obs["both"] = np.arange(20) if name == "a" else np.arange(20) + 0.5
        adata.obs["mixed"] = np.arange(20) if name == "a" else [f"k{i}" for i in range(20)]
        adata.obs["only_a"] = 1
        if name == "b":
            del adata.obs["only_a"]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    tokens = tokenize(files, tmp_path / "out", dictionary=vocabulary, obs=["both", "mixed"])
    assert tokens.schema.field("both").type == pa.float64()
    assert tokens.column("both").to_pylist()[17:19] == [19.0, 0.5]
    assert tokens.column("mixed").to_pylist()[17:19] == ["19", "k0"]
    with pytest.raises(InputError, match=r"b\.h5ad: obs has no column 'only_a' to carry along; there are cluster"):
        tokenize(files, tmp_path / "out2", dictionary=vocabulary, obs=["only_a"])
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("obs", [{"donor": "length"}, {"donor": "x", "cluster": "x"}, ["input_ids"]])
def test_taken_column_names(obs, vocabulary, tmp_path):
    with pytest.raises(InputError, match="is taken"):
        tokenize(make_cells(20), tmp_path / "out", dictionary=vocabulary, obs=obs)


def test_existing_folders(corpus, vocabulary, tmp_path):
    out = tmp_path / "out"
    tokenize(corpus, out, dictionary=vocabulary)
    before = folder_bytes(out)
    with pytest.raises(OutputError, match="holds finished tokens"):
        tokenize(corpus, out, dictionary=vocabulary)
    tokenize(corpus, out, dictionary=vocabulary, resume=True)
    assert folder_bytes(out) == before
    with pytest.raises(OutputError, match="exclude each other"):
        tokenize(corpus, out, dictionary=vocabulary, resume=True, overwrite=True)
    (out / "cache-1.arrow").write_text("somebody else's")
    tokenize(corpus / "a.h5ad", out, dictionary=vocabulary, overwrite=True)
    assert len(open_tokens(out)) == 298
    assert (out / "cache-1.arrow").exists()
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("dear")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="no token folder; nothing in it is touched"):
            tokenize(corpus, foreign, dictionary=vocabulary, **options)
    assert folder_bytes(foreign) == {"thesis.txt": b"dear"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        tokenize(corpus, tmp_path / "file", dictionary=vocabulary)


def test_two_processes_do_not_write_one_folder(corpus, vocabulary, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original = run._write

    def write_while_another_starts(*arguments):
        with pytest.raises(OutputError, match="being written by another process"):
            tokenize(corpus, out, dictionary=vocabulary, overwrite=True)
        return original(*arguments)

    monkeypatch.setattr(run, "_write", write_while_another_starts)
    assert len(tokenize(corpus, out, dictionary=vocabulary)) == 894


def _broken(folder, kind):
    """A second file of which only the end, or nothing, can be used."""
    adata = make_cells(300, 9)
    path = folder / "z.h5ad"
    if kind == "nan late":
        adata.X.data[-1] = np.nan
    elif kind == "negative late":
        adata.X.data[-1] = -1
    elif kind == "other species":
        adata.var_names = [f"FBgn{i:07d}" for i in range(adata.n_vars)]
    elif kind == "all empty":
        adata.X = adata.X * 0
    elif kind == "totals late":
        adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel()
        adata.obs.loc[adata.obs_names[-1], "n_counts"] = 0
    adata.write_h5ad(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


KINDS = ["nan late", "negative late", "other species", "all empty", "totals late", "truncated"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_leaves_nothing_that_looks_finished(kind, corpus, vocabulary, tmp_path, capsys):
    bad = _broken(corpus, kind)
    with pytest.raises(InputError, match=r"z\.h5ad"):
        tokenize(bad, tmp_path / "alone", dictionary=vocabulary)
    assert not (tmp_path / "alone").exists()
    if kind == "all empty":
        return
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"z\.h5ad"):
        tokenize(corpus, out, dictionary=vocabulary, shard_bytes=20_000)
    if out.exists():  # complete shards of the files before it
        assert (out / "UNFINISHED.json").exists()
        assert not (out / "state.json").exists()
        with pytest.raises(OutputError, match=r"is unfinished: [\d,]+ cells in \d+ complete shards.*--resume"):
            open_tokens(out)
    saved = tmp_path / "vocabulary"
    vocabulary.save(saved)
    assert main(["tokenize", str(bad), "--out", str(tmp_path / "x"), "--dictionary", str(saved), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_what_is_asked_wrongly(corpus, vocabulary, tmp_path):
    with pytest.raises(VocabularyError, match="--dictionary FOLDER"):
        tokenize(corpus, tmp_path / "out")
    with pytest.raises(ArgumentError, match="vocabulary is the old name of dictionary, and both are given"):
        tokenize(corpus, tmp_path / "out", vocabulary=vocabulary, dictionary=tmp_path)
    with pytest.raises(VocabularyError, match="is of family v2, not v1"):
        tokenize(corpus, tmp_path / "out", dictionary=vocabulary, preset="v1")
    with pytest.raises(OutputError, match="needs a folder to write to"):
        tokenize(corpus, dictionary=vocabulary)
    with pytest.raises(InputError, match="workers must be at least 1"):
        tokenize(corpus, tmp_path / "out", dictionary=vocabulary, workers=0)
    with pytest.raises(InputError, match="nothing matches it as a pattern"):
        tokenize(tmp_path / "no*.h5ad", tmp_path / "out", dictionary=vocabulary)
    for data in (make_cells(5).X, [make_cells(5)]):
        with pytest.raises(ArgumentError, match=r"tokenize: data must be .*AnnData"):
            tokenize(data, tmp_path / "out", dictionary=vocabulary)
    assert not (tmp_path / "out").exists()


def test_command(corpus, vocabulary, tmp_path, capsys):
    saved, out = tmp_path / "vocabulary", tmp_path / "out"
    vocabulary.save(saved)
    arguments = [
        "tokenize",
        *(str(corpus / f"{name}.h5ad") for name in "ba"),
        "--out",
        str(out),
        "--dictionary",
        str(saved),
    ]
    assert main([*arguments, "--obs", "leiden=cluster", "--obs", "donor", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "a.h5ad: 120 of 120 columns matched" in said
    assert "600 read, 596 written" in said
    assert "4 left out as empty" in said
    tokens = open_tokens(out)
    assert tokens.columns == ["input_ids", "obs_names", "leiden", "donor", "length", "source_file", "source_row"]
    assert main(arguments) == 2
    assert "holds finished tokens" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--obs", "=x"]) == 2
    assert "--obs NEW=OLD" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("storage", ["csr", "dense"])
def test_command_reports_what_the_official_tool_does_otherwise(vocabulary, tmp_path, capsys, storage):
    adata = make_cells(20, storage=storage)
    adata.var["ensembl_id"] = [*adata.var_names[:-1], adata.var_names[0]]
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel().astype("float32")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    vocabulary.save(tmp_path / "vocabulary")
    out = str(tmp_path / "out")
    assert (
        main(["tokenize", str(tmp_path / "cells.h5ad"), "--out", out, "--dictionary", str(tmp_path / "vocabulary")])
        == 0
    )
    said = capsys.readouterr().out
    assert "totals are float32, and ranks follow their rounding" in said
    assert "duplicated: 1 (of these repeat an id literally" in said
    assert ("columns of one gene the official tokenizer cannot sum" in said) == (storage == "dense")
    assert open_tokens(out).manifest["inputs"][0]["n_counts_dtype"] == "float32"


def test_ordered_map_keeps_order_bounds_and_stops():
    import threading

    made, done = [], []
    lock = threading.Lock()

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    def work(i):
        with lock:
            done.append(i)
        return i * i

    results = pipeline.ordered_map(work, items(), workers=3)
    got = [next(results) for _ in range(20)]
    assert got == [i * i for i in range(20)]
    assert len(made) <= 20 + 3 + 2
    results.close()
    n_made = len(made)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("rank", "read"))]
    assert len(made) == n_made

    def failing():
        yield 1
        raise InputError("broken")

    results = pipeline.ordered_map(work, failing(), workers=2)
    assert next(results) == 1
    with pytest.raises(InputError, match="broken"):
        next(results)
    results = pipeline.ordered_map(lambda i: 1 // i, [1, 0, 1], workers=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_manifest_names_no_time_and_no_temporary_path(corpus, vocabulary, tmp_path):
    tokenize(corpus / "a.h5ad", tmp_path / "one", dictionary=vocabulary)
    tokenize(corpus / "a.h5ad", tmp_path / "two", dictionary=vocabulary)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    content = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert content["inputs"][0]["path"] == str(corpus / "a.h5ad")
    assert content["inputs"][0]["genes"]["matched"] == 120


def test_more_inputs_than_are_kept_open(vocabulary, tmp_path):
    for i in range(12):
        make_cells(12, i).write_h5ad(tmp_path / f"{i:02d}.h5ad")
    tokens = tokenize(tmp_path / "*.h5ad", tmp_path / "out", dictionary=vocabulary)
    assert [part[-7:] for part in tokens.column("source_file").to_pylist()[::10]] == [
        f"{i:02d}.h5ad" for i in range(12)
    ]
    assert anndata.read_h5ad(tmp_path / "00.h5ad").n_obs == 12


def test_the_pass_needs_neither_torch_nor_pandas(corpus, vocabulary, tmp_path):
    """They would cost seconds and hundreds of megabytes in every process."""
    vocabulary.save(tmp_path / "vocabulary")
    program = (
        "import sys; from geneformer_fast.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'pandas', 'anndata', 'datasets', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    arguments = ["tokenize", str(corpus), "--out", str(tmp_path / "out"), "--dictionary", str(tmp_path / "vocabulary")]
    command = [
        sys.executable,
        "-c",
        program,
        *arguments,
        "--obs",
        "donor",
        "--obs",
        "cell_type=cell type",
        "--obs",
        "score",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_another_process_writes_or_has_just_finished_is_left_alone(vocabulary, tmp_path, monkeypatch):
    ours, theirs, out = make_cells(30, 1), make_cells(20, 2), tmp_path / "out"
    ours.write_h5ad(tmp_path / "ours.h5ad")
    theirs.write_h5ad(tmp_path / "theirs.h5ad")
    out.mkdir()
    (out / "UNFINISHED.json").write_text("{}")
    with folder_lock(out), pytest.raises(OutputError, match="is being written by another process"):
        tokenize(tmp_path / "ours.h5ad", out, dictionary=vocabulary)
    (out / "UNFINISHED.json").unlink()

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.undo()
        tokenize(tmp_path / "theirs.h5ad", folder, dictionary=vocabulary)
        with folder_lock(folder):
            yield

    monkeypatch.setattr(output, "folder_lock", late)
    with pytest.raises(OutputError, match="holds finished tokens"):
        tokenize(tmp_path / "ours.h5ad", out, dictionary=vocabulary)
    with open_tokens(out) as folder:
        assert folder.manifest["inputs"][0]["path"].endswith("theirs.h5ad")


def test_what_an_earlier_version_began_is_said_to_be_of_one(vocabulary, tmp_path, monkeypatch):
    make_cells(30, 1).write_h5ad(tmp_path / "a.h5ad")
    out = tmp_path / "out"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tmp_path / "a.h5ad", out, dictionary=vocabulary)
    with pytest.raises(OutputError, match=r"(?s)begun differently.*allow_float.*Repeat what it was begun with, or"):
        tokenize(tmp_path / "a.h5ad", out, dictionary=vocabulary, allow_float=True, resume=True)
    content = json.loads((out / "UNFINISHED.json").read_text())
    del content["options"]["allow_few_genes"]
    (out / "UNFINISHED.json").write_text(json.dumps(with_digest(content)))
    with pytest.raises(OutputError, match=r"(?s)begun differently.*Go on with the earlier version that began it, or"):
        tokenize(tmp_path / "a.h5ad", out, dictionary=vocabulary, resume=True)
