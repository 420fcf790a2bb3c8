"""Every value of every scenario that the official package, or where that is wrong an independent one, computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from isp_scenarios import (
    HAS_ISP,
    ISP,
    TOLERANCE,
    asked,
    by_place,
    expected,
    index,
    largest_difference,
    model,
    raw_scenarios,
)

from geneformer_fast.perturbation.states import state_embeddings

pytestmark = pytest.mark.skipif(not HAS_ISP, reason="../shared/fixtures/isp is not there")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", raw_scenarios())
def test_values_are_the_official_ones_or_right_where_these_are_wrong(name):
    question = asked(name)
    found = question.values(question.run(token_budget=1000).values())
    assert largest_difference(found, expected(name)) <= TOLERANCE


#: Similarities of V1 cells in which the official tool counts what the model makes of padding.
WITH_PADDING = {
    "v1_overexpress_one_absent_cell": 1,
    "v1_overexpress_one_absent_cell_and_gene": 1,
    "v1_overexpress_two_absent_cell_and_gene": 3,
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in raw_scenarios()
        if (ISP / "corrected" / f"{name}.parquet").exists()
        and index()[name].get("error") is None
        and index()[name]["options"].get("genes_to_perturb", "all") != "all"
    ],
)
def test_lists_near_the_limit_are_cut_as_officially_where_that_is_asked_for(name):
    question = asked(name)
    found = by_place(question.values(question.run(token_budget=1000, is_official=True).values()))
    wanted = expected(name, official=True)
    assert found.keys() == wanted.keys()
    others = [key for key in wanted if abs(found[key] - wanted[key]) > TOLERANCE]
    assert len(others) == WITH_PADDING.get(name, 0)
    assert all(affected == -1 for *_, affected in others)


def test_all_scenarios_are_asked():
    """Those without values fail officially and have none that is right: a gene that no cell has, or without token."""
    without = {name for name, scenario in index().items() if scenario["kind"] == "isp"} - set(raw_scenarios())
    assert {name.split("_", 1)[1].rsplit("_", 1)[0] for name in without} == {
        "delete_with_absent", "delete_unknown", "overexpress_unknown",
    }  # fmt: skip
    assert len(raw_scenarios()) == 100


@pytest.mark.parametrize("name", [name for name, each in index().items() if each["kind"] == "states"])
def test_embeddings_of_states_are_the_official_ones(name):
    import json

    scenario = index()[name]
    options, version = scenario["options"], scenario["version"]
    roles = options["cell_states_to_model"]
    states = [roles["start_state"], roles["goal_state"], *roles["alt_states"]]
    made = state_embeddings(
        ISP / f"cells_{version.lower()}.dataset", model(version), roles["state_key"], states,
        layer="last" if options["emb_layer"] == 0 else "penultimate",
        statistic=options["summary_stat"].removeprefix("exact_"), max_cells=options["max_ncells"], progress=False,
    )  # fmt: skip
    wanted = json.loads((ISP / "outputs" / f"{name}.json").read_text())
    assert list(made.names) == list(wanted)
    np.testing.assert_allclose(made.embeddings, np.array([wanted[state] for state in made.names]), atol=5e-6, rtol=0)
