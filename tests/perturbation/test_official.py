"""The official perturber by its own arguments: what they become, and the files that it would have written."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import official_pickles
import pytest
import torch

import geneformer_fast as gf
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.perturbation.official import NAMES, arguments_of, perturb_official
from geneformer_fast.perturbation.official_files import open_official

_DICTIONARY = {"V1": "token_dictionary_gc30M.pkl", "V2": "token_dictionary_gc95M.pkl"}
_TOLERANCE = 2e-6
_IDLE = ("forward_batch_size", "clear_mem_ncells")


@pytest.fixture(scope="module")
def fixtures(shared_dir: Path) -> Path:
    return shared_dir / "fixtures" / "isp"


def _options(fixtures: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Version, and arguments of the official perturber, in a scenario."""
    told = json.loads((fixtures / "index.json").read_text())["scenarios"][name]
    options = {key: value for key, value in told["options"].items() if key not in _IDLE}
    if embeddings := options.pop("state_embs", None):
        stored = json.loads((fixtures / "outputs" / f"{embeddings}.json").read_text())
        options["state_embs_dict"] = {state: torch.tensor(values) for state, values in stored.items()}
    return told["version"], {**options, "model_version": told["version"]}


@pytest.mark.parametrize(
    "name",
    [
        *("v1_delete_all_cell_and_gene_layer0", "v1_delete_all_cell_max10", "v1_delete_all_cell_window"),
        *("v1_delete_two_cell_and_gene", "v1_shift_delete_two_cell_and_gene", "v1_delete_all_cell_nk"),
        *("v1_shift_delete_all_cell", "v1_anchor_delete_cell", "v1_shift_anchor_delete_cell"),
        *("v1_overexpress_three_short_cell_and_gene", "v1_overexpress_all_cell_and_gene_layer-1"),
        *("v2_anchor_delete_cls_and_gene", "v2_shift_noalt_delete_all_cls", "v2_overexpress_one_present_cls_and_gene"),
        *("v2_overexpress_three_short_cls", "v2_overexpress_three_cls_batch1"),
    ],
)
def test_the_same_arguments_give_the_same_pickles(name: str, fixtures: Path, shared_dir: Path, tmp_path: Path) -> None:
    version, options = _options(fixtures, name)
    small = version.lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = perturb_official(
            fixtures / f"model_{small}", fixtures / f"cells_{small}.dataset", tmp_path / "ours", "x",
            official=True, options={"dtype": "float32", "device": "cpu", "progress": False},
            token_dictionary_file=shared_dir / "data" / "dicts" / _DICTIONARY[version], **options,
        )  # fmt: skip
    official_pickles.write_pickles(fixtures, name, tmp_path / "theirs")
    ours, theirs = (official_pickles.official_values(tmp_path / place) for place in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        assert ours[key] == pytest.approx(values, abs=_TOLERANCE), key
    assert gf.open_perturbations(out).n_rows == open_official(tmp_path / "ours").n_rows


def test_what_is_called_how() -> None:
    roles = {"state_key": "disease", "start_state": "ill", "goal_state": "well", "alt_states": ["odd"]}
    asked = arguments_of(
        perturb_type="overexpress", genes_to_perturb=["ENSG1", "ENSG2"], emb_mode="cls_and_gene", emb_layer=0,
        filter_data={"cell_type": ["B"]}, cell_states_to_model=roles, max_ncells=5,
        cell_inds_to_perturb={"start": 1, "end": 3},
    )  # fmt: skip
    assert asked == {
        "kind": "overexpress", "doses": None, "genes": ["ENSG1", "ENSG2"], "together": True, "anchor": None,
        "mode": "cls_and_gene", "layer": "last", "where": {"cell_type": ["B"]},
        "states": {"column": "disease", "start": "ill", "goal": "well", "alternatives": ["odd"]},
        "state_embeddings": None, "max_cells": 5, "window": (1, 3),
    }  # fmt: skip
    assert arguments_of(perturb_type="activate", perturb_rank_shift=3)["doses"] == 0.75
    assert arguments_of(combos=1, anchor_gene="ENSG1")["anchor"] == "ENSG1"
    assert arguments_of()["layer"] == "penultimate"

    assert [*NAMES] == [*inspect.signature(arguments_of).parameters]
    taken = inspect.signature(gf.perturb).parameters
    assert all(name in taken for name in NAMES.values() if name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"perturb_type": "remove"}, "perturb_type must be one of 'delete', 'overexpress', 'inhibit', 'activate'"),
        ({"perturb_rank_shift": 1}, "perturb_rank_shift is of 'inhibit' and 'activate'"),
        ({"perturb_type": "inhibit"}, "perturb_rank_shift must be one of 1, 2, 3, not None"),
        ({"perturb_type": "inhibit", "perturb_rank_shift": 4}, "perturb_rank_shift must be one of 1, 2, 3, not 4"),
        ({"combos": 2}, "combos must be one of 0, 1, not 2"),
        ({"combos": True}, "combos must be one of 0, 1, not True"),
        ({"combos": 1}, "combos=1 needs an anchor_gene"),
        ({"anchor_gene": "ENSG1"}, "anchor_gene needs combos=1"),
        ({"emb_mode": "gene"}, "emb_mode must be one of"),
        ({"emb_layer": -2}, "emb_layer must be one of 0, -1, not -2"),
        ({"cell_emb_style": "max"}, "cell_emb_style must be one of 'mean_pool'"),
        ({"model_version": "V3"}, "model_version must be one of 'V1', 'V2'"),
        ({"genes_to_perturb": "ENSG1"}, "genes_to_perturb must be 'all' or a list of Ensembl ids"),
        ({"cell_states_to_model": {"state_key": "a", "start_state": "b"}}, "'goal_state' is missing"),
        ({"cell_states_to_model": {"disease": "a"}}, "'disease' is none of them"),
        ({"cell_inds_to_perturb": {"start": 1}}, "cell_inds_to_perturb must be 'all' or"),
        ({"cell_inds_to_perturb": "some"}, "cell_inds_to_perturb must be 'all' or"),
    ],
)
def test_values_that_the_perturber_does_not_know(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        arguments_of(**arguments)


def test_nothing_is_left_out_without_a_word() -> None:
    with pytest.warns(UserWarning, match=r"left out: forward_batch_size \(batches .*: token_budget\), nproc"):
        arguments_of(forward_batch_size=400, nproc=16)
    with pytest.warns(UserWarning, match="combos and anchor_gene are left out"):
        assert arguments_of(genes_to_perturb=["ENSG1"], combos=1, anchor_gene="ENSG2")["anchor"] is None
    with pytest.warns(UserWarning, match="'cls_and_gene' is 'cell' for V1"):
        assert arguments_of(model_version="V1", emb_mode="cls_and_gene")["mode"] == "cell_and_gene"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments_of()
    with pytest.raises(UnsupportedError, match="InSilicoPerturber has no argument 'perturb_kind'; it has perturb_type"):
        perturb_official("model", "tokens", "out", "x", perturb_kind="delete")
    with pytest.raises(UnsupportedError, match="options: layer is given by an argument of InSilicoPerturber too"):
        perturb_official("model", "tokens", "out", "x", options={"layer": "last"})


def test_genes_of_a_token_dictionary(shared_dir: Path) -> None:
    path = shared_dir / "data" / "dicts" / _DICTIONARY["V2"]
    asked = arguments_of(genes_to_perturb=["ENSG00000142541"], token_dictionary_file=path)
    vocabulary = gf.Vocabulary.from_folder(path.parent, "v2")
    assert asked["genes"] == [vocabulary.token_ids["ENSG00000142541"]]
    with pytest.raises(VocabularyError, match="gene 'ENSG0' has no token in token_dictionary_file; leave it out"):
        arguments_of(genes_to_perturb=["ENSG0"], token_dictionary_file=path)


@pytest.mark.parametrize("name", ["dry_run", "overwrite", "out", "batch_size"])
def test_options_are_those_of_perturb_that_give_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"options: '{name}' is none of them; there are kind, genes"):
        perturb_official("model", "cells", tmp_path, "x", options={name: True})


@pytest.mark.parametrize("prefix", ["", "../x", "a/b", "/x"])
def test_a_prefix_is_no_folder(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="output_prefix is what files are called"):
        perturb_official("model", "cells", tmp_path, prefix)
