"""The benchmark of perturbed cells on tiny models: what the rival computes, what is compared, and the tables of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from bench import perturb_real, perturb_report, report
from bench.compare import readings
from bench.cpu import perturb_case
from bench.cpu.embed_candidates import Geometry
from bench.cpu.perturb_case import (
    CANDIDATES,
    PerturbPlace,
    compared,
    measured,
    ratios,
    side_by_side,
    tuned_batch_size,
    values_of,
)
from bench.cpu.perturb_rival import CELL, deletion_values

FAMILIES = {"V1": (25_426, 0), "V2": (20_275, 1)}


def cells_of(family: str, n_genes: int = 24) -> pa.Table:
    """Three cells of other genes in another order, which share the tokens below 100."""
    rng, is_framed = np.random.default_rng(3), family == "V2"
    cells = []
    for _ in range(3):
        genes = [*range(50, 50 + n_genes // 2)]
        genes += rng.choice(np.arange(1_000, 9_000), n_genes // 2, replace=False).tolist()
        genes = rng.permutation(genes).tolist()
        cells.append([2, *genes, 3] if is_framed else genes)
    return pa.table({"input_ids": cells, "length": [len(cell) for cell in cells]})


@pytest.fixture(scope="module", params=["V1", "V2"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PerturbPlace:
    family = request.param
    geometry = Geometry(f"tiny-{family.lower()}", family, FAMILIES[family][0], 16, 3, 2, 32, 64)
    found = PerturbPlace(tmp_path_factory.mktemp("place"), geometry)
    found.prepare_genes(cells_of(family), 6)
    return found


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_rival_computes_what_the_official_tool_does(shared_dir: Path, version: str, batch_size: int) -> None:
    from transformers import BertForMaskedLM

    isp = shared_dir / "fixtures" / "isp"
    if not isp.is_dir():
        pytest.skip("values of the official tool are not here")
    name = {"v1": "v1_delete_all_cell_layer-1", "v2": "v2_delete_all_cls_layer-1"}[version]
    official = pq.read_table(isp / "outputs" / f"{name}.parquet").to_pandas()
    table = pq.read_table(isp / f"cells_{version}.parquet").to_pandas()
    # As the official tool orders them.
    ordered = table.sort_values("length", ascending=False, kind="stable")["input_ids"].tolist()
    # The shortest two: all logits of all variants take their time.
    ranks = sorted(official["rank"].unique())[-2:]
    model = BertForMaskedLM.from_pretrained(isp / f"model_{version}").eval()
    cells = [np.array(ordered[rank]) for rank in ranks]
    found = deletion_values(model, cells, has_cls=version == "v2", batch_size=batch_size)
    for rank, values in zip(ranks, found, strict=True):
        of_cell = official[official["rank"] == rank]
        expected = {
            (int(gene), CELL): value for gene, value in zip(of_cell["perturbed"], of_cell["value"], strict=True)
        }
        assert values.keys() == expected.keys()
        apart = [abs(values[key][0] - value) for key, value in expected.items()]
        assert max(apart) < 2e-6


def test_genes_are_spread_over_ranks_and_every_cell_has_them(place: PerturbPlace) -> None:
    lists, genes = [tokens.tolist() for tokens in place.token_lists()], place.genes
    assert len(genes) == len(set(genes)) == 6
    assert all(set(genes) <= set(tokens) for tokens in lists)
    ranks = [lists[0].index(gene) for gene in genes]
    assert ranks == sorted(ranks)
    assert ranks[-1] - ranks[0] > 8
    assert (lists[0][0] == 2) is place.has_cls
    with pytest.raises(ValueError, match="3 cells share 12 genes, not 13"):
        place.prepare_genes(cells_of(place.geometry.family), 13)


def test_all_give_the_same_values_in_turns(place: PerturbPlace) -> None:
    names = ["float32", "plain"]
    found = side_by_side(place, names, rounds=2)
    rows = found["candidates"]
    assert [*rows] == names
    assert 0 < rows["float32"]["largest_difference"] < 2e-6
    assert rows["float32"]["rank_correlation"] > 0.99
    assert rows["plain"]["largest_difference"] == 0
    assert rows["plain"]["batch_size"] in found["batch_sizes_tried_cells_per_s"]["plain"]
    speed, seconds = rows["float32"]["perturbed_cells_per_s"]["p50"], rows["float32"]["seconds"]["p50"]
    assert speed == pytest.approx(3 * 6 / seconds, rel=0.5)
    at = ratios({"float32": {"seconds": {"p50": 2.0}}, "plain": {"seconds": {"p50": 5.0}}})
    assert at == {"float32 / plain": 2.5}


def test_other_values_are_no_rival(place: PerturbPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = values_of(CANDIDATES["plain"].load(place)(place.genes, 2))
    assert {*compared("plain", witness, witness)} == {"largest_difference", "rank_correlation"}
    (key, value), *_ = witness.items()
    for wrong in (value - 1e-3, float("nan")):
        with pytest.raises(RuntimeError, match="float32 and plain disagree"):
            compared("float32", {**witness, key: wrong}, witness)
    monkeypatch.setitem(perturb_case.MOST_APART, "float32", 2.0)
    backwards = dict(zip(sorted(witness, key=witness.__getitem__), sorted(witness.values())[::-1], strict=True))
    with pytest.raises(RuntimeError, match="rank effects differently"):
        compared("float32", backwards, witness)
    with pytest.raises(RuntimeError, match="the same genes of the same cells"):
        compared("float32", {k: v for k, v in witness.items() if k != key}, witness)


def test_the_fastest_batch_is_found_and_a_slow_one_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, now = {1: 10.0, 2: 20.0, 4: 30.0, 8: 29.0, 16: 20.0, 32: 90.0}, [0.0]

    def run(genes: list[int], size: int) -> list[Any]:
        now[0] += len(genes) / rates[size] * 1e3
        return [{(gene, CELL): [0.5] for gene in genes}]

    class Clock:
        def samples(self, timed: Any, n: int) -> list[float]:
            begin = now[0]
            timed()
            return [now[0] - begin]

    monkeypatch.setattr(perturb_case, "CLOCK", Clock())
    assert tuned_batch_size(run, [*range(40)]) == (4, {1: 10.0, 2: 20.0, 4: 30.0, 8: 29.0, 16: 20.0})
    assert tuned_batch_size(run, [*range(5)])[1] == {1: 10.0, 2: 20.0, 4: 30.0}


def test_a_result_is_tabulated_and_compared(
    place: PerturbPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturb_case, "peak_bytes", lambda *arguments: 123_456_789)
    monkeypatch.setattr(perturb_case, "HELD", {"GENEFORMER_FAST_HELD": "no"})
    found = measured(place, ["float32", "plain"], rounds=1, threads=1)
    assert (found["n_cells"], found["n_variants"], found["held_to"]) == (3, 18, "")
    provenance = {
        "machine": "Imaginary 9000", "n_cores": 4, "memory_gib": 8.0, "instructions": [], "commit": "abc",
        "date": "today", "is_dirty": False, "load_1min": 0.1, "packages": {"torch": "2"}, "python": "3",
    }  # fmt: skip
    case = {
        "case": "perturb_v1-10m_1-threads", "provenance": provenance, "geometry": "v1-10m", "threads": 1, "rounds": 1,
        "goals": {"float32 / plain": 2.5}, **found, "ratios": {"float32 / plain": 2.468},
    }  # fmt: skip
    folder = tmp_path / "imaginary"
    folder.mkdir()
    (folder / "perturb_v1-10m_1-threads.json").write_text(json.dumps(case))
    text = report.render(tmp_path)
    assert "6 genes in each of 3 real cells of" in text
    assert "Goals: float32 against plain 2.5x." in text
    line = next(line for line in text.splitlines() if line.startswith("| transformers as the official tool"))
    assert "2.47x in float32" in line
    assert line.endswith("| 123 MB |")
    assert any(line.startswith("| **this project, float32** |") for line in text.splitlines())
    measurements = readings(case)
    assert measurements["candidates.float32.seconds"].is_ours
    assert not measurements["candidates.plain.seconds"].is_ours


def test_a_trained_model_is_asked_in_fewer_bits(
    place: PerturbPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The procedure of the study, on a model that was not trained."""
    import datasets

    cells = pa.concat_tables([cells_of(place.geometry.family)] * 2)
    kinds = [perturb_real.START, *perturb_real.OTHERS] * 2
    tokens = tmp_path / "tokens"
    datasets.Dataset(cells.append_column(perturb_real.LABEL, pa.array(kinds))).save_to_disk(str(tokens))
    models = {name: perturb_real.MODELS[name] for name in ("float32", "bfloat16")}
    monkeypatch.setattr(perturb_real, "MODELS", models)
    rows = perturb_real.rows_of(place.model, tokens, tmp_path / "out", 2)
    assert [*rows] == [f"{question}, {name}" for question in ("similarity", "shift") for name in models]
    for name, row in rows.items():
        assert row["n_variants"] == 2 * 24
        assert row["effects"]["n"] == 2 * 24 * (3 if name.startswith("shift") else 1)
        assert ("rank_correlation" in row) is name.endswith("bfloat16")
    assert rows["shift, bfloat16"]["largest_difference"] < 0.02
    said = capsys.readouterr().out.splitlines()
    assert "rank correlation" in said[1]
    result = {"asked": {"cells": 2}, "training": {"note": "not trained"}, "rows": rows}
    assert "not trained" in perturb_report.real_title(result)
    table = perturb_report.real_rows([result])
    assert {len(line) for line in table} == {len(perturb_report.REAL_HEADER)}
    assert [bool(line[3]) for line in table] == [False, True] * 2


def test_agreement_of_effects_is_of_ranks_cell_by_cell() -> None:
    exact = pd.DataFrame(
        {"cell": [0, 0, 0, 1, 1, 1], "state": None, "tokens": [[7], [8], [9]] * 2, "value": [0.1, 0.2, 0.3] * 2}
    )
    found = perturb_real.compared(exact.assign(value=[1.1, 1.2, 1.3, 1.2, 1.1, 1.3]), exact)
    assert found["rank_correlation"]["least_of_a_cell"] == pytest.approx(0.5)
    assert found["rank_correlation"]["of_gene_means"] == pytest.approx(
        spearmanr([1.15, 1.15, 1.3], [0.1, 0.2, 0.3]).statistic
    )
    assert found["largest_difference"] == pytest.approx(1.1)
    with pytest.raises(RuntimeError, match="other genes"):
        perturb_real.compared(exact.assign(tokens=[[7], [8], [5]] * 2), exact)
    with pytest.raises(RuntimeError, match="other cells"):
        perturb_real.compared(exact[:5], exact)
