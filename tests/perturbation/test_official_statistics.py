"""The official tables from the official values: the same numbers, columns and order."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu, ranksums
from statistics_rows import collected, scenarios, screen, table_of_reference

from geneformer_fast.perturbation.statistics.aggregate import aggregate_data, aggregate_gene_shifts
from geneformer_fast.perturbation.statistics.goal_state_shift import goal_state_shift, goal_state_shift_of_list
from geneformer_fast.perturbation.statistics.mixture import mixture_model
from geneformer_fast.perturbation.statistics.names import Names
from geneformer_fast.perturbation.statistics.versus_null import versus_null
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: Tables that the official package writes (the others fail there); of each mode and version.
TABLES = [
    f"{version}_stats_{name}"
    for version in ("v1", "v2")
    for name in ("goal_all", "goal_all_noalt", "goal_all_overexpress", "goal_list", "null", "mixture",
                 "mixture_overexpress", "mixture_anchor_genes", "aggregate_one", "gene_shifts_all",
                 "gene_shifts_one", "gene_shifts_two", "gene_shifts_anchor")
]  # fmt: skip


@pytest.fixture(scope="module")
def references(shared_dir: Path) -> Path:
    folder = shared_dir / "fixtures" / "isp"
    if not folder.is_dir():
        pytest.skip("the references of perturbation are not here")
    return folder


@pytest.fixture(scope="module")
def vocabularies(shared_dir: Path) -> dict[str, Vocabulary]:
    return {name: Vocabulary.from_folder(shared_dir / "data" / "dicts", name.lower()) for name in ("V1", "V2")}


def made(references: Path, name: str, vocabulary: Vocabulary, *, batch: int | None = None) -> pd.DataFrame:
    """What we make of the values of a scenario."""
    options = scenarios(references)[name]["options"]
    mode, genes, anchor = options["mode"], options["genes_perturbed"], options.get("anchor_gene")
    token = None if anchor is None else vocabulary.token_ids[anchor]
    table = table_of_reference(references, options["input"])
    of_anchor = {"anchor": token} if mode == "mixture_model" and token is not None else {}
    run = collected(table, batch=batch, **of_anchor)
    names = Names(run, vocabulary)
    if mode == "goal_state_shift":
        states = options["cell_states_to_model"]
        of_list = goal_state_shift_of_list(run, states["goal_state"], states["alt_states"])
        return of_list if genes != "all" else goal_state_shift(run, names, states["goal_state"], states["alt_states"])
    if mode == "vs_null":
        return versus_null(run, collected(table_of_reference(references, options["null"])), names)
    if mode == "aggregate_gene_shifts":
        return aggregate_gene_shifts(run, names, token)
    return {"mixture_model": mixture_model, "aggregate_data": aggregate_data}[mode](run, names)


def official(references: Path, name: str) -> pd.DataFrame:
    """The table, with numpy's numbers within texts as plain ones."""
    text = (references / "outputs" / f"{name}.csv").read_text()
    plain = re.sub(r"np\.int16\((\d+)\)", r"\1", text)
    return pd.read_csv(StringIO(plain), index_col=0)


def through_csv(table: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(StringIO(table.to_csv()), index_col=0)


@pytest.mark.parametrize("batch", [None, 997])
@pytest.mark.parametrize("name", TABLES)
def test_tables(references: Path, vocabularies: dict[str, Vocabulary], name: str, batch: int | None) -> None:
    vocabulary = vocabularies[name[:2].upper()]
    ours, theirs = through_csv(made(references, name, vocabulary, batch=batch)), official(references, name)
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    if "gene_shifts" in name:  # equal means come in the order in which they were found there
        keys = ["Perturbed", "Affected"]
        is_cell = (theirs["Affected"] == "cell_emb").to_numpy()
        assert ((ours["Affected"] == "cell_emb").to_numpy() == is_cell).all()
        assert np.allclose(*(each["Cosine_sim_mean"].astype(float) for each in (ours, theirs)), rtol=1e-12, atol=0)
        ours, theirs = (each.astype(dict.fromkeys(keys, str)).sort_values(keys) for each in (ours, theirs))
    else:
        assert ours.index.tolist() == theirs.index.tolist()
    for column in theirs:
        same(ours[column], theirs[column], column)


def same(ours: pd.Series, theirs: pd.Series, column: str) -> None:
    if pd.api.types.is_float_dtype(theirs) or not len(theirs):
        chances = "pval" in column or "FDR" in column
        tolerance: dict[str, Any] = {"rtol": 1e-10 if chances else 1e-12, "atol": 1e-15, "equal_nan": True}
        assert np.allclose(ours.to_numpy(float), theirs.to_numpy(float), **tolerance), column
    else:
        assert ours.tolist() == theirs.tolist(), column


def test_what_fails_there(references: Path, vocabularies: dict[str, Vocabulary]) -> None:
    """Several genes at once in ``aggregate_data``."""
    table = made(references, "v1_stats_aggregate_two", vocabularies["V1"])
    assert set(table["Gene"]) == {("RPL13A", "RPL13")}
    assert len(table) == 16


def test_components_are_mended(references: Path, vocabularies: dict[str, Vocabulary]) -> None:
    """There the fit gives the upper one first, and the border is the mean of the lower one, whatever lies between."""
    run = collected(table_of_reference(references, "v1_overexpress_all_cell_layer-1"))
    names = Names(run, vocabularies["V1"])
    theirs, ours = mixture_model(run, names), mixture_model(run, names, mend=("components",))
    assert ours["Impact_component"].sum() > theirs["Impact_component"].sum()
    has_impact = ours["Impact_component"] == 1
    # One border, below which all genes have impact.
    assert ours["Test_avg_shift"][has_impact].max() < ours["Test_avg_shift"][~has_impact].min()
    same = collected(table_of_reference(references, "v1_delete_all_cell_layer-1"))
    pd.testing.assert_frame_equal(mixture_model(same, names), mixture_model(same, names, mend=("components",)))


def test_the_pool_and_ties_are_mended() -> None:
    """By SciPy's own words for both."""
    rng = np.random.default_rng(0)
    run = collected(screen(rng.integers(0, 9, (12, 6)) / 8, state="B"))
    mended = goal_state_shift(run, Names(run), "B", mend=("pool", "ties")).sort_values("Gene")
    values = run.towards("B")
    for edit, found in enumerate(mended["Goal_end_vs_random_pval"]):
        x, others = (each.astype(float) for each in (values.of(edit), values.values[values.edits != edit]))
        assert found == pytest.approx(mannwhitneyu(x, others, use_continuity=False, method="asymptotic").pvalue)
    null = collected(screen(rng.integers(0, 9, (7, 6)) / 8))
    test = collected(screen(rng.integers(0, 9, (12, 6)) / 8))
    for mend, rest in (
        ((), ranksums),
        (("ties",), lambda x, y: mannwhitneyu(x, y, use_continuity=False, method="asymptotic")),
    ):
        table = versus_null(test, null, Names(test), mend=mend).sort_values("Gene")
        for edit, found in enumerate(table["Test_vs_null_pval"]):
            x, y = (each.only.of(edit).astype(float) for each in (test, null))
            assert found == pytest.approx(rest(x, y).pvalue)
