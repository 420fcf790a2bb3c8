"""Folders of the official perturber: read without executing them, and written so that official tools read them."""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import folders
import numpy as np
import official_pickles
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import InputError, OutputError, UnsupportedError
from geneformer_fast.perturbation import pickles
from geneformer_fast.perturbation.official_files import open_official, write_official
from geneformer_fast.perturbation.rows import CellRows, RowSchema
from geneformer_fast.perturbation.store import PerturbationWriter, RunCells

_NAMES = (
    *("v1_delete_all_cell_layer-1", "v1_delete_all_cell_and_gene_layer0", "v1_shift_delete_all_cell_and_gene"),
    *("v1_delete_one_cell", "v1_delete_two_cell_and_gene", "v1_shift_delete_two_cell_and_gene"),
    *("v1_anchor_delete_cell", "v1_overexpress_three_short_cell_and_gene", "v2_delete_all_cls_b"),
    *("v2_delete_two_cls_and_gene", "v2_shift_noalt_delete_all_cls", "v2_overexpress_all_cls_layer0"),
)


@pytest.fixture(scope="module")
def fixtures(shared_dir: Path) -> Path:
    return shared_dir / "fixtures" / "isp"


@pytest.mark.parametrize("name", _NAMES)
def test_every_official_value_is_read(name: str, fixtures: Path, tmp_path: Path) -> None:
    official_pickles.write_pickles(fixtures, name, tmp_path / "official")
    opened = open_official(tmp_path / "official")
    frame = opened.to_frame()
    plain = parquet.read_table(fixtures / "outputs" / f"{name}.parquet").to_pandas()
    is_list = (plain["rank"] < 0).all()
    ranks = np.where(plain["affected"] < 0, plain["item"], -1) if is_list else plain["rank"]
    perturbed = [tuple(map(int, tokens.split())) for tokens in plain["perturbed"]]
    expected = sorted(zip(ranks, perturbed, plain["affected"], plain["state"].astype(str), plain["value"], strict=True))
    found = sorted(
        zip(
            frame["cell"].fillna(-1).astype(int), frame["tokens"], frame["affected"].fillna(-1).astype(int),
            frame["state"].fillna(""), frame["value"], strict=True,
        )
    )  # fmt: skip
    assert found == expected
    assert opened.states == list(dict.fromkeys(plain["state"].astype(str)[plain["state"] != ""]))
    told = official_pickles.scenarios(fixtures)[name]
    assert opened.manifest["plan"]["options"]["kind"] == told["options"]["perturb_type"]
    known = frame["cell"].dropna()
    assert known.is_monotonic_increasing
    assert opened.n_cells == known.max() + 1


def test_genes_get_their_names(fixtures: Path, shared_dir: Path, tmp_path: Path) -> None:
    official_pickles.write_pickles(fixtures, "v2_delete_two_cls_and_gene", tmp_path / "official")
    vocabulary = gf.Vocabulary.from_folder(shared_dir / "data" / "dicts", "v2")
    frame = open_official(tmp_path / "official", dictionary=vocabulary).to_frame()
    told = official_pickles.scenarios(fixtures)["v2_delete_two_cls_and_gene"]
    assert set(frame["genes"]) == {tuple(told["options"]["genes_to_perturb"])}


@pytest.mark.parametrize("name", _NAMES)
def test_what_is_written_is_what_the_official_tool_wrote(name: str, fixtures: Path, tmp_path: Path) -> None:
    official_pickles.write_pickles(fixtures, name, tmp_path / "official")
    written = write_official(open_official(tmp_path / "official"), tmp_path / "again", "x")
    theirs = official_pickles.official_values(tmp_path / "official")
    assert official_pickles.official_values(tmp_path / "again") == theirs
    names = {path.name.replace("np.int16(", "").replace(")", "") for path in (tmp_path / "official").iterdir()}
    for path in written:
        assert path.name in names
        effects = pickle.loads(path.read_bytes())
        assert type(effects) is (dict if "shift" in name and "gene_embs" not in path.name else defaultdict)


def _run(out: Path, options: dict[str, Any], rows: dict[int, CellRows], **schema: Any) -> Any:
    chosen = RunCells(np.array([7, 3, 9]), np.array([3, 2, 1]), np.array([3, 2, 1]))
    with PerturbationWriter(out, chosen, plan={"options": options}, rows=RowSchema(**schema)) as writer:
        for cell in chosen.cell.tolist():
            if cell in rows:
                writer.append(cell, rows[cell])
        writer.finish()
    return gf.open_perturbations(out)


def test_cells_are_numbered_by_rank_and_those_without_values_have_a_file_too(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "out", {"kind": "overexpress"}, {7: CellRows.of([4, 5], [0.5, 0.25]), 9: CellRows.of([6], [np.nan])}
    )
    written = write_official(run, tmp_path / "official", "x")
    assert [path.name for path in written] == [
        f"in_silico_overexpress_x_dict_cell_embs_{rank}batch-1_raw.pickle" for rank in (0, 1, 2)
    ]
    contents = [pickle.loads(path.read_bytes()) for path in written]
    assert contents == [{(4, "cell_emb"): [0.5], (5, "cell_emb"): [0.25]}, {}, {}]
    with pytest.raises(OutputError, match="exists already"):
        write_official(run, tmp_path / "official", "x")
    (tmp_path / "official" / "in_silico_overexpress_xy_dict_cell_embs_0batch-1_raw.pickle").write_text("another's")
    write_official(run, tmp_path / "official", "x", overwrite=True)
    assert (tmp_path / "official" / "in_silico_overexpress_xy_dict_cell_embs_0batch-1_raw.pickle").exists()


def test_an_anchor_is_in_no_key(tmp_path: Path) -> None:
    run = _run(tmp_path / "out", {"kind": "delete", "anchor": "ENSG1"}, {7: CellRows.of([[4, 5], [4, 6]], [0.5, 0.25])})
    written = write_official(run, tmp_path / "official", "x")
    assert pickle.loads(written[0].read_bytes()) == {(5, "cell_emb"): [0.5], (6, "cell_emb"): [0.25]}


def test_doses_are_in_no_key_either(tmp_path: Path) -> None:
    rows = {7: CellRows.of([4, 4], [0.5, 0.25], extra={"dose": [0.1, 0.2]})}
    run = _run(tmp_path / "out", {"kind": "inhibit"}, rows, extra={"dose": pa.float32()})
    with pytest.raises(UnsupportedError, match="variants here differ by dose too"):
        write_official(run, tmp_path / "official")


def test_one_dose_needs_no_key(tmp_path: Path) -> None:
    rows = {7: CellRows.of([4, 5], [0.5, 0.25], extra={"dose": [0.25, 0.25]})}
    run = _run(tmp_path / "out", {"kind": "inhibit", "doses": [0.25]}, rows, extra={"dose": pa.float32()})
    written = write_official(run, tmp_path / "official", "x")
    assert all(path.name.startswith("in_silico_inhibit_x_") for path in written)
    assert open_official(tmp_path / "official").read()["value"].to_pylist() == [0.5, 0.25]


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


_FILE = "in_silico_delete_x_dict_cell_embs_0batch-1_raw.pickle"


@pytest.mark.parametrize(
    "content",
    [
        {(1, "cell_emb"): _Runs(os.system, "touch executed")},
        {_Runs(os.getcwd): [1.0]},
        defaultdict(os.getcwd, {(1, "cell_emb"): [1.0]}),
        defaultdict(dict, {(1, "cell_emb"): [1.0]}),
        {(1, "cell_emb"): _Runs(list, "ab")},
        {(1, "cell_emb"): np.zeros(3)},
        {(1, frozenset([1])): [1.0]},
        {((1, (2, 3)), "cell_emb"): [1.0]},
        {(1, 2, 3): [1.0]},
        [1, 2],
        {"a": [1.0]},
        {3: [1.0]},
        {(-1, "cell_emb"): [1.0]},
        {(1.5, "cell_emb"): [1.0]},
        {(1, "cell"): [1.0]},
        {((), "cell_emb"): [1.0]},
        {(1, "cell_emb"): 1.0},
        {(1, "cell_emb"): ["a"]},
        {(2**40, "cell_emb"): [1.0]},
        {"state": {(1, "cell_emb"): [1.0]}, "other": []},
    ],
)
def test_what_is_no_dictionary_of_effects_is_refused_and_not_run(content: Any, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / _FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"batch-1_raw\.pickle") as caught:
        open_official(tmp_path / "official")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_keys_that_grow_faster_than_the_file_are_refused(tmp_path: Path) -> None:
    """One tuple of many tokens in many keys: hashing it again and again would take quadratic time."""
    many = tuple(range(4_000))
    path = tmp_path / _FILE
    path.write_bytes(pickle.dumps({(many, token): [] for token in range(10_000)}))
    with pytest.raises(InputError, match="keys are far larger than the file"):
        pickles.read_effects(path)
    genes = tuple(range(300))
    path.write_bytes(pickle.dumps(defaultdict(list, {(genes, token): [0.5] * 20 for token in range(2000)})))
    assert len(pickles.read_effects(path)) == 2000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_rows_or_our_own_error(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    effects = {"a": defaultdict(list, {((3, 4), "cell_emb"): [0.5], ((3, 4), 7): [0.25, 0.125]})}
    content = bytearray(pickle.dumps(effects))
    for place, mask in flips:
        content[place % len(content)] ^= mask
    (tmp_path / "official").mkdir(exist_ok=True)
    (tmp_path / "official" / _FILE).write_bytes(bytes(content))
    with suppress(InputError):
        open_official(tmp_path / "official").to_frame()


def test_folders_without_effects(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_official(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no file's name ends with '_raw.pickle'; say with suffix how they end"):
        open_official(tmp_path)


def test_our_rows_written_and_read_again(tmp_path: Path) -> None:
    folders.write(tmp_path / "out")
    ours = gf.open_perturbations(tmp_path / "out")
    write_official(ours, tmp_path / "official")
    theirs = open_official(tmp_path / "official").to_frame()
    frame = ours.to_frame()
    order = {cell: rank for rank, cell in enumerate(ours.cells["cell"].to_pylist())}
    frame["cell"] = frame["cell"].map(order)
    columns = ["cell", "state", "tokens", "value"]
    pandas_equal = frame[columns].sort_values(columns[:3]).to_numpy().tolist()
    assert theirs[columns].sort_values(columns[:3]).to_numpy().tolist() == pandas_equal
    assert json.dumps(ours.manifest["plan"]["options"])


def test_the_statistics_read_official_pickles(fixtures: Path, shared_dir: Path, tmp_path: Path) -> None:
    official_pickles.write_pickles(fixtures, "v2_shift_delete_all_cls", tmp_path / "official")
    theirs = pd.read_csv(fixtures / "outputs" / "v2_stats_goal_all.csv", index_col=0)
    command = ["perturb-stats", tmp_path / "official", "--out", tmp_path / "out", "--no-pictures", "--min-cells", "2"]
    assert main([*map(str, command), "--dictionary", str(_dictionary(shared_dir, tmp_path))]) == 0
    ours = pd.read_csv(tmp_path / "out" / "goal_state_shift.csv", index_col=0)
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-10, atol=1e-15)
    assert gf.open_perturbations(tmp_path / "official").states == ["CD56+ NK", "CD19+ B", "CD14+ Monocyte"]


def _dictionary(shared_dir: Path, tmp_path: Path) -> Path:
    return gf.Vocabulary.from_folder(shared_dir / "data" / "dicts", "v2").save(tmp_path / "dictionary").parent
