"""Folders of perturbations are read as they were written, whole or from shards, and not when they are damaged."""

from __future__ import annotations

import datetime
import decimal
import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import folders
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

import geneformer_fast as gf
from geneformer_fast.errors import ArgumentError, InputError, OutputError
from geneformer_fast.files.checksums import with_digest
from geneformer_fast.perturbation import matrix, parts, row_file, store
from geneformer_fast.perturbation.rows import CellRows, RowSchema
from geneformer_fast.perturbation.store import PerturbationWriter, RunCells


@pytest.fixture(scope="module", autouse=True)
def _small_files() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_ROWS_PER_FILE", 150)
        patch.setattr(row_file, "ROWS_AT_ONCE", 64)
        patch.setattr(parts, "_ROWS_AT_ONCE", 40)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("perturbations")
    folders.write(home / "whole")
    for part in (1, 2, 3):
        folders.write(home / f"part{part}", shard=f"{part}/3")
    folders.write(home / "genes", states=(), has_genes=True)
    return home


def test_rows_are_what_parquet_reads(home: Path) -> None:
    opened = gf.open_perturbations(home / "whole")
    plain = parquet.read_table(home / "whole")
    assert opened.read().equals(plain.replace_schema_metadata(None))
    assert opened.n_rows == plain.num_rows
    assert opened.states == [*folders.STATES]
    assert opened.obs_columns == ["donor", "age"]
    assert opened.extra_columns == []
    assert opened.cells["cell"].to_pylist() == folders.cells().cell.tolist()
    assert opened.cells["rank"].to_pylist() == list(range(40))
    assert opened.manifest["plan"]["options"] == folders.PLAN["options"]
    assert opened.manifest["report"] == {"noise": 1e-7}
    batches = list(opened.batches(columns=["value"]))
    assert max(batch.num_rows for batch in batches) <= 40
    assert pa.Table.from_batches(batches).equals(plain.select(["value"]).replace_schema_metadata(None))


def test_shards_in_any_order_are_the_whole_run(home: Path) -> None:
    joined = gf.open_perturbations([home / "part3", home / "part1", home / "part2"])
    whole = gf.open_perturbations(home / "whole")
    assert joined.read().equals(whole.read())
    assert joined.cells.equals(whole.cells)
    assert joined.read(columns=["value"], cells=whole.cells["cell"].to_pylist()[5:9]).equals(
        whole.read(columns=["value"], cells=whole.cells["cell"].to_pylist()[5:9])
    )


def test_shards_are_all_there_and_none_twice(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"part1 is a part of a run, and shards 2, 3 of 3 are missing"):
        gf.open_perturbations(home / "part1")
    with pytest.raises(OutputError, match=r"shard 2 of 3 is missing"):
        gf.open_perturbations([home / "part1", home / "part3"])
    shutil.copytree(home / "part1", tmp_path / "copy")
    with pytest.raises(OutputError, match=r"part1 and .*copy are both shard 1/3"):
        gf.open_perturbations([home / "part1", tmp_path / "copy", home / "part2", home / "part3"])
    with pytest.raises(OutputError, match=r"are not of one run .*one is of 3 shards"):
        gf.open_perturbations([home / "part1", home / "whole"])
    folders.write(tmp_path / "other", shard="2/3", plan={**folders.PLAN, "model": "cc"})
    with pytest.raises(OutputError, match=r"are not of one run \(plan.model: 'bb' and 'cc'\)"):
        gf.open_perturbations([home / "part1", tmp_path / "other", home / "part3"])
    some = gf.open_perturbations([home / "part1", home / "part3"], partial=True)
    assert some.cells["rank"].to_pylist() == [rank for rank in range(40) if rank % 3 != 1]
    with pytest.raises(OutputError, match="no folder"):
        gf.open_perturbations([])


def test_rows_are_chosen(home: Path) -> None:
    opened, genes = gf.open_perturbations(home / "whole"), gf.open_perturbations(home / "genes")
    cells = opened.cells["cell"].to_pylist()
    found = opened.to_frame(cells=[cells[30], cells[2]], states="well", columns=["cell", "state", "value", "tokens"])
    assert found["cell"].unique().tolist() == [cells[2], cells[30]]
    assert set(found["state"]) == {"well"}
    assert found["tokens"].map(type).eq(tuple).all()
    expected = folders.rows_of(cells[2], int(folders.cells().length[2])).value[1::3]
    np.testing.assert_array_equal(found["value"][found["cell"] == cells[2]], expected)
    n_genes = int((folders.cells().length ** 2).sum() - folders.cells().length.sum())
    assert genes.read(affected=True).num_rows == n_genes
    assert genes.read(affected=False).num_rows == int(folders.cells().length.sum())
    frame = genes.to_frame(cells=cells[:1])
    assert str(frame["affected"].dtype) == "Int32"
    with pytest.raises(InputError, match=r"cell 99999 was not perturbed"):
        opened.read(cells=[cells[0], 99999])
    with pytest.raises(InputError, match=r"no state 'dead'; there are ill, well, odd"):
        opened.read(states="dead")
    with pytest.raises(InputError, match=r"no state 'dead'; there are none"):
        genes.read(states="dead")
    with pytest.raises(InputError, match=r"no column 'nope'; there are cell, tokens"):
        opened.read(columns=["nope"])


def test_only_files_with_chosen_cells_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, read = gf.open_perturbations(home / "whole"), []
    plain = parquet.ParquetFile
    monkeypatch.setattr(parquet, "ParquetFile", lambda path: read.append(path.name) or plain(path))
    last = opened.cells["cell"].to_pylist()[-1]
    opened.read(cells=[last])
    assert len(read) == 1


def test_cells_by_perturbations(home: Path) -> None:
    opened = gf.open_perturbations([home / f"part{part}" for part in (1, 2, 3)])
    adata = opened.to_anndata()
    frame = opened.to_frame()
    assert adata.obs_names.tolist() == [str(cell) for cell in opened.cells["cell"].to_pylist()]
    assert adata.obs["donor"].tolist() == [f"donor {place % 3}" for place in range(40)]
    assert set(adata.layers) == set(folders.STATES)
    assert adata.uns["perturbations"]["state"] == "well"
    assert json.loads(adata.uns["perturbations"]["plan"])["model"] == "bb"
    np.testing.assert_array_equal(adata.X, adata.layers["well"])
    assert int(np.isfinite(adata.X).sum()) == len(frame) // 3
    for _, row in frame.sample(60, random_state=0).iterrows():
        assert adata[str(row["cell"]), row["genes"][0]].layers[row["state"]].item() == np.float32(row["value"])
    counts = frame[frame["state"] == "ill"].groupby("tokens").size()
    assert adata.var["n_cells"].to_dict() == {folders.NAMES[tokens[0]]: n for tokens, n in counts.items()}
    np.testing.assert_array_equal(opened.to_anndata(state="odd").X, adata.layers["odd"])
    few = opened.to_anndata(cells=opened.cells["cell"].to_pylist()[:3])
    assert few.n_obs == 3
    with pytest.raises(InputError, match="no state 'dead'"):
        opened.to_anndata(state="dead")
    adata.write_h5ad(home / "x.h5ad")


def test_a_matrix_that_fits_no_memory_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_free_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"takes .* GiB, and .* are free; choose fewer cells, or use read\(\)"):
        gf.open_perturbations(home / "whole").to_anndata()


def test_doses_are_perturbations_of_their_own(tmp_path: Path) -> None:
    chosen = RunCells(np.array([5, 2]), np.array([4, 3]), np.array([4, 2]))
    with PerturbationWriter(tmp_path / "out", chosen, plan={}, rows=RowSchema(extra={"dose": pa.float32()})) as writer:
        writer.append(5, CellRows.of([[1], [1], [1, 2]], [0.5, 0.75, 0.25], extra={"dose": [0.25, 0.5, 0.25]}))
        writer.append(2, CellRows.of([[1]], [0.125], extra={"dose": [0.5]}))
        writer.finish()
    adata = gf.open_perturbations(tmp_path / "out").to_anndata()
    assert adata.var_names.tolist() == ["1 0.25", "1 0.5", "1+2 0.25"]
    np.testing.assert_array_equal(adata.X, np.float32([[0.5, 0.75, 0.25], [np.nan, 0.125, np.nan]]))
    assert adata.var["n_cells"].tolist() == [1, 2, 1]
    assert adata.var["dose"].tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("name", ["part-00001.parquet", "_cells.parquet", "_manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_found(name: str, damage: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(home / "whole", out)
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-9]))
    if damage == "gone":
        (out / name).unlink()
    with pytest.raises(OutputError) as caught:
        gf.open_perturbations(out).read()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_must_add_up_whatever_its_digest_says(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(home / "whole", out)
    content = json.loads((out / "_manifest.json").read_text())
    content["n_rows"] += 1
    (out / "_manifest.json").write_text(json.dumps(with_digest(content)))
    with pytest.raises(OutputError, match=r"_manifest.json lists files of [\d,]+ rows"):
        gf.open_perturbations(out)


def test_what_is_no_folder_of_perturbations(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        gf.open_perturbations(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="holds no perturbations"):
        gf.open_perturbations(tmp_path)
    writer = PerturbationWriter(tmp_path / "begun", folders.cells(), plan={})
    with pytest.raises(OutputError, match=r"begun is unfinished: 0 of \d+ files"):
        gf.open_perturbations(tmp_path / "begun")
    writer.close()
    shutil.copytree(home / "whole", tmp_path / "more")
    shutil.copy(home / "whole" / "part-00000.parquet", tmp_path / "more" / "copy.parquet")
    with pytest.raises(OutputError, match=r"copy.parquet is in a folder of perturbations and is none of its files"):
        gf.open_perturbations(tmp_path / "more")


def test_checksums_may_be_left_out(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "check_file", lambda *arguments: pytest.fail("compared"))
    gf.open_perturbations(home / "whole", verify=False).read()
    monkeypatch.setenv("GENEFORMER_FAST_VERIFY", "0")
    gf.open_perturbations(home / "whole").read()


def _one_cell(out: Path, tokens: list[list[int]], obs: dict[str, pa.Array] | None = None) -> gf.Perturbations:
    chosen = RunCells(np.array([5]), np.array([3]), np.array([len(tokens)]), obs=obs or {})
    schema = RowSchema(obs={name: column.type for name, column in chosen.obs.items()})
    with PerturbationWriter(out, chosen, plan={}, rows=schema) as writer:
        writer.append(5, CellRows.of(tokens, np.zeros(len(tokens))))
        writer.finish()
    return gf.open_perturbations(out)


def test_two_values_of_one_perturbation_are_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two values of one perturbation"):
        _one_cell(tmp_path / "out", [[1, 2], [7], [1, 2]]).to_anndata()


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (datetime.date(2020, 5, 1), "2020-05-01"),
        (datetime.datetime(2020, 5, 1, 3, 4, 5), "2020-05-01 03:04:05.000000"),
        (decimal.Decimal("1.50"), "1.50"),
        (True, True),
        (None, None),
        (pa.scalar(None, pa.bool_()), None),
        (pa.scalar(None, pa.string()), None),
    ],
)
def test_what_is_carried_can_be_written_as_h5ad(value: object, kept: object, tmp_path: Path) -> None:
    carried = {"what": pa.array([value]), "rank": pa.array([7])}
    adata = _one_cell(tmp_path / "out", [[1], [7]], carried).to_anndata()
    # Only the name that is taken is longer.
    assert adata.obs.columns.tolist() == ["rank", "cell", "length", "what", "obs_rank"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    found = anndata.read_h5ad(tmp_path / "x.h5ad").obs["what"].iloc[0]
    assert pd.isna(found) if kept is None else found == kept


def test_values_of_cells_that_are_not_listed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = gf.open_perturbations([home / f"part{part}" for part in (1, 2, 3)])
    monkeypatch.setattr(opened, "cells", opened.cells.slice(1))
    with pytest.raises(OutputError, match="values of cell"):
        opened.read()
    opened = gf.open_perturbations(home / "whole")
    monkeypatch.setattr(opened, "cells", opened.cells.slice(1))
    for read in (opened.read, opened.to_frame, opened.to_anndata):
        with pytest.raises(OutputError, match=r"values of cell .*which it does not list"):
            read()


@pytest.mark.parametrize("asked", [{"cells": 3}, {"cells": [1.5]}, {"columns": "value"}, {"affected": "yes"}])
def test_what_is_read_is_asked_for_by_lists(asked: dict[str, Any], home: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(asked))} must be"):
        gf.open_perturbations(home / "whole").read(**asked)
