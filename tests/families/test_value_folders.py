"""Folders of values: the same bytes for any number of workers and after a kill, read by others, whole or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc

import numpy as np
import pytest
from value_files import FAMILIES, N_LISTED, SYMBOLS, make_value_cells

from geneformer_fast.cli import main
from geneformer_fast.data.described import described
from geneformer_fast.data.values import cells_of_folder
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.tokenization import run
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize

OPTIONS = {
    "aido-cell": {"missing": "mask"},
    "scgpt": {"ties": "random", "sampling": "random", "seed": 3},
    "scbert": {"min_genes": 12},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(run, "BLOCK_ROWS", 16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, the last of which ends with cells without counts."""
    folder = tmp_path_factory.mktemp("value_corpus")
    for seed, storage in ((1, "csr"), (2, "csc"), (3, "dense")):
        adata = make_value_cells(90, seed, storage=storage)
        if seed == 3:
            adata.X[60:] = 0
        adata.write_h5ad(folder / f"{seed}.h5ad")
    return folder


def make(family, lists, corpus, out, **options):
    """The corpus as a folder of many small shards."""
    given = {"shard_bytes": 8_000, "progress": False, "obs": ["label"], "workers": 2, **options}
    if family == "scgpt":
        given = {"max_len": 20, **given}
    return tokenize(corpus, out, family=family, dictionary=lists[family], options=OPTIONS[family], **given)


def folder_bytes(folder):
    """Name to content of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_workers_writes_the_same_bytes(lists, corpus, tmp_path, family):
    folders = [tmp_path / str(workers) for workers in (1, 2, 3)]
    for workers, folder in enumerate(folders, start=1):
        make(family, lists, corpus, folder, workers=workers)
    first, *others = map(folder_bytes, folders)
    assert sum(name.endswith(".arrow") for name in first) > 3
    assert all(other == first for other in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_and_resumed_it_has_the_same_bytes(lists, corpus, tmp_path, family):
    whole = tmp_path / "whole"
    make(family, lists, corpus, whole)
    finished, out = folder_bytes(whole), tmp_path / "out"
    step, kills = 3, 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                _kill_at(step)
                make(family, lists, corpus, out, resume=out.exists())
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        if out.exists() and not (out / "state.json").exists():
            with pytest.raises(OutputError, match=r"unfinished|state\.json is missing"):
                open_tokens(out)
        step += 5
        assert kills < 60
    assert kills > 1
    assert folder_bytes(out) == finished


def _kill_at(step):
    """SIGKILL this process before its ``step``-th change of the disk."""
    left = step

    def killing(change):
        def changed(*arguments, **named):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return change(*arguments, **named)

        return changed

    for name in ("rename", "replace", "unlink", "fsync", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))


def test_a_run_of_other_choices_is_not_gone_on_with(lists, corpus, tmp_path, monkeypatch):
    from geneformer_fast.tokenization.output import TokenOutput

    def finish(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TokenOutput, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            make("scgpt", lists, corpus, tmp_path / "out")
    monkeypatch.setitem(OPTIONS, "scgpt", {"ties": "middle"})
    with pytest.raises(OutputError, match=r'preparation\.options\.ties: begun with "random", now "middle"'):
        make("scgpt", lists, corpus, tmp_path / "out", resume=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_datasets_opens_it(lists, corpus, tmp_path, family):
    datasets = pytest.importorskip("datasets")
    with make(family, lists, corpus, tmp_path / "out") as tokens:
        ids, bounds = tokens.read_stored(np.arange(tokens.n_cells))
        tokens.locate_values("values")
        values, _ = tokens.read_stored(np.arange(tokens.n_cells), "values")
        opened = datasets.load_from_disk(str(tmp_path / "out"))
        assert opened.num_rows == tokens.n_cells
        names = {"input_ids", "values", "obs_names", "label", "length", "source_file", "source_row"}
        assert set(opened.column_names) == names | ({"total"} if family == "aido-cell" else set())
        for cell in (0, tokens.n_cells - 1):
            row, span = opened[cell], slice(bounds[cell], bounds[cell + 1])
            assert row["input_ids"] == ids[span].tolist()
            assert row["values"] == values[span].tolist()
            assert row["length"] == len(row["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_read_in_any_order_and_again(lists, corpus, tmp_path, family):
    with make(family, lists, corpus, tmp_path / "out") as tokens:
        tokens.on_read = cells_of_folder(tokens)
        whole, bounds = tokens.read(np.arange(tokens.n_cells))
        chosen = np.random.default_rng(0).permutation(tokens.n_cells)[:40]
        some, cuts = tokens.read(chosen)
        for place, cell in enumerate(chosen):
            assert np.array_equal(some[cuts[place] : cuts[place + 1]], whole[bounds[cell] : bounds[cell + 1]])
        assert np.array_equal(np.diff(cuts), tokens.lengths()[chosen])
        nothing, none = tokens.read(np.zeros(0, np.int64))
        assert (len(nothing), none.tolist()) == (0, [0])
        card = described(tokens)
        assert card["vocabulary"].startswith(family)
        assert card["values"].startswith(f"{family}, {N_LISTED} genes")


def test_memory_does_not_grow_with_the_cells(lists, tmp_path):
    """Of the pass, and of reading: a dense row of every cell would be 62 values of 4 bytes."""
    import anndata
    import scipy.sparse as sp

    def peak(n_cells):
        rng = np.random.default_rng(0)
        counts = sp.random(n_cells, N_LISTED, 0.3, format="csr", random_state=rng, dtype=np.float32)
        counts.data = np.ceil(counts.data * 9)
        adata = anndata.AnnData(counts)
        adata.var_names = SYMBOLS
        adata.write_h5ad(tmp_path / f"{n_cells}.h5ad")
        del adata, counts
        out = tmp_path / f"out{n_cells}"
        given = {"family": "aido-cell", "dictionary": lists["aido-cell"], "progress": False, "workers": 2}
        tokenize(tmp_path / f"{n_cells}.h5ad", out, shard_bytes=200_000, **given)
        shutil.rmtree(out)
        tracemalloc.start()
        with tokenize(tmp_path / f"{n_cells}.h5ad", out, shard_bytes=200_000, **given) as tokens:
            tokens.on_read = cells_of_folder(tokens)
            for start in range(0, n_cells - 64, 64):
                tokens.read(np.arange(start, start + 64))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(1_000), peak(8_000)
    # Names of the cells (text and hashes), places in the file, and lengths are kept for every cell.
    assert many - few < 7_000 * 250
    assert 7_000 * (4 * N_LISTED + 4 * 18 * 2) > 7_000 * 250


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"family": "scgpd"}, UnsupportedError, "no family of models is called 'scgpd'"),
        ({"options": {"tie": "middle"}}, UnsupportedError, "scgpt has no option 'tie'; there are ties, sampling"),
        ({"options": {"seed": 2}}, UnsupportedError, "option seed draws nothing: neither ties nor sampling"),
        ({"options": {"seed": "x"}}, UnsupportedError, "option seed must be a whole number from 0 to"),
        ({"options": {"n_bins": 2}}, UnsupportedError, "option n_bins must be a whole number from 3 to"),
        ({"preset": "v1"}, UnsupportedError, "preset .--preset. is a choice among Geneformer's dictionaries"),
        ({"max_len": 1}, InputError, "max_len .--max-len. must be at least 2, not 1"),
        ({"family": "scbert", "max_len": 9}, UnsupportedError, "shortens no cell of scbert, which reads all 60 genes"),
        ({"dictionary": None}, VocabularyError, "no genes given: --dictionary .dictionary=. names the file"),
        ({"dictionary": "nowhere"}, VocabularyError, "nowhere: no such file or folder; give the one with the genes"),
        ({"family": None, "options": {"ties": "middle"}}, UnsupportedError, "options .--option. are of families that"),
        ({"family": "geneformer", "options": {"ties": "x"}}, UnsupportedError, "options .--option. are of families"),
        ({"obs": {"label": "values"}}, InputError, "the name 'values' for a carried obs column is taken in folders of"),
        ({"n_counts": "depth"}, InputError, "obs has no column 'depth' for the total counts"),
    ],
)
def test_wrong_arguments_give_one_error(lists, tmp_path, change, error, said):
    family = change.get("family", "scgpt")
    given = {"family": "scgpt", "dictionary": lists.get(family, lists["scgpt"]), "progress": False, **change}
    with pytest.raises(error, match=said):
        tokenize(make_value_cells(8), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_ranks_and_a_list_of_another_family_are_refused(lists, tmp_path):
    from corpus import small_vocabulary

    from geneformer_fast.families.gene_list import GeneList

    adata = make_value_cells(8)
    with pytest.raises(VocabularyError, match="scgpt reads a list of genes, not a Vocabulary"):
        tokenize(adata, tmp_path / "out", family="scgpt", dictionary=small_vocabulary())
    genes = GeneList("scbert", {name: i for i, name in enumerate(SYMBOLS)})
    with pytest.raises(VocabularyError, match="these genes are of scbert, not of scgpt"):
        tokenize(adata, tmp_path / "out", family="scgpt", dictionary=genes)
    with pytest.raises(VocabularyError, match=r"these are the genes of scbert; name it with family="):
        tokenize(adata, tmp_path / "out", dictionary=genes)
    tokens = tokenize(adata, tmp_path / "out", family="scbert", dictionary=genes, options={"min_genes": 1})
    assert tokens.vocabulary["fingerprint"] == genes.fingerprint


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content["inputs"][0].pop("genes_there"), "does not say which of 60 genes it has"),
        (lambda content: content["inputs"][0].update(genes_there="AAAA"), "does not say which of 60 genes it has"),
        (lambda content: content["preparation"].pop("family"), "does not say how its values were made"),
        (lambda content: content["preparation"].update(n_genes=-1), "does not say how its values were made"),
        (lambda content: content["preparation"]["options"].update(missing="?"), "option missing must be zero or mask"),
        (lambda content: content["preparation"].update(n_genes=20), "does not say which of 20 genes it has"),
    ],
)
def test_damaged_manifests_are_refused(lists, corpus, tmp_path, monkeypatch, damage, said):
    make("aido-cell", lists, corpus, tmp_path / "out").close()
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(OutputError, match="is damaged or was changed"):
        open_tokens(tmp_path / "out")
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    with open_tokens(tmp_path / "out") as tokens, pytest.raises(OutputError, match=said):
        cells_of_folder(tokens)


def test_cells_with_genes_or_values_of_no_list_are_refused(lists, corpus, tmp_path, monkeypatch):
    import pyarrow as pa

    make("aido-cell", lists, corpus, tmp_path / "out").close()
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    shard = sorted((tmp_path / "out").glob("data-*.arrow"))[0]
    with pa.ipc.open_stream(shard.read_bytes()) as reader:
        table, schema = reader.read_all(), reader.schema
    for column, wrong, said in (
        ("input_ids", 60, "cell 1 has gene 60"),
        ("input_ids", -1, "cell 1 has gene -1"),
        ("values", float("nan"), "with value nan"),
        ("total", 0.0, "a cell has a total that is no positive number"),
    ):
        lists_of = table.column(column).to_pylist()
        if column == "total":
            lists_of[1] = wrong
        else:
            lists_of[1][0] = wrong
        made = table.set_column(
            table.schema.get_field_index(column), schema.field(column), pa.array(lists_of, schema.field(column).type)
        )
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(made.combine_chunks())
        with open_tokens(tmp_path / "out") as tokens:
            tokens.on_read = cells_of_folder(tokens)
            with pytest.raises(InputError, match=said):
                tokens.read([0, 1, 2])


def test_the_command_says_what_it_did(lists, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "tokenize",
        str(corpus),
        "--family",
        "scgpt",
        "--dictionary",
        str(lists["scgpt"].parent),
        "--out",
        str(out),
    ]
    assert main([*words, "--option", "ties=random", "--option", "seed=4", "--max-len", "30"]) == 0
    said = capsys.readouterr().out
    assert (
        "values of scgpt, 60 genes (ties random, sampling top, seed 4, normalise none, n_bins 51, cls_value embed)"
        in said
    )
    with open_tokens(out) as tokens:
        assert tokens.manifest["preparation"]["options"]["ties"] == "random"
        assert tokens.stored_lengths().max() == 29
    for wrong, error in (
        (["--option", "ties"], "--option ties: write --option NAME=VALUE"),
        (["--option", "ties=random", "--option", "ties=upper"], "ties is chosen already, as random"),
        (["--option", "ties=left"], "option ties must be middle or upper or random, not 'left'"),
    ):
        assert main([*words[:-1], str(tmp_path / "b"), *wrong]) != 0
        assert error in capsys.readouterr().err
    assert main(["tokenize", str(corpus), "--dictionary", str(tmp_path), "--out", str(out), "--option", "a=b"]) != 0
    assert "--option is about the values of a family; name it with --family" in capsys.readouterr().err


def test_help_of_every_option_is_in_the_guide():
    from pathlib import Path

    from value_files import preparation

    guide = (Path(__file__).parents[2] / "docs" / "guide" / "values.md").read_text()
    for family in FAMILIES:
        for name, option in preparation(family).options.items():
            row = next((line for line in guide.splitlines() if line.startswith(f"| `{name}`")), None)
            assert row is not None, f"{family}: {name}"
            assert f"`{option.default}`" in row
            assert all(f"`{choice}`" in row for choice in option.choices)
