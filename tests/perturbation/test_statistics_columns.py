"""Rows as columns: whatever the batches, once each, and what cannot be right is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from statistics_rows import collected, screen, table_of

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.statistics.aggregate import aggregate_gene_shifts
from geneformer_fast.perturbation.statistics.collecting import Collector
from geneformer_fast.perturbation.statistics.names import Names


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_values_by_edit(batch: int | None) -> None:
    table = table_of(
        [(7, [5], 0.5), (7, [9], 0.25), (7, [4], 1.0), (3, [9], 0.125), (3, [5, 9], 2.0), (3, [5], -0.5)],
        donor=["a", "a", "a", "b", "b", "b"],
    )
    run = collected(table, batch=batch, obs=("donor",))
    assert run.edits == [(4,), (5,), (5, 9), (9,)]
    assert run.cells.tolist() == [7, 3]
    assert run.obs["donor"].tolist() == ["a", "b"]
    assert [run.only.of(edit).tolist() for edit in range(4)] == [[1.0], [0.5, -0.5], [2.0], [0.25, 0.125]]
    assert run.only.means().tolist() == [1.0, 0.0, 2.0, 0.1875]
    assert run.only.edits.tolist() == [0, 1, 1, 2, 3, 3]
    # Places in cell 7: 0, 1, 2; in cell 3: 9 first, then the pair, then 5.
    assert run.rank.tolist() == [1.0, 0.5, 0.5, 0.25]


def test_states_stand_in_their_order_and_null_is_none() -> None:
    rows = [(0, [5], 1.0, "B"), (0, [6], 2.0, "B"), (0, [5], 3.0, "A"), (0, [6], 4.0, "A")]
    run = collected(table_of(rows), batch=1)
    assert run.states == ["B", "A"]
    assert run.towards("A").values.tolist() == [3.0, 4.0]
    assert run.rank.tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="no shifts towards 'C'; it has B, A"):
        run.towards("C")
    with pytest.raises(InputError, match=r"has shifts towards states \(B, A\)"):
        _ = run.only
    with pytest.raises(InputError, match="it has no states"):
        collected(table_of([(0, [5], 1.0)])).towards("A")
    with pytest.raises(InputError, match="read them apart"):
        collected(table_of(rows), table_of([(1, [5], 1.0)]))


@pytest.mark.parametrize("batch", [None, 2])
def test_values_of_genes_are_summed_up(batch: int | None) -> None:
    rng = np.random.default_rng(0)
    edit, affected = rng.integers(2, 5, 400), rng.integers(10, 14, 400)
    values = (1 - 1e-3 * rng.random(400)).astype(np.float32)
    rows = [(i, [int(token)], float(value)) for i, (token, value) in enumerate(zip(edit, values, strict=True))]
    moments = collected(table_of(rows, affected.tolist()), batch=batch).moments
    assert len(moments.keys) == 12
    for at in range(12):
        of_pair = values[(edit == 2 + moments.edit[at]) & (affected == moments.affected[at])].astype(np.float64)
        assert moments.counts[at] == len(of_pair)
        assert moments.means[at] == pytest.approx(of_pair.mean(), rel=1e-14)
        assert moments.deviations[at] == pytest.approx(of_pair.std(), rel=1e-11)


def test_sums_that_are_joined_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(i, [i % 3], i / 8) for i in range(60)]
    affected = [i % 5 for i in range(60)]
    whole = collected(table_of(rows, affected)).moments
    monkeypatch.setattr("geneformer_fast.perturbation.statistics.moments._MOST_PARTS", 0)
    parts = collected(table_of(rows, affected), batch=7).moments
    assert (parts.keys == whole.keys).all()
    assert np.allclose(parts.means, whole.means, rtol=1e-14)
    assert np.allclose(parts.deviations, whole.deviations, rtol=1e-13)


def test_nan_is_left_out_and_counted() -> None:
    run = collected(table_of([(0, [5], float("nan")), (1, [5], 0.5), (1, [6], 0.25)]))
    assert run.n_missing == 1
    assert run.only.means().tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match=r"no value in these runs; all 1 are NaN"):
        collected(table_of([(0, [5], float("nan"))]))


def test_shards_are_one_run_and_overlaps_are_none() -> None:
    first, second = table_of([(0, [5], 1.0), (0, [6], 2.0)]), table_of([(1, [5], 3.0)])
    assert collected(first, second).only.of(0).tolist() == [1.0, 3.0]
    with pytest.raises(InputError, match="run 1: cell 0 is in another of these runs too"):
        collected(first, first)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (table_of([]), "run 0: there is no row in it"),
        (table_of([(3, [5], float("inf"))]), "value of cell 3 is infinite"),
        (table_of([(3, [], 1.0)]), "names no perturbed token"),
        (table_of([(3, [5], 1.0)]).drop(["value"]), "there is no column 'value'"),
        (pa.table({"cell": [0], "tokens": [[1]], "value": pa.array([None], pa.float32())}), "has empty places"),
    ],
)  # fmt: skip
def test_what_is_refused(table: pa.Table, said: str) -> None:
    with pytest.raises(InputError, match=said):
        collected(table)
    with pytest.raises(InputError, match="no column 'donor'"):
        collected(table_of([(0, [5], 1.0)]), obs=("donor",))


def test_names_come_from_the_rows_or_nowhere() -> None:
    table = table_of([(0, [5], 1.0), (0, [5, 6], 2.0)])
    genes = pa.array([["ENSG5"], ["ENSG5", None]], pa.list_(pa.string()))
    names = Names(collected(table.append_column("genes", genes)))
    assert names.gene(5) == "ENSG5"
    assert names.gene(6) != names.gene(6)
    assert names.shown((5, 6)) == "ENSG5+token 6"
    assert names.tokens_of(["ENSG5", "ENSG9"]) == {"ENSG5": 5}


def test_a_gene_that_a_cell_holds_twice_has_two_values() -> None:
    """As the official tokenizer leaves duplicates in a cell."""
    run = collected(table_of([(0, [5], 1.0), (0, [6], 5.0), (0, [5], 2.0)]))
    assert run.only.of(0).tolist() == [1.0, 2.0]


def test_memory_is_of_rows_not_of_objects() -> None:
    """A million rows in batches: what is held is arrays of their length."""
    import tracemalloc

    rng = np.random.default_rng(0)
    values = rng.random((500, 200)).astype(np.float64)
    tables = [screen(values, cells=range(500 * i, 500 * (i + 1))) for i in range(10)]
    collector = Collector()
    tracemalloc.start()
    collector.add((batch for table in tables for batch in table.to_batches(max_chunksize=20_000)), "run")
    run = collector.run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(run.only.values) == 1_000_000
    assert peak < 60 * 1_000_000


def test_cells_that_nobody_names_are_counted() -> None:
    """As in official files of lists: the same place in two lists is the same cell."""
    rows = [(0, [5], 1.0, "A"), (0, [5], 2.0, "A"), (0, [5], 3.0, "B"), (0, [5], 4.0, "B")]
    table = table_of(rows)
    table = table.set_column(0, "cell", pa.nulls(4, pa.int64()))
    for batch in (None, 1):
        run = collected(table, batch=batch)
        assert run.towards("A").cells.tolist() == run.towards("B").cells.tolist() == [0, 1]


def test_one_dose_at_a_time() -> None:
    table = table_of([(0, [5], 1.0), (0, [5], 2.0)]).append_column("dose", pa.array([0.1, 0.5], pa.float32()))
    assert collected(table, dose=0.5).only.values.tolist() == [2.0]
    with pytest.raises(InputError, match=r"several doses \(0.1, 0.5\); say which with dose"):
        collected(table)
    with pytest.raises(InputError, match=r"no dose 0.3 in the run; there are 0.1, 0.5"):
        collected(table, dose=0.3)
    assert collected(table.slice(0, 1)).only.values.tolist() == [1.0]
    with pytest.raises(InputError, match="no doses in the run"):
        collected(table_of([(0, [5], 1.0)]), dose=0.5)


@pytest.mark.parametrize("batch", [None, 1])
def test_values_of_genes_have_no_state(batch: int | None) -> None:
    """Whichever row comes first."""
    rows = [
        (0, [5], 0.9),
        (0, [5], 1.0, "A"),
        (0, [6], 0.8),
        (0, [6], 2.0, "A"),
        (0, [5], 3.0, "B"),
        (0, [6], 4.0, "B"),
    ]
    run = collected(table_of(rows, [7, None, 7, None, None, None]), batch=batch)
    assert run.states == ["A", "B"]
    assert run.rank.tolist() == [0.0, 1.0]
    assert run.moments.affected.tolist() == [7, 7]
    table = aggregate_gene_shifts(run, Names(run))
    assert table["Affected"].tolist() == [7, 7]
    assert table["Cosine_sim_mean"].tolist() == pytest.approx([0.8, 0.9])
