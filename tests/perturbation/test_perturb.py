"""perturb(): what comes out, whoever computes it and however it is divided."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from isp_scenarios import (
    HAS_ISP,
    ISP,
    SHARED,
    TOLERANCE,
    Values,
    asked,
    cells_folder,
    expected,
    largest_difference,
    model,
)

import geneformer_fast as gf
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError

pytestmark = pytest.mark.skipif(not HAS_ISP, reason="../shared/fixtures/isp is not there")
DICTS = SHARED / "data" / "dicts"
ROLES = {"column": "cell_type", "start": "CD56+ NK", "goal": "CD19+ B", "alternatives": ["CD14+ Monocyte"]}


def perturbed(version="V1", out=None, **options):
    return gf.perturb(cells_folder(version), model(version), out, dictionary=DICTS, progress=False, **options)


def values_of(frame: pd.DataFrame, name: str) -> Values:
    """A table under the official keys."""
    question = asked(name)
    rank = {int(cell): rank for rank, cell in enumerate(question.cells)}
    return {
        (
            rank[row.cell], row.state or "", tuple(t for t in row.tokens if t != question.anchor),
            -1 if pd.isna(row.affected) else int(row.affected),
        ): row.value
        for row in frame.itertuples()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1_delete_all_cell_max10", {"max_cells": 10}),
        ("v1_delete_all_cell_window", {"window": (2, 5)}),
        ("v1_delete_all_cell_b", {"where": {"cell_type": "CD19+ B"}}),
        ("v2_delete_one_cls_and_gene", {"genes": "ENSG00000142541", "mode": "cls_and_gene"}),
        ("v1_delete_two_cell_layer0", {"genes": ["RPL13A", "ENSG00000167526"], "together": True, "layer": "last"}),
        ("v2_anchor_delete_cls", {"anchor": "ENSG00000142541"}),
        ("v1_shift_delete_all_cell", {"states": ROLES}),
        ("v2_shift_delete_all_cls_and_gene", {"states": ROLES, "mode": "cls_and_gene"}),
        ("v2_overexpress_all_cls_and_gene_layer-1", {"kind": "overexpress", "mode": "cls_and_gene"}),
    ],
)
def test_values_of_the_public_function_are_the_official_ones(name, options):
    frame = perturbed(name[:2].upper(), **options)
    assert largest_difference(values_of(frame, name), expected(name)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1_overexpress_all_cell_and_gene_layer-1", {"kind": "overexpress", "mode": "cell_and_gene"}),
        ("v2_shift_anchor_delete_cls", {"anchor": "ENSG00000142541", "states": ROLES}),
    ],
)
def test_official_faults_are_kept_where_they_are_asked_for(name, options):
    frame = perturbed(name[:2].upper(), official=True, **options)
    assert largest_difference(values_of(frame, name), expected(name, official=True)) <= TOLERANCE


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


@pytest.mark.parametrize("mode", ["cls", "cls_and_gene"])
def test_files_are_the_same_whatever_the_number_of_workers(tmp_path, mode):
    for workers in (1, 2, 3):
        perturbed("V2", tmp_path / str(workers), mode=mode, workers=workers, token_budget=400)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")
    assert digests(tmp_path / "1")


def test_values_do_not_depend_on_the_budget_beyond_rounding():
    whole = perturbed("V1", kind="overexpress", token_budget=100_000)
    for budget in (1, 130, 999):
        other = perturbed("V1", kind="overexpress", token_budget=budget)
        assert (other.tokens.map(tuple) == whole.tokens.map(tuple)).all()
        np.testing.assert_allclose(other.value, whole.value, atol=5e-7, rtol=0)


def test_shards_hold_what_the_whole_run_holds(tmp_path):
    whole = gf.open_perturbations(perturbed("V2", tmp_path / "whole")).to_frame()
    parts = [perturbed("V2", tmp_path / f"part{part}", shard=f"{part}/3") for part in (1, 2, 3)]
    together = gf.open_perturbations(parts).to_frame()
    assert (together.cell == whole.cell).all()
    assert (together.tokens.map(tuple) == whole.tokens.map(tuple)).all()
    np.testing.assert_allclose(together.value, whole.value, atol=5e-7, rtol=0)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    from geneformer_fast.perturbation import running, store

    monkeypatch.setattr(store, "_ROWS_PER_FILE", 100)
    options = {"mode": "cell_and_gene", "genes": ["RPL13A", "ENSG00000167526"], "token_budget": 300}
    whole = perturbed("V1", tmp_path / "whole", **options)

    append, seen = store.PerturbationWriter.append, []

    def stopping(self, cell, rows):
        seen.append(cell)
        if len(seen) == 20:
            raise KeyboardInterrupt
        append(self, cell, rows)

    with monkeypatch.context() as patch:
        patch.setattr(running.PerturbationWriter, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            perturbed("V1", tmp_path / "stopped", **options)
    with pytest.raises(OutputError, match="unfinished"):
        perturbed("V1", tmp_path / "stopped", **options)
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(running.PerturbationWriter, "append", lambda *given: (seen.append(given[1]), append(*given)))
        perturbed("V1", tmp_path / "stopped", resume=True, **options)
    assert 0 < len(set(seen)) < 24  # some of the cells are not computed again
    assert digests(tmp_path / "stopped") == digests(whole)

    # What is reported is of the whole folder, and what this process did stands apart.
    of_whole, of_stopped = (gf.open_perturbations(path).manifest["report"] for path in (whole, tmp_path / "stopped"))
    assert of_stopped["n_variants"] == of_whole["n_variants"] == of_whole["n_variants_computed"]
    assert 0 < of_stopped["n_variants_computed"] < of_stopped["n_variants"]
    for name in ("n", "n_without_value", "largest"):
        assert of_stopped["effects"][name] == of_whole["effects"][name]
    assert of_whole["effects"]["n"] == len(gf.open_perturbations(whole).to_frame().query("affected.isna()"))


def test_what_decides_values_is_looked_at_before_going_on(tmp_path):
    out = perturbed("V1", tmp_path / "out", genes=["RPL13A"])
    with pytest.raises(OutputError, match="genes"):
        perturbed("V1", out, genes=["ENSG00000167526"], resume=True)
    with pytest.raises(OutputError, match="token_budget"):
        perturbed("V1", out, genes=["RPL13A"], token_budget=17, resume=True)
    assert perturbed("V1", out, genes=["RPL13A"], resume=True) == out


def test_columns_and_report(tmp_path):
    out = perturbed(
        "V2", tmp_path / "out", genes=["RPL13A"], states=ROLES, mode="cls_and_gene", obs={"cell_type": "kind"}
    )
    table = pq.read_table(out)
    assert table.schema.names == ["cell", "tokens", "genes", "affected", "state", "value", "kind"]
    assert table.schema.field("value").type == pa.float32()
    frame = table.to_pandas()
    assert set(frame.genes.map(tuple)) == {("ENSG00000142541",)}
    assert set(frame.kind) == {"CD56+ NK"}
    of_cells = frame[frame.affected.isna()]
    assert list(of_cells.state.unique()) == ["CD56+ NK", "CD19+ B", "CD14+ Monocyte"]
    assert frame[frame.affected.notna()].state.isna().all()
    report = json.loads((out / "_manifest.json").read_text())["report"]
    assert report["n_variants"] == len(of_cells) // 3 == report["effects"]["n"] // 3
    assert 0 <= report["noise"]["largest"] < 1e-6
    assert report["effects"]["largest"] > 10 * report["noise"]["largest"]


def token_folder(path: Path, cells: list[list[int]]) -> Path:
    """A folder as the official tokenizer writes it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": cells, "length": list(map(len, cells))}).save_to_disk(path)
    return path


def test_a_cell_of_one_gene_has_no_value_without_it(tmp_path):
    folder = token_folder(tmp_path / "tokens", [[9], [9, 12, 700], [44]])
    with pytest.warns(UserWarning, match="2 perturbed cells have no value"):
        frame = gf.perturb(folder, model("V1"), progress=False)
    assert frame.cell.tolist() == [1, 1, 1, 0, 2]
    assert frame.value.isna().tolist() == [False] * 3 + [True] * 2
    moved = gf.perturb(folder, model("V1"), kind="overexpress", progress=False)
    assert moved.cell.tolist() == [1, 1]  # alone it stands in front already


def test_without_its_only_gene_a_cell_is_cls_and_eos(tmp_path):
    folder = token_folder(tmp_path / "tokens", [[2, 9, 3], [2, 9, 12, 3]])
    frame = gf.perturb(folder, model("V2"), mode="cls_and_gene", progress=False)
    with torch.inference_mode():
        hidden = model("V2")(gf.Ragged.from_cells([[2, 3], [2, 9, 3]]), layer="penultimate").cells()
    cosine = torch.nn.functional.cosine_similarity(hidden[0][0], hidden[1][0], dim=0)
    alone = frame[frame.cell == 0]
    assert alone.affected.isna().all()
    np.testing.assert_allclose(alone.value, [float(cosine)], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"genes": ["RPL13A", "NOPE1"]}, VocabularyError, "NOPE1"),
        ({"genes": ["RPL13A", "ENSG00000142541"]}, UnsupportedError, "twice"),
        ({"genes": []}, UnsupportedError, "must name a gene"),
        ({"genes": ["ENSG00000284135"]}, InputError, "none of 24 cells has"),
        ({"genes": [0]}, VocabularyError, "special"),
        ({"genes": [99_999]}, VocabularyError, "none of the model's"),
        ({"mode": "cls"}, UnsupportedError, "'cell'"),
        ({"mode": "gene"}, UnsupportedError, "one of cell"),
        ({"kind": "knockout"}, UnsupportedError, "delete"),
        ({"layer": -1}, UnsupportedError, "from the end"),
        ({"states": {"column": "cell_type", "start": "NK"}}, InputError, "no cell has cell_type 'NK'"),
        ({"states": {"column": "cell_type"}}, UnsupportedError, "need names"),
        ({"states": ROLES | {"target": "x"}}, UnsupportedError, "target"),
        ({"states": ROLES | {"goal": "CD56+ NK"}}, UnsupportedError, "twice"),
        ({"states": ROLES, "state_embeddings": {"CD56+ NK": [1.0] * 16}}, InputError, "CD19"),
        ({"states": ROLES, "state_embeddings": {name: [1.0] for name in ("CD56+ NK", "CD19+ B", "CD14+ Monocyte")}},
         InputError, "16"),
        ({"state_embeddings": {}}, UnsupportedError, "states"),
        ({"shard": "1/2"}, UnsupportedError, "out"),
        ({"resume": True}, UnsupportedError, "out"),
        ({"compare": "float32"}, UnsupportedError, "out"),
        ({"workers": 0}, UnsupportedError, "at least 1"),
        ({"token_budget": 0}, UnsupportedError, "at least 1"),
        ({"window": (1, 2, 3)}, UnsupportedError, "window"),
        ({"obs": "donor"}, InputError, "donor"),
        ({"token_budget": 0}, UnsupportedError, "token_budget .* at least 1, not 0"),
        ({"workers": -1}, UnsupportedError, "workers .* at least 1, not -1"),
        ({"dtype": "bfloat16"}, UnsupportedError, "an Encoder has its own"),
        ({"device": "cpu"}, UnsupportedError, "an Encoder has its own"),
        ({"sets": {"a": []}}, InputError, "'a' has no genes"),
        ({"states": ROLES, "state_embeddings": dict.fromkeys(ROLES, "x")}, UnsupportedError, "vectors of numbers"),
        ({"states": ROLES, "state_embeddings": {"CD56+ NK": [0.0] * 16}}, InputError, "'CD56. NK' is zero"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(options, error, said):
    with pytest.raises(error, match=said) as raised:
        perturbed("V1", **options)
    assert "\n" not in str(raised.value)


def test_names_need_a_dictionary_and_tokens_do_not():
    with pytest.raises(UnsupportedError, match="dictionary"):
        gf.perturb(cells_folder("V1"), model("V1"), genes=["RPL13A"], progress=False)
    frame = gf.perturb(cells_folder("V1"), model("V1"), genes=8208, progress=False)
    assert frame.genes.isna().all()
    np.testing.assert_array_equal(frame.value, perturbed("V1", genes="RPL13A").value)


def test_embeddings_of_states_may_be_made_before(tmp_path):
    made = gf.state_embeddings(
        cells_folder("V1"), model("V1"), "cell_type", ["CD14+ Monocyte", "CD19+ B", "CD56+ NK"], progress=False
    )
    path = made.save(tmp_path / "states.safetensors")
    within = perturbed("V1", states=ROLES, genes="RPL13A")
    for given in (
        path,
        made,
        {name: torch.from_numpy(row) for name, row in zip(made.names, made.embeddings, strict=True)},
    ):
        np.testing.assert_array_equal(
            perturbed("V1", states=ROLES, state_embeddings=given, genes="RPL13A").value, within.value
        )
    with pytest.raises(InputError, match="blocks_computed"):
        perturbed("V1", states=ROLES, state_embeddings=path, genes="RPL13A", layer="last")


def test_a_dry_run_says_what_would_be(tmp_path):
    plan = perturbed("V2", tmp_path / "out", dry_run=True)
    assert plan.to_dict()["n_variants"] == 975
    assert plan.seconds > 0
    assert "975 perturbed cells" in plan.text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_effects_keep_their_order_in_bfloat16(version):
    from scipy.stats import spearmanr

    wide = perturbed(version).value
    narrow = gf.perturb(
        cells_folder(version), ISP / f"model_{version.lower()}", dtype="bfloat16", device="cpu", progress=False
    ).value
    assert spearmanr(wide, narrow).statistic > 0.98


def test_the_report_says_what_narrower_numbers_change(tmp_path):
    out = tmp_path / "out"
    gf.perturb(
        cells_folder("V2"), ISP / "model_v2", out, dtype="bfloat16", device="cpu", compare="float32", progress=False
    )
    compared = json.loads((out / "_manifest.json").read_text())["report"]["compared"]
    assert 0.98 < compared["rank_correlation"] < 1
    assert 0 < compared["largest"] < 0.05
    same = perturbed("V2", tmp_path / "same", compare=model("V2"), states=ROLES)
    compared = json.loads((same / "_manifest.json").read_text())["report"]["compared"]
    assert compared["rank_correlation"] == pytest.approx(1)
    assert compared["largest"] < 1e-6


def test_eight_bits_keep_the_order_of_effects(tmp_path):
    gf.quantize(ISP / "model_v2", tmp_path / "small", scheme="int8-weights")
    out = gf.perturb(
        cells_folder("V2"), tmp_path / "small", tmp_path / "out", max_cells=4, compare=ISP / "model_v2", progress=False
    )
    compared = json.loads((out / "_manifest.json").read_text())["report"]["compared"]
    assert 0.98 < compared["rank_correlation"] < 1


def test_genes_and_doses_may_be_numbers_of_numpy():
    token = perturbed("V1", window=(0, 1)).tokens[5][0]
    frame = perturbed("V1", kind="inhibit", genes=np.int64(token), doses=np.float32(0.5), window=(0, 1))
    assert frame.dose.tolist() == [0.5]
    by_name = perturbed("V1", sets={"some": [int(token)]}, window=(0, 1))
    assert by_name["set"].tolist() == ["some"]
    assert by_name.tokens.map(tuple).tolist() == [(token,)]


def test_states_are_the_same_however_they_are_written(tmp_path):
    some = {name: np.arange(1.0, 17) + place for place, name in enumerate(("0", "1", "2"))}
    asked = {"state_embeddings": some, "window": (0, 1), "genes": [8208], "kind": "overexpress"}
    states = {"column": "index", "start": np.int64(0), "goal": 1, "alternatives": ("2",)}
    perturbed("V1", tmp_path / "out", states=states, **asked)
    states = {"alternatives": [2], "goal": "1", "start": "0", "column": "index"}
    perturbed("V1", tmp_path / "out", states=states, resume=True, **asked)


def test_a_folder_that_is_taken_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no perturbations"):
        gf.perturb(cells_folder("V1"), tmp_path / "no model", tmp_path)


def test_cells_without_genes_are_in_no_state(tmp_path):
    ids = [[2, 5, 6, 7, 3], [2, 3], [2, 9, 8, 3], [2, 3]]
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "length": [5, 2, 4, 2], "kind": list("aabc")})
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(table).save_to_disk(tmp_path / "cells")
    with pytest.warns(UserWarning, match="1 cells with kind 'a' have no genes"):
        states = gf.state_embeddings(tmp_path / "cells", model("V2"), "kind", ["a", "b"], pool="mean")
    with torch.inference_mode():
        hidden = model("V2")(gf.Ragged.from_cells(ids[:1]), layer="penultimate").values[1:-1].mean(0)
    np.testing.assert_allclose(states.embeddings[0], hidden, atol=1e-6)
    with (
        pytest.raises(InputError, match="no cell with kind 'c' has a gene"),
        pytest.warns(UserWarning, match="no genes"),
    ):
        gf.state_embeddings(tmp_path / "cells", model("V2"), "kind", "c", pool="mean")
    assert np.isfinite(gf.state_embeddings(tmp_path / "cells", model("V2"), "kind", "c").embeddings).all()
