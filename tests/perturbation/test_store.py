"""A folder of perturbations: its columns, the same bytes however it was written, and other runs refused."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from geneformer_fast.errors import InputError, OutputError, UnsupportedError
from geneformer_fast.perturbation import row_file, store
from geneformer_fast.perturbation.reading import open_perturbations
from geneformer_fast.perturbation.rows import CellRows, RowSchema
from geneformer_fast.perturbation.shards import Shard
from geneformer_fast.perturbation.store import PerturbationWriter, RunCells
from geneformer_fast.ragged import Ragged


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_ROWS_PER_FILE", 150)
    monkeypatch.setattr(row_file, "ROWS_AT_ONCE", 64)


def test_columns_are_as_promised_and_parquet_readers_open_the_folder(tmp_path: Path) -> None:
    folders.write(tmp_path / "out")
    table = parquet.read_table(tmp_path / "out")
    assert table.schema.names == ["cell", "tokens", "genes", "affected", "state", "value", "donor", "age"]
    kinds = [pa.int64(), pa.list_(pa.int32()), pa.list_(pa.string()), pa.int32(), pa.string(), pa.float32()]
    for name, kind in zip(table.schema.names, kinds, strict=False):
        assert table.schema.field(name).type.equals(kind) or str(table.schema.field(name).type) == str(kind)
    chosen = folders.cells()
    assert table.num_rows == int(chosen.n_rows.sum())
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) > 5
    start = 0
    for place, cell in enumerate(chosen.cell.tolist()):
        rows = folders.rows_of(cell, int(chosen.length[place]))
        found = table.slice(start, len(rows)).to_pydict()
        assert found["cell"] == [cell] * len(rows)
        assert [tokens[0] for tokens in found["tokens"]] == np.repeat(rows.tokens, 3).tolist()
        assert [genes[0] for genes in found["genes"]] == [folders.NAMES[token] for token in np.repeat(rows.tokens, 3)]
        assert found["affected"] == [None] * len(rows)
        assert found["state"] == [*folders.STATES] * (len(rows) // 3)
        np.testing.assert_array_equal(np.array(found["value"], np.float32), rows.value)
        assert found["donor"] == [f"donor {place % 3}"] * len(rows)
        assert (found["age"][0] is None) == (place % 5 == 0)
        start += len(rows)
    assert len(pandas.read_parquet(tmp_path / "out")) == table.num_rows


def test_bytes_are_the_same_for_any_pieces_and_any_number_of_processes(tmp_path: Path) -> None:
    folders.write(tmp_path / "one", pieces=1)
    folders.write(tmp_path / "seven", pieces=7)
    expected = folders.folder_bytes(tmp_path / "one")
    assert folders.folder_bytes(tmp_path / "seven") == expected
    chosen, schema = folders.cells(), RowSchema(states=folders.STATES, names=folders.NAMES)
    writers = [
        PerturbationWriter(tmp_path / "three", chosen, plan=folders.PLAN, rows=schema, part=part, n_parts=3)
        for part in range(3)
    ]
    shares = []
    for number, writer in enumerate(writers):
        shares.append(writer.remaining.tolist())
        if not number:  # what one has written meanwhile changes nothing for another that comes later
            _append(writer, chosen, shares[0][:25])
            writers[2].close()
            writers[2] = PerturbationWriter(
                tmp_path / "three", chosen, plan=folders.PLAN, rows=schema, part=2, n_parts=3
            )
    assert sorted(place for share in shares for place in share) == list(range(len(chosen)))
    for writer, share in zip(reversed(writers), reversed([shares[0][25:], *shares[1:]]), strict=True):
        _append(writer, chosen, share)
        writer.complete()
    writers[0].finish({"noise": 1e-7})
    for writer in writers:
        writer.close()
    assert folders.folder_bytes(tmp_path / "three") == expected
    late = PerturbationWriter(
        tmp_path / "three", chosen, plan=folders.PLAN, rows=schema, part=1, n_parts=3, resume=True
    )
    assert late.is_finished
    assert not len(late.remaining)


def _append(writer: PerturbationWriter, chosen: RunCells, places: Sequence[int]) -> None:
    for place in places:
        cell = int(chosen.cell[place])
        writer.append(cell, folders.rows_of(cell, int(chosen.length[place])))


def test_rows_in_memory_do_not_grow_with_the_genes_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, plain = [], RowSchema.table
    monkeypatch.setattr(RowSchema, "table", lambda self, *of: sizes.append(len(of[1])) or plain(self, *of))
    written: list[int] = []
    group = row_file.RowFile._write_group
    monkeypatch.setattr(row_file.RowFile, "_write_group", lambda self, n: written.append(n) or group(self, n))
    folders.write(tmp_path / "out", folders.cells(3), states=(), has_genes=True)
    assert max(sizes) == max(written) == 64
    assert parquet.ParquetFile(tmp_path / "out" / "part-00000.parquet").metadata.num_row_groups > 1


def test_a_process_that_wrote_nothing_is_missed(tmp_path: Path) -> None:
    chosen, schema = folders.cells(), RowSchema(states=folders.STATES, names=folders.NAMES)
    with PerturbationWriter(tmp_path / "out", chosen, plan=folders.PLAN, rows=schema, n_parts=2) as first:
        _append(first, chosen, first.remaining)
        with pytest.raises(OutputError, match=r"part-00001.parquet is not complete.*--resume"):
            first.finish()


def _killed_at_step(step: int, out: Path, **options: Any) -> bool:
    """Write in a fork that SIGKILLs itself before its ``step``-th change of the disk; whether that moment came."""
    child = os.fork()
    if child == 0:
        try:
            left = step

            def killing(change: Any) -> Any:
                def changed(*arguments: Any, **named: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return change(*arguments, **named)

                return changed

            for name in ("rename", "replace", "unlink", "fsync", "mkdir", "rmdir"):
                setattr(os, name, killing(getattr(os, name)))
            folders.write(out, **options)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_step_and_resumed_it_has_the_same_bytes(tmp_path: Path) -> None:
    chosen = folders.cells(12)
    folders.write(tmp_path / "whole", chosen)
    expected = folders.folder_bytes(tmp_path / "whole")
    step, n_kills = 0, 0
    while _killed_at_step(step, tmp_path / f"{step}", chosen=chosen):
        out = tmp_path / f"{step}"
        if (out / "_manifest.json").exists():
            assert {
                name: content for name, content in folders.folder_bytes(out).items() if name in expected
            } == expected
        _killed_at_step(step // 2, out, chosen=chosen, resume=True)  # again, while it goes on
        folders.write(out, chosen, resume=True)
        assert folders.folder_bytes(out) == expected, step
        step, n_kills = step + 3, n_kills + 1
    assert n_kills > 15


@pytest.mark.parametrize("is_finished", [True, False])
def test_killed_while_another_run_is_replaced(is_finished: bool, tmp_path: Path) -> None:
    """Nothing of the other run is taken for this one's, at whatever step it ends."""
    chosen, plan = folders.cells(8), {**folders.PLAN, "model": "cc"}
    folders.write(tmp_path / "whole", chosen)
    expected = folders.folder_bytes(tmp_path / "whole")
    for step in range(24):
        out = tmp_path / f"{step}"
        folders.write(out, chosen, plan=plan)
        if not is_finished:
            with PerturbationWriter(out, chosen, plan=plan, rows=_schema(), overwrite=True) as writer:
                _append(writer, chosen, writer.remaining[:6])
        assert _killed_at_step(step, out, chosen=chosen, overwrite=True)
        try:
            folders.write(out, chosen, resume=True)
        except OutputError as refused:  # it is still the other run
            assert "model: begun with 'cc', now 'bb'" in str(refused)  # noqa: PT017
            folders.write(out, chosen, plan=plan, resume=True)
            folders.write(out, chosen, overwrite=True)
        assert folders.folder_bytes(out) == expected, step


def test_a_plan_may_hold_tuples(tmp_path: Path) -> None:
    plan = {**folders.PLAN, "states": {"alternatives": ("a", "b")}}
    folders.write(tmp_path / "out", plan=plan)
    folders.write(tmp_path / "out", plan=plan, resume=True)


def test_only_what_is_left_is_computed(tmp_path: Path) -> None:
    chosen = folders.cells()
    with PerturbationWriter(tmp_path / "out", chosen, plan=folders.PLAN, rows=_schema()) as writer:
        _append(writer, chosen, writer.remaining[:30])
        n_done = [stop for _, stop in chosen.blocks() if stop < 30][-1]
    with PerturbationWriter(tmp_path / "out", chosen, plan=folders.PLAN, rows=_schema(), resume=True) as writer:
        assert writer.remaining.tolist() == list(range(n_done, len(chosen)))


def _schema() -> RowSchema:
    return RowSchema(states=folders.STATES, names=folders.NAMES)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"plan": {**folders.PLAN, "model": "cc"}}, "model: begun with 'bb', now 'cc'"),
        (
            {"plan": {**folders.PLAN, "options": {"kind": "overexpress", "genes": "all"}}},
            "options.kind: begun with 'de",
        ),
        ({"states": ("ill", "well", "strange")}, "states: begun with"),
        ({"chosen": folders.cells(seed=1)}, "which cells: begun with"),
        ({"shard": "1/2"}, "shard.n_shards: begun with 1, now 2"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_another_run_is_refused(changed: dict[str, Any], said: str, is_finished: bool, tmp_path: Path) -> None:
    _begin(tmp_path / "out", is_finished)
    before = folders.folder_bytes(tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be resumed") as caught:
        folders.write(tmp_path / "out", resume=True, **changed)
    assert said in str(caught.value)
    assert folders.folder_bytes(tmp_path / "out") == before


def _begin(out: Path, is_finished: bool) -> None:
    folders.write(out)
    if not is_finished:  # as it was just before the end
        _unfinish(out)


def _unfinish(out: Path) -> None:
    chosen = folders.cells()
    folders.write(out, overwrite=True)
    with PerturbationWriter(out, chosen, plan=folders.PLAN, rows=_schema(), overwrite=True) as writer:
        _append(writer, chosen, writer.remaining[:20])


def test_versions_are_part_of_what_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(tmp_path / "out", is_finished=False)
    monkeypatch.setattr("geneformer_fast.perturbation.folder.__version__", "99.0")
    with pytest.raises(OutputError, match=r"versions.geneformer_fast: begun with '.*', now '99.0'"):
        folders.write(tmp_path / "out", resume=True)


@pytest.mark.parametrize("is_finished", [True, False])
def test_what_is_there_needs_a_word(is_finished: bool, tmp_path: Path) -> None:
    _begin(tmp_path / "out", is_finished)
    with pytest.raises(OutputError, match="holds finished perturbations" if is_finished else "files are complete"):
        folders.write(tmp_path / "out")
    with pytest.raises(OutputError, match="exclude each other"):
        folders.write(tmp_path / "out", resume=True, overwrite=True)
    folders.write(tmp_path / "new")
    folders.write(tmp_path / "out", overwrite=True)
    assert folders.folder_bytes(tmp_path / "out") == folders.folder_bytes(tmp_path / "new")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="nothing in it is touched"):
            folders.write(tmp_path / "notes", **options)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_resuming_what_is_finished_leaves_nothing_to_do(tmp_path: Path) -> None:
    folders.write(tmp_path / "out")
    with PerturbationWriter(
        tmp_path / "out", folders.cells(), plan=folders.PLAN, rows=_schema(), resume=True
    ) as writer:
        assert writer.is_finished
        assert not len(writer.remaining)


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    with (
        PerturbationWriter(tmp_path / "out", folders.cells(), plan=folders.PLAN, rows=_schema()),
        pytest.raises(OutputError, match="being written by another process"),
    ):
        folders.write(tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists(), "nothing was complete, so nothing is left"


@pytest.mark.parametrize("n_bytes", [400, 3_000])
def test_a_full_disk_is_one_sentence(n_bytes: int, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: it is larger than the file system") as caught:
            folders.write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    left = folders.folder_bytes(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert not any(".part" in name for name in left)
    assert any(name.startswith("_blocks") for name in left) or not left
    folders.write(tmp_path / "out", resume=True)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_not_gone_on_with(damage: str, tmp_path: Path) -> None:
    _begin(tmp_path / "out", is_finished=False)
    path = tmp_path / "out" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-9]))
    if damage == "gone":
        path.unlink()
    with pytest.raises(OutputError, match=r"part-00001.parquet.*(damaged|missing).*--overwrite"):
        folders.write(tmp_path / "out", resume=True)


def test_cells_without_rows_have_no_rows(tmp_path: Path) -> None:
    chosen = RunCells(np.array([5, 3, 9]), np.array([4, 2, 1]), np.array([4, 2, 0]))
    with PerturbationWriter(tmp_path / "out", chosen, plan={}) as writer:
        writer.append(3, CellRows.of([[1, 2], [7]], [0.5, np.nan]))
        writer.finish()
    table = parquet.read_table(tmp_path / "out")
    assert table["cell"].to_pylist() == [3, 3]
    assert table["tokens"].to_pylist() == [[1, 2], [7]]
    assert table["genes"].to_pylist() == [None, None]
    assert table["state"].to_pylist() == [None, None]
    assert np.isnan(table["value"].to_numpy()).tolist() == [False, True]
    assert parquet.read_table(tmp_path / "out" / "_cells.parquet")["cell"].to_pylist() == [5, 3, 9]


def test_cells_come_in_order(tmp_path: Path) -> None:
    chosen = RunCells(np.array([5, 3, 9]), np.array([4, 2, 1]), np.array([4, 2, 0]))
    with PerturbationWriter(tmp_path / "out", chosen, plan={}) as writer:
        writer.append(3, CellRows.of([[1]], [0.5]))
        with pytest.raises(ValueError, match="after a later one"):
            writer.append(5, CellRows.of([[1]], [0.5]))
        with pytest.raises(ValueError, match="not among"):
            writer.append(4, CellRows.of([[1]], [0.5]))


def test_carried_columns_keep_out_of_the_way_of_ours() -> None:
    with pytest.raises(InputError, match=r"called 'value'.*--obs another_name=value"):
        RowSchema(obs={"value": pa.string()})


def test_variants_may_come_packed_square_or_as_lists() -> None:
    import torch

    square = CellRows.of(np.array([[1, 2], [3, 4]]), [[0.1, 0.2], [0.3, 0.4]])
    assert square.bounds.tolist() == [0, 2, 4]
    assert square.state.tolist() == [0, 1, 0, 1]
    assert square.variant.tolist() == [0, 0, 1, 1]
    packed = CellRows.of(Ragged.from_cells([[1], [2, 3, 4]]), torch.tensor([0.5, 0.25], dtype=torch.bfloat16).float())
    listed = CellRows.of([(1,), (2, 3, 4)], [0.5, 0.25])
    for name in ("tokens", "bounds", "value", "variant"):
        assert getattr(packed, name).tolist() == getattr(listed, name).tolist()
        assert getattr(packed, name).dtype == getattr(listed, name).dtype


def test_further_columns_of_a_run(tmp_path: Path) -> None:
    chosen = RunCells(np.array([5]), np.array([4]), np.array([4]))
    schema = RowSchema(extra={"dose": pa.float32()})
    with PerturbationWriter(tmp_path / "out", chosen, plan={}, rows=schema) as writer:
        writer.append(5, CellRows.of([[1], [1]], [0.5, 0.75], extra={"dose": [0.25, 0.5]}))
        writer.finish()
    table = parquet.read_table(tmp_path / "out")
    assert table.column_names[-1] == "dose"
    assert table["dose"].to_pylist() == [0.25, 0.5]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3", "1/²"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UnsupportedError, match="is i/N with i from 1 to N"):
        Shard.of(text)


def test_more_shards_than_cells() -> None:
    with pytest.raises(UnsupportedError, match="shard 4/5 has no cells, since there are 3; make fewer shards"):
        folders.cells(3).of_shard(Shard(4, 5))


def test_shards_hold_every_cell_once() -> None:
    ranks = [Shard.of(f"{i}/3").ranks(10).tolist() for i in (1, 2, 3)]
    assert sorted(rank for part in ranks for rank in part) == list(range(10))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("mark", ["_manifest.json", "_UNFINISHED.json"])
def test_nothing_is_removed_beside_a_file_that_only_has_the_name_of_ours(mark: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (mark, "part-00000.parquet"):
        (out / name).write_text('{"version": 3}')
    with pytest.raises(OutputError, match=rf"{mark} is no file of perturbations, so nothing beside it is removed"):
        folders.write(out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [mark, "part-00000.parquet"]


def test_a_damaged_folder_of_ours_may_be_written_over(tmp_path: Path) -> None:
    folders.write(tmp_path / "out")
    manifest = tmp_path / "out" / "_manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    folders.write(tmp_path / "out", overwrite=True)
    assert open_perturbations(tmp_path / "out").n_cells == 40
