"""Which cells are perturbed and in which order, as the official tool has it, and what is refused."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from geneformer_fast.data.stored import StoredCells
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.selection import chosen_cells
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.vocabulary import Vocabulary

CELLS = {
    "input_ids": [[5, 9, 7], [8, 6, 11, 12], [30, 5], [9, 5, 6, 8], [7, 8, 12], [6, 30, 9, 5, 8]],
    "kind": ["a", "b", "a", "a", "b", "a"],
    "donor": [1, 1, 2, 2, 2, 1],
}


def stored(folder: Path, **columns: list[Any]) -> TokenFolder:
    datasets = pytest.importorskip("datasets")
    columns = {**CELLS, **columns}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return open_tokens(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    return stored(tmp_path_factory.mktemp("cells") / "t")


def chosen(folder: TokenFolder, edits: Edits | None = None, **options: Any) -> list[int]:
    return chosen_cells(folder, edits or Edits("delete"), **options).cells.tolist()


def test_every_scenario_of_the_official_tool_has_its_cells(shared_dir: Path) -> None:
    isp = shared_dir / "fixtures/isp"
    scenarios = json.loads((isp / "index.json").read_text())["scenarios"]
    n_compared = 0
    for name, scenario in scenarios.items():
        if scenario["kind"] == "isp" and scenario["error"] is None:
            n_compared += _compare(isp, name, scenario["version"].lower(), scenario["options"])
    assert n_compared > 40


def _compare(isp: Path, name: str, version: str, options: dict[str, Any]) -> int:
    tokens = _tokens(isp, version)
    genes, states = options.get("genes_to_perturb", "all"), options.get("cell_states_to_model")
    anchor = None if states or "anchor_gene" not in options else tokens[options["anchor_gene"]]
    listed = None if genes == "all" else tuple(tokens[gene] for gene in genes)
    front = back = int(version == "v2")
    edits = Edits(
        options["perturb_type"], listed, together=listed is not None, anchor=anchor, front=front, back=back,
        max_len=64,
    )  # fmt: skip
    window = options.get("cell_inds_to_perturb")
    folder = open_tokens(isp / f"cells_{version}.dataset")
    found = chosen_cells(
        folder, edits, where=options.get("filter_data"),
        state=(states["state_key"], states["start_state"]) if states else None,
        max_cells=options.get("max_ncells"), window=(window["start"], window["end"]) if window else None,
    )  # fmt: skip
    official = pq.read_table(isp / "outputs" / f"{name}.parquet").to_pandas()
    official = official[(official["affected"] == -1) & (official["state"] == official["state"].iloc[0])]
    if listed is not None:
        assert len(official) == len(found), name
        return 1
    values, bounds = folder.read(found.cells)
    for rank in range(len(found)):
        cell = values[bounds[rank] + front : bounds[rank + 1] - back].tolist()
        others = cell[1:] if edits.kind == "overexpress" else [gene for gene in cell if gene != anchor]
        assert set(official["perturbed"][official["rank"] == rank].astype(int)) == set(others), (name, rank)
    assert set(official["rank"]) == set(range(len(found))), name
    return 1


@functools.cache
def _tokens(isp: Path, version: str) -> dict[str, int]:
    return Vocabulary.from_folder(isp.parents[1] / "data/dicts", version).token_ids


def test_the_longest_come_first_and_others_keep_their_order(folder: TokenFolder) -> None:
    found = chosen_cells(folder, Edits("delete"))
    assert found.cells.tolist() == [5, 1, 3, 0, 4, 2]
    assert found.lengths.tolist() == [5, 4, 4, 3, 3, 2]
    assert found.left == {"tokens": 6}


def test_steps_follow_one_another(folder: TokenFolder) -> None:
    found = chosen_cells(
        folder, Edits("delete", genes=(5, 9), together=True), where={"kind": "a"}, state=("donor", 1),
        max_cells=2, window=(1, None),
    )  # fmt: skip
    assert found.cells.tolist() == [0]
    assert found.left == {"tokens": 6, "where": 4, "state": 2, "genes": 2, "window": 1}
    order = np.random.default_rng(42).permutation(4)[:2]
    assert sorted(chosen(folder, where={"kind": "a"}, max_cells=2)) == sorted(np.array([0, 2, 3, 5])[order].tolist())
    drawn = chosen(folder, max_cells=3, seed=7)
    assert sorted(drawn) == sorted(np.random.default_rng(7).permutation(6)[:3].tolist())
    assert chosen(folder, max_cells=6) == chosen(folder)


def test_cells_of_one_length_are_in_the_order_of_the_draw(tmp_path: Path) -> None:
    folder = stored(tmp_path / "t", input_ids=[[4 + i, 20] for i in range(6)])
    assert chosen(folder, max_cells=4) == np.random.default_rng(42).permutation(6)[:4].tolist()


@pytest.mark.parametrize(
    ("edits", "cells"),
    [
        (Edits("delete", genes=(5, 9), together=True), [5, 3, 0]),
        (Edits("overexpress", genes=(5, 9), together=True), [5, 1, 3, 0, 4, 2]),
        (Edits("delete", genes=(5, 11)), [5, 1, 3, 0, 2]),
        (Edits("inhibit", genes=(11,), doses=(0.5,)), [1]),
        (Edits("swap", genes=(5, 30, 12), pairs=True), [5, 2]),
        (Edits("delete", sets=((11, 99), (30, 98))), [5, 1, 2]),
        (Edits("delete", anchor=30), [5, 2]),
        (Edits("overexpress", anchor=30), [5, 2]),
        (Edits("delete", anchor=30, genes=(9, 11)), [5]),
        (Edits("delete", pairs=True), [5, 1, 3, 0, 4, 2]),
    ],
)
def test_cells_have_the_genes_that_are_perturbed(edits: Edits, cells: list[int], folder: TokenFolder) -> None:
    assert chosen(folder, edits) == cells


def test_many_lists_are_looked_at_in_parts(folder: TokenFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_fast.perturbation.selection._PLACES_AT_ONCE", 4)
    edits = Edits("delete", genes=(5, 11, 30))
    assert chosen(folder, edits) == [5, 1, 3, 0, 2]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"where": {"kind": "c"}}, InputError, "no cell has kind 'c'; there are a, b"),
        ({"where": {"sort": "a"}}, InputError, "carries no column 'sort'"),
        ({"where": {"kind": "b", "donor": 2}, "state": ("kind", "a")}, InputError, "the state to start from"),
        ({"state": ("kind", "c")}, InputError, "no cell has kind 'c'"),
        ({"max_cells": 0}, UnsupportedError, "at least 1"),
        ({"seed": 3}, UnsupportedError, "max_cells"),
        ({"window": (6, None)}, UnsupportedError, "begins with cell 6 of 6"),
        ({"window": (3, 3)}, UnsupportedError, "0 <= start < stop"),
        ({"window": (-1, 3)}, UnsupportedError, "0 <= start < stop"),
        ({"edits": Edits("delete", genes=(5, 99), together=True)}, InputError, "none of 6 cells has all genes"),
        ({"edits": Edits("delete", genes=(98, 99))}, InputError, "has any of the genes"),
        ({"edits": Edits("delete", genes=(11, 30), pairs=True)}, InputError, "both genes of any pair"),
        ({"edits": Edits("delete", anchor=99)}, InputError, "the anchor .token 99."),
        ({"edits": Edits("delete", max_len=4)}, InputError, "cell 5 has 5 tokens, and the model reads 4"),
        ({"n_tokens": 30}, VocabularyError, "cell 2 has token 30, and the model knows tokens up to 29"),
    ],
)
def test_what_leaves_no_cells_or_cannot_be_read_is_refused(
    options: dict[str, Any], error: type[Exception], says: str, folder: TokenFolder
) -> None:
    with pytest.raises(error, match=says):
        chosen(folder, **options)


def test_a_window_beyond_the_last_cell_ends_there(folder: TokenFolder) -> None:
    with pytest.warns(UserWarning, match="the last of 6 cells, not with 9"):
        assert chosen(folder, window=(4, 9)) == [4, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(folder, window=(None, 2)) == [5, 1]


def test_a_gene_that_a_cell_has_twice_is_refused(tmp_path: Path) -> None:
    cells = [[5, 9], [7, 6, 9], [8, 6, 9, 6]]
    folder = stored(tmp_path / "t", input_ids=cells, kind=["a"] * 3, donor=[1] * 3)
    with pytest.raises(InputError, match="cell 2 has token 6 twice"):
        chosen(folder)
    assert chosen(folder, edits=Edits("delete", genes=(5,))) == [0]


def test_padding_does_not_count_as_length(tmp_path: Path) -> None:
    cells = [[5, 9, 0, 0, 0], [7, 6, 9, 8], [8, 6, 9]]
    folder = stored(tmp_path / "t", input_ids=cells, kind=["a"] * 3, donor=[1] * 3)
    folder.on_read = StoredCells(folder, {"pad": 0, "mask": 1})
    with pytest.warns(UserWarning, match="padding"):
        found = chosen_cells(folder, Edits("delete"))
    assert (found.cells.tolist(), found.lengths.tolist()) == ([1, 2, 0], [4, 3, 2])
