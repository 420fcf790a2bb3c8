"""From folders of perturbations to statements about genes: what was put in comes out, and nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import n_colors, pixels
from statistics_rows import screen, table_of, table_of_reference, write_run

import geneformer_fast as gf
from geneformer_fast import cli
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.perturbation.statistics.run import perturbation_stats

#: Genes of the screen; donors; the gene that moves cells towards B, and the one that moves all of them both ways.
N_GENES, DONORS, MOVER, UNIVERSAL = 60, ("d1", "d2", "d3", "d4"), 7, 20
QUICK: dict[str, Any] = {"draws": 200, "progress": False}


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    """Eighty cells of four donors. Without a mover all genes do nothing; each donor has a whim of its own."""
    rng = np.random.default_rng(5)
    donor = np.repeat(np.arange(4), 20)
    shifts = {}
    for state in ("B", "mono"):
        values = rng.normal(0, 1e-3, (80, N_GENES)) + rng.normal(0, 3e-4, (4, N_GENES))[donor]
        values[:, MOVER] += 5e-3 * (state == "B")
        values[:, UNIVERSAL] += 8e-3 * np.sign(rng.normal(size=80))
        values[rng.random(values.shape) < 0.2] = np.nan
        values[3:, 40] = np.nan  # in two or three cells
        shifts[state] = values
    shifts["mono"][np.isnan(shifts["B"])] = np.nan
    shifts["B"][np.isnan(shifts["mono"])] = np.nan
    obs = {"donor": [DONORS[each] for each in donor]}
    start = screen(np.where(np.isnan(shifts["B"]), np.nan, -1e-3), state="NK", obs=obs)
    parts = [start, *(screen(values, state=state, obs=obs) for state, values in shifts.items())]
    cosines = screen(0.99 - np.abs(shifts["B"]), obs=obs)
    return {"shifts": pa.concat_tables(parts), "cosines": cosines, "goal": screen(shifts["B"])}


@pytest.fixture(scope="module")
def folders(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    states = ("NK", "B", "mono")
    return {
        "shifts": write_run(place / "shifts", tables["shifts"], states=states, n_cells=100, obs=["donor"]),
        "cosines": write_run(place / "cosines", tables["cosines"], n_cells=100, obs=["donor"]),
    }


def by_gene(table: pd.DataFrame, state: str | None = "B") -> pd.DataFrame:
    """Rows of a state, by the number of the gene."""
    chosen = table if state is None else table[table["state"] == state]
    return chosen.set_index(chosen["tokens"].astype(int) - 10)


def test_what_was_put_in_comes_out(folders: dict[str, Path]) -> None:
    found = perturbation_stats(folders["shifts"], group="donor", **QUICK)
    assert found.mode == "goal_state_shift"
    assert found.about["states"] == ["B", "mono"]
    effects = by_gene(found.effects)
    assert effects["q_value"].idxmin() == MOVER
    assert effects["mean"][MOVER] == pytest.approx(5e-3, abs=1e-3)
    assert effects["low"][MOVER] < 5e-3 < effects["high"][MOVER]
    assert effects["same_sign"][MOVER] == 1
    assert by_gene(found.effects, "mono")["q_value"][MOVER] > 0.05
    # It moves every cell, most of all, this way or that; which is no shift, and no effect of its own.
    assert effects.index[effects["is_universal"]].tolist() == [UNIVERSAL]
    assert effects["top_share"][UNIVERSAL] == 1
    assert effects["q_value"][UNIVERSAL] > 0.05
    assert effects["n_groups"][MOVER] == 4
    assert found.table is not None
    assert found.table["Gene"].iloc[0] == MOVER + 10


def test_cells_without_rows_count_as_covered_by_nothing(folders: dict[str, Path]) -> None:
    """The run has 100 cells, 20 of which have no value."""
    effects = by_gene(perturbation_stats(folders["shifts"], **QUICK).effects)
    assert effects["coverage"][MOVER] == effects["n_cells"][MOVER] / 100
    assert effects["n_cells"].max() <= 80


def test_genes_in_few_cells_are_listed_and_not_tested(tables: dict[str, pa.Table]) -> None:
    effects = by_gene(perturbation_stats(tables["shifts"], **QUICK).effects)
    assert effects["n_cells"][40] <= 3
    assert not effects["is_covered"][40]
    assert np.isnan(effects.loc[40, ["p_value", "q_value", "difference", "null_mean"]].astype(float)).all()
    tested = by_gene(perturbation_stats(tables["shifts"], min_cells=1, **QUICK).effects)
    assert tested["p_value"].notna().all()


def test_a_donor_is_the_unit(tables: dict[str, pa.Table]) -> None:
    """Donors differ, so that their means are less sure than so many cells would make one believe."""
    by_cells = by_gene(perturbation_stats(tables["shifts"], **QUICK).effects)
    found = perturbation_stats(tables["shifts"], group="donor", **QUICK)
    by_donors = by_gene(found.effects)
    width = (by_donors["high"] - by_donors["low"]) / (by_cells["high"] - by_cells["low"])
    assert width[by_donors["is_covered"]].median() > 1.5
    assert (by_donors["low_cells"].dropna() == by_cells["low"].dropna()).all()
    means = [by_cells["mean"][0], by_donors["mean"][0]]
    values, donor = tables["goal"], np.repeat(np.arange(4), 20)
    chosen = np.array([tokens == [10] for tokens in values["tokens"].to_pylist()])
    frame = pd.DataFrame(
        {"value": values["value"].to_numpy()[chosen], "donor": donor[values["cell"].to_numpy()[chosen]]}
    )
    assert means == pytest.approx([frame["value"].mean(), frame.groupby("donor")["value"].mean().mean()])
    assert found.about["n_groups"] == 4


def test_one_donor_is_said_to_be_none(tables: dict[str, pa.Table]) -> None:
    one = tables["shifts"].filter(pa.compute.equal(tables["shifts"]["donor"], "d1"))
    with pytest.warns(UserWarning, match="all cells have one value of 'donor', so that cells are the unit"):
        found = perturbation_stats(one, group="donor", min_cells=5, **QUICK)
    assert "low_cells" not in found.effects
    assert found.about["n_groups"] == 0


def test_cells_without_a_donor_are_left_out_with_a_warning(tables: dict[str, pa.Table]) -> None:
    column = [None if donor == "d4" else donor for donor in tables["shifts"]["donor"].to_pylist()]
    at = tables["shifts"].schema.get_field_index("donor")
    table = tables["shifts"].set_column(at, "donor", pa.array(column))
    with pytest.warns(UserWarning, match="20 cells have no 'donor' and are left out of means"):
        effects = by_gene(perturbation_stats(table, group="donor", **QUICK).effects)
    assert effects["n_groups"].max() == 3


def test_a_gene_of_cells_without_a_donor_is_like_no_other(tables: dict[str, pa.Table]) -> None:
    """It has no mean, and takes nothing away from the means of genes like others."""
    own = np.array([tokens == [10] for tokens in tables["shifts"]["tokens"].to_pylist()])
    cells = np.unique(tables["shifts"]["cell"].to_numpy()[own])[:12]
    at = tables["shifts"].schema.get_field_index("donor")
    donors = tables["shifts"]["donor"].to_pylist()
    is_chosen = np.isin(tables["shifts"]["cell"].to_numpy(), cells)
    column = [None if chosen else donor for donor, chosen in zip(donors, is_chosen, strict=True)]
    table = tables["shifts"].set_column(at, "donor", pa.array(column)).filter(pa.array(~own | is_chosen))
    with pytest.warns(UserWarning, match="12 cells have no 'donor'"):
        effects = by_gene(perturbation_stats(table, group="donor", **QUICK).effects)
    assert effects["n_cells"][0] == 12
    assert np.isnan(effects.loc[0, ["mean", "p_value", "low"]].astype(float)).all()
    assert effects["p_value"].notna().sum() == N_GENES - 2  # nor the one in hardly any cell


def test_nothing_is_found_where_nothing_is() -> None:
    """Of many genes without an effect hardly one is called unusual, and intervals hold zero."""
    rng = np.random.default_rng(0)
    found = perturbation_stats(screen(rng.normal(0, 1e-3, (50, 300)), state="B"), **QUICK)
    assert (found.effects["q_value"] < 0.05).sum() <= 2
    assert ((found.effects["low"] < 0) & (found.effects["high"] > 0)).mean() == pytest.approx(0.95, abs=0.04)
    inside = (found.effects["difference_low"] < 0) & (found.effects["difference_high"] > 0)
    assert inside.mean() == pytest.approx(0.95, abs=0.04)


def test_a_gene_that_stands_first_is_compared_with_those_that_do() -> None:
    """Effects fall with rank in all genes; only one does more than its rank."""
    rng = np.random.default_rng(1)
    values = 1 - (0.02 - 0.018 * np.arange(200) / 199) + rng.normal(0, 2e-4, (40, 200))
    values[:, 150] -= 4e-3
    found = perturbation_stats(screen(values), mode="aggregate_data", **QUICK)
    effects = by_gene(found.effects, None)
    assert effects["mean"].argmin() < 5  # those in front have the largest effects,
    assert effects["p_value"].idxmin() == 150  # but are like others in front
    assert effects["difference"][150] == pytest.approx(-4e-3, rel=0.1)
    assert effects["difference_high"][150] < 0
    assert (effects["q_value"] < 0.05).sum() < 12


def test_results_do_not_depend_on_the_order_of_shards_or_batches(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    table = tables["goal"]
    first = perturbation_stats(table, mode="mixture_model", **QUICK)
    again = perturbation_stats(write_run(tmp_path / "run", table, n_cells=80), mode="mixture_model", **QUICK)
    pd.testing.assert_frame_equal(first.effects, again.effects)
    assert first.table is not None
    assert again.table is not None
    pd.testing.assert_frame_equal(first.table, again.table)


def test_a_control_tells_universal_responders_from_movers(tables: dict[str, pa.Table]) -> None:
    """Without alternatives the mover is among the strongest in every cell as well; other cells know better."""
    alone = by_gene(perturbation_stats(tables["shifts"], alternative=[], **QUICK).effects)
    assert alone.index[alone["is_universal"]].tolist() == [MOVER, UNIVERSAL]
    rng = np.random.default_rng(8)
    values = rng.normal(0, 1e-3, (40, N_GENES))
    values[:, UNIVERSAL] += 8e-3
    found = perturbation_stats(tables["shifts"], alternative=[], null=screen(values, state="B"), **QUICK)
    known = by_gene(found.effects)
    assert known.index[known["is_universal"]].tolist() == [UNIVERSAL]
    assert known["beyond_control"][MOVER] == pytest.approx(5e-3, abs=1e-3)


def test_vs_null_and_a_control(tables: dict[str, pa.Table]) -> None:
    other = screen(0.99 - np.abs(np.random.default_rng(3).normal(0, 1e-3, (30, N_GENES - 1))))
    found = perturbation_stats(tables["cosines"], null=other, **QUICK)
    assert found.mode == "vs_null"
    assert found.table is not None
    assert found.table["Gene"].iloc[-1] == 10 + N_GENES - 1  # which the null lacks
    effects = by_gene(found.effects, None)
    assert effects["control_mean"][0] == pytest.approx(0.9892, abs=5e-4)
    assert effects["beyond_control"][MOVER] == pytest.approx(-4.2e-3, abs=1e-3)
    assert np.isnan(effects["control_mean"][N_GENES - 1])
    control = perturbation_stats(tables["shifts"], null=tables["shifts"], **QUICK)
    assert np.abs(control.effects["beyond_control"]).max() < 1e-15


def test_runs_that_agree_and_runs_that_do_not(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(0, 2e-3, N_GENES)
    names = {"one": truth, "like": truth, "unlike": rng.normal(0, 2e-3, N_GENES)}
    runs = {
        name: write_run(tmp_path / name, screen(mean + rng.normal(0, 1e-3, (40, N_GENES)), state="B"), states=("B",))
        for name, mean in names.items()
    }
    found = perturbation_stats(runs["one"], compare=[runs["like"], runs["unlike"]], **QUICK)
    agreement = found.agreement
    assert agreement is not None
    assert agreement["second"].tolist() == [str(runs["like"]), str(runs["unlike"]), str(runs["unlike"])]
    assert agreement["same_sign"][0] > 0.9
    assert agreement["same_sign_sure"][0] == 1
    assert agreement["spearman"][0] > 0.9
    assert 0.25 < agreement["same_sign"][1] < 0.75
    assert (found.effects["n_runs"] == 2).all()
    assert found.effects["n_same_sign"].mean() == pytest.approx(1.5, abs=0.25)


def test_pairs_beyond_their_genes() -> None:
    """One pair of three does more than the sum, of shifts and of cosines alike; cells that lack a gene do not count."""
    rng = np.random.default_rng(6)
    rows, with_states = [], []
    for cell in range(30):
        a, b, c = 1e-2 * (1 + 0.1 * rng.random(3))
        variants = {(1,): a, (2,): b, (3,): c, (1, 2): a + b + 5e-3 + 1e-4 * rng.normal(), (1, 3): a + c, (2, 3): b + c}
        if cell == 29:
            del variants[(2,)]
        rows += [(cell, edit, 1 - value) for edit, value in variants.items()]
        with_states += [(cell, edit, value, "B") for edit, value in variants.items()]
    for table in (table_of(rows), table_of(with_states)):
        pairs = perturbation_stats(table, min_cells=5, **QUICK).interactions
        assert pairs is not None
        assert pairs["first_symbol"].tolist()[0] == "token 1"
        assert pairs["second_symbol"].tolist()[0] == "token 2"
        assert pairs["interaction"][0] == pytest.approx(5e-3, rel=0.02)
        assert pairs["low"][0] > 0
        assert pairs["n_cells"].tolist()[0] == 29
        assert pairs["q_value"][0] < 1e-6
        assert pairs["interaction"][1:].abs().max() < 1e-6
        # The same from two runs, whose cells come in different orders.
        is_pair = np.array([len(tokens) == 2 for tokens in table["tokens"].to_pylist()])
        together, alone = table.filter(pa.array(is_pair)), table.filter(pa.array(~is_pair))
        alone = alone.take(pa.array(np.arange(alone.num_rows)[::-1]))
        apart = perturbation_stats(together, singles=alone, min_cells=5, **QUICK)
        assert apart.interactions is not None
        assert apart.interactions["interaction"].tolist() == pytest.approx(pairs["interaction"].tolist(), abs=1e-9)
    with pytest.raises(InputError, match="no pairs in the run"):
        perturbation_stats(table_of([(0, [1], 0.5)]), singles=table_of([(0, [1], 0.5)]), **QUICK)
    with pytest.raises(InputError, match="none of the pairs has both of its genes perturbed alone"):
        perturbation_stats(table_of([(0, [1, 2], 0.5)]), singles=table_of([(0, [1], 0.5)]), **QUICK)


def test_sets_have_their_names_and_noise_is_known(tmp_path: Path) -> None:
    table = table_of([(0, [5, 6], 0.5, "B"), (0, [7], 1e-7, "B"), (1, [5, 6], 0.6, "B")])
    named = table.append_column("set", pa.array(["ribosome", None, "ribosome"]))
    assert perturbation_stats(named, **QUICK).effects["symbol"].tolist() == ["ribosome", "token 7"]
    run = write_run(tmp_path / "run", table, states=("B",), report={"noise": {"largest": 1e-6}})
    found = perturbation_stats(run, **QUICK)
    assert found.about["noise"] == 1e-6
    assert found.effects["is_above_noise"].tolist() == [True, False]
    assert "is_above_noise" not in perturbation_stats(table, **QUICK).effects


def test_places_in_a_list_are_no_ranks(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    """Genes of a list are perturbed in its order, wherever they stand in a cell."""
    run = write_run(tmp_path / "run", tables["goal"], n_cells=80, options={"genes": [[10], [11]]})
    found = perturbation_stats(run, mode="aggregate_data", **QUICK)
    assert found.effects["rank"].isna().all()
    assert found.effects["p_value"].notna().sum() > 50  # by detection alone
    assert perturbation_stats(tables["goal"], mode="aggregate_data", **QUICK).effects["rank"].notna().all()


def test_pairs_with_an_anchor_are_compared_with_each_other() -> None:
    """The genes beside the anchor are like each other or not; in pairs that share no gene a rank means nothing."""
    rng = np.random.default_rng(7)
    values = 1 - (0.02 - 0.018 * np.arange(60) / 59) + rng.normal(0, 2e-4, (30, 60))
    values[:, 40] -= 6e-3
    table = screen(values)
    anchored = pa.array([[5, *tokens] for tokens in table["tokens"].to_pylist()], pa.list_(pa.int32()))
    pairs = table.set_column(table.schema.get_field_index("tokens"), "tokens", anchored)
    effects = perturbation_stats(pairs, mode="aggregate_data", **QUICK).effects
    assert effects.loc[effects["p_value"].idxmin(), "tokens"] == "5 50"


def test_a_folder_of_statistics(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "below" / "out"
    found = perturbation_stats(folders["shifts"], out, group="donor", **QUICK)
    assert sorted(path.name for path in out.iterdir()) == sorted(found.files)
    assert {"goal_state_shift.csv", "effects.csv", "about.md", "statistics.json", "volcano.png"} <= set(found.files)
    for name in found.files:
        if name.endswith(".png"):
            assert n_colors(pixels(out / name)) >= (1 if name == "volcano.png" else 2), name
    assert "groups (donor)" in (out / "about.md").read_text()
    said = json.loads((out / "statistics.json").read_text())
    assert said["genes"] == N_GENES
    assert said["plan"]["options"] == {}
    read = pd.read_csv(out / "effects.csv")
    assert np.allclose(read["mean"], found.effects["mean"])
    with pytest.raises(OutputError, match="holds statistics already; name another folder or pass overwrite"):
        perturbation_stats(folders["shifts"], out, **QUICK)
    perturbation_stats(folders["cosines"], out, mode="mixture_model", pictures=False, overwrite=True, **QUICK)
    assert sorted(path.name for path in out.iterdir()) == [
        "about.md", "effects.csv", "mixture_model.csv", "statistics.json",
    ]  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is no part of statistics"):
        perturbation_stats(folders["shifts"], tmp_path / "mine", overwrite=True, **QUICK)


@pytest.mark.parametrize(
    ("mode", "values", "wanted"),
    [
        (None, [(0, [5], 0.9)], "aggregate_data"),
        (None, [(0, [5], 0.9), (0, [6], 0.8)], "mixture_model"),
        (None, [(0, [5], 0.9, "A")], "goal_state_shift"),
        ("aggregate_data", [(0, [5], 0.9), (0, [6], 0.8)], "aggregate_data"),
    ],
)
def test_cells_and_genes_of_one(mode: str | None, values: Any, wanted: str) -> None:
    """One gene, one cell: numbers without intervals, and nothing that fails."""
    found = perturbation_stats(table_of(values), mode=mode, **QUICK)
    assert found.mode == wanted
    assert found.effects["low"].isna().all()
    assert found.effects["p_value"].isna().all()
    assert found.effects["n_cells"].tolist() == [1] * len(values)
    assert found.table is not None
    assert len(found.table) == len(values)


def test_values_of_genes_and_an_anchor() -> None:
    rows = [(0, [5], 0.9), (0, [5], 0.8), (0, [5], 0.7), (1, [5], 0.6), (1, [5], 0.5), (1, [6], 0.4)]
    table = table_of(rows, [None, 6, 7, None, 6, 5])
    genes = pa.array([["G5"], ["G5"], ["G5"], ["G5"], ["G5"], ["G6"]], pa.list_(pa.string()))
    table = table.append_column("genes", genes)
    found = perturbation_stats(table, **QUICK)
    assert found.mode == "aggregate_gene_shifts"
    assert found.table is not None
    assert found.table["Affected"].tolist() == ["cell_emb", 5, 6, 7]
    one = perturbation_stats(table, mode="aggregate_gene_shifts", genes="G5", **QUICK)
    assert one.table is not None
    assert one.table["Perturbed"].tolist() == [5, 5, 5]
    anchored = perturbation_stats(table, mode="mixture_model", anchor="G5", **QUICK)
    assert anchored.table is not None
    assert sorted(anchored.table["Gene"]) == [6, 7]
    with pytest.raises(VocabularyError, match="there is no gene 'G9' in it; symbols need a dictionary"):
        perturbation_stats(table, mode="mixture_model", anchor="G9", **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mode": "best"}, UnsupportedError, "there is no mode 'best'; there are goal_state_shift,"),
        ({"mode": "vs_null"}, UnsupportedError, "give its folder as null"),
        ({"mend": "all of it"}, UnsupportedError, "there is no 'all of it'"),
        ({"mend": "components"}, UnsupportedError, "components is about mixture_model; the table of goal_state_shift"),
        ({"mode": "mixture_model", "mend": ["pool"]}, UnsupportedError, "pool is about goal_state_shift"),
        ({"mode": "aggregate_data", "mend": "ties"}, UnsupportedError, "ties is about goal_state_shift and vs_null"),
        ({"seed": -1}, UnsupportedError, "seed must not be negative"),
        ({"seed": 2**64}, UnsupportedError, r"seed must be below 2\*\*64"),
        ({"correction": "holm"}, UnsupportedError, "is bh or by, not 'holm'"),
        ({"min_cells": 0}, UnsupportedError, "min_cells .* must be at least 1, not 0"),
        ({"draws": 0}, UnsupportedError, "draws .* must be at least 1"),
        ({"confidence": 1.0}, UnsupportedError, "confidence .* is a share above 0 and below 1"),
        ({"fdr": 0.0}, UnsupportedError, "fdr .* is a share"),
        ({"anchor": "x"}, UnsupportedError, "anchor .* ask for one of them"),
        ({"genes": ["x"]}, UnsupportedError, "genes .* ask for one of them"),
        ({"color": "x"}, UnsupportedError, "give these too"),
        ({"embeddings": "x.npy"}, UnsupportedError, "name a folder for it"),
        ({"goal": "T"}, InputError, "no shifts towards 'T'; it has NK, B, mono"),
        ({"goal": "B", "alternative": "B"}, UnsupportedError, "a state is named twice: B, B"),
        ({"mode": "mixture_model"}, InputError, "has shifts towards states"),
        ({"group": "age"}, InputError, "no column 'age' was carried; perturb again with obs"),
        ({"dose": 0.5}, InputError, "no doses in the run"),
    ],
)
def test_what_is_refused(
    tables: dict[str, pa.Table], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        perturbation_stats(tables["shifts"], **{**QUICK, **options})


def test_runs_that_are_not_there(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    with pytest.raises(OutputError):
        perturbation_stats(tmp_path / "absent", **QUICK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError):
        perturbation_stats(tmp_path / "empty", **QUICK)
    with pytest.raises(InputError, match="no states; leave goal"):
        perturbation_stats(tables["cosines"], goal="B", **QUICK)
    with pytest.raises(InputError, match="goal_state_shift is about shifts towards states"):
        perturbation_stats(tables["cosines"], mode="goal_state_shift", **QUICK)
    with pytest.raises(InputError, match="no values of genes"):
        perturbation_stats(tables["cosines"], mode="aggregate_gene_shifts", **QUICK)


@pytest.mark.parametrize("option", ["null", "compare"])
def test_a_run_is_not_held_against_itself(option: str, folders: dict[str, Path], capsys: Any) -> None:
    run = folders["cosines"]
    with pytest.raises(UnsupportedError, match=rf"{option} \(--{option}\) names .*, the run itself"):
        perturbation_stats(run, **{option: f"{run}/../{run.name}"}, **QUICK)
    assert cli.main(["perturb-stats", str(run), f"--{option}", str(run), "--out", str(run.parent / "new")]) == 2
    assert "the run itself" in capsys.readouterr().err


def test_nan_is_said(tables: dict[str, pa.Table]) -> None:
    table = pa.concat_tables([table_of([(90, [10], float("nan"))]), tables["goal"]])
    with pytest.warns(UserWarning, match="the table: 1 values are NaN"):
        found = perturbation_stats(table, mode="aggregate_data", **QUICK)
    assert found.about["missing"] == 1


def test_shifts_on_the_umap_of_the_same_cells(
    tmp_path: Path, tables: dict[str, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its coordinates are those of any plot; here they are the first two dimensions, which takes no half minute."""
    monkeypatch.setattr("geneformer_fast.plot.umap_points", lambda embeddings, seed: embeddings[:, :2])
    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 60, 80)
    run = write_run(tmp_path / "run", tables["shifts"], states=("NK", "B", "mono"), n_cells=80, lengths=lengths)
    flat = pa.array(rng.normal(size=80 * 8).astype(np.float32))
    columns = {"kind": pa.array(["NK", "B"] * 40), "length": pa.array(lengths)}
    pq.write_table(
        pa.table({**columns, "embedding": pa.FixedSizeListArray.from_arrays(flat, 8)}), tmp_path / "cells.parquet"
    )
    out = tmp_path / "out"
    perturbation_stats(run, out, embeddings=tmp_path / "cells.parquet", color="kind", **QUICK)
    assert n_colors(pixels(out / "shifts.png")) >= 3
    with pytest.raises(InputError, match="no column 'age' beside the embeddings; there are kind, length, embedding"):
        perturbation_stats(run, tmp_path / "o2", embeddings=tmp_path / "cells.parquet", color="age", **QUICK)
    other = pa.table({"length": pa.array(lengths[::-1]), "embedding": pa.FixedSizeListArray.from_arrays(flat, 8)})
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(InputError, match="which are not those of the token folder that was perturbed"):
        perturbation_stats(run, tmp_path / "o3", embeddings=tmp_path / "other.parquet", **QUICK)
    assert not (tmp_path / "o3").exists()


def test_official_tables_of_a_folder(shared_dir: Path, tmp_path: Path) -> None:
    """From the official values in a folder to the official file, by the command."""
    folder = shared_dir / "fixtures" / "isp"
    if not folder.is_dir():
        pytest.skip("the references of perturbation are not here")
    table = table_of_reference(folder, "v2_shift_delete_all_cls")
    states = ("CD56+ NK", "CD19+ B", "CD14+ Monocyte")
    run = write_run(tmp_path / "run", table, states=states)
    words = ["perturb-stats", run, "--out", tmp_path / "out", "--dictionary", tmp_path / "words", "--no-pictures"]
    gf.Vocabulary.from_folder(shared_dir / "data" / "dicts", "v2").save(tmp_path / "words")
    assert cli.main([*map(str, words), "--quiet"]) == 0
    ours = pd.read_csv(tmp_path / "out" / "goal_state_shift.csv")
    theirs = pd.read_csv(folder / "outputs" / "v2_stats_goal_all.csv")
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["all", "list"])
def test_official_pickles(shared_dir: Path, tmp_path: Path, kind: str) -> None:
    """As the official perturber leaves them, to its own statistics of them."""
    folder = shared_dir / "fixtures" / "isp"
    if not folder.is_dir():
        pytest.skip("the references of perturbation are not here")
    names = {"all": "v1_shift_delete_all_cell", "list": "v1_shift_delete_two_cell"}
    content: dict[Any, Any] = {}
    table = table_of_reference(folder, names[kind])
    cells = table["cell"].to_numpy()
    for cell in np.unique(cells) if kind == "all" else [None]:
        effects: dict[Any, Any] = {}
        for row in table.filter(pa.array(cells == cell)).to_pylist() if kind == "all" else table.to_pylist():
            key = row["tokens"][0] if len(row["tokens"]) == 1 else tuple(row["tokens"])
            effects.setdefault(row["state"], {}).setdefault((key, "cell_emb"), []).append(row["value"])
        name = f"dict_cell_embs_{cell}batch-1" if kind == "all" else "cell_embs_dict_[8208, 12030]"
        content[f"in_silico_delete_x_{name}_raw.pickle"] = effects
    for name, effects in content.items():
        (tmp_path / name).write_bytes(pickle.dumps(effects))
    found = perturbation_stats(tmp_path, **QUICK)
    theirs = pd.read_csv(folder / "outputs" / f"v1_stats_goal_{kind}.csv", index_col=0)
    assert found.table is not None
    ours = found.table[[name for name in theirs if name not in ("Gene_name", "Ensembl_ID")]]
    pd.testing.assert_frame_equal(ours, theirs[list(ours)], rtol=1e-10, atol=0, check_index_type=False)
    out = tmp_path.parent / f"{kind}_out"
    assert cli.main(["perturb-stats", str(tmp_path), "--out", str(out), "--no-pictures", "--quiet"]) == 0


def test_public_name() -> None:
    assert gf.perturbation_stats is perturbation_stats
