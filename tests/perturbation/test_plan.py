"""What a run says of itself before it begins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.errors import InputError
from geneformer_fast.perturbation import plan as plans
from geneformer_fast.perturbation.compare import Comparison, Framing
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.engine import PerturbationRun
from geneformer_fast.perturbation.plan import Plan, estimated_seconds, in_words, plan_of
from geneformer_fast.perturbation.selection import ChosenCells, chosen_cells
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens

CELLS = [[30, 5], [5, 9, 7, 11], [8, 6, 11, 12, 5, 7], [30], *([[13, 9, 7, 11]] * 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    datasets = pytest.importorskip("datasets")
    path = tmp_path_factory.mktemp("plan") / "tokens"
    datasets.Dataset.from_dict({"input_ids": CELLS, "kind": ["a"] * 23 + ["b"]}).save_to_disk(str(path))
    return open_tokens(path)


def planned(folder: TokenFolder, edits: Edits, **options: object) -> Plan:
    return plan_of(folder, chosen_cells(folder, edits), edits, **options)


def test_counts_are_those_of_the_run(folder: TokenFolder) -> None:
    plan = planned(folder, Edits("delete"), n_states=3, has_gene_values=True)
    lengths = np.array(sorted(map(len, CELLS), reverse=True))
    assert plan.n_variants.tolist() == lengths.tolist()
    assert plan.n_tokens.tolist() == (lengths * (lengths - 1)).tolist()
    assert plan.n_rows.tolist() == (lengths * 3 + lengths * (lengths - 1)).tolist()
    assert planned(folder, Edits("delete")).n_rows.tolist() == lengths.tolist()
    some = plan.of_ranks(np.array([0, 22]))
    assert (some.n_variants.tolist(), some.chosen.cells.tolist()) == ([6, 2], [2, 0])


def test_the_plan_in_words(folder: TokenFolder) -> None:
    edits = Edits("overexpress")
    chosen = chosen_cells(folder, edits, where={"kind": "a"}, max_cells=23, window=(1, None))
    plan = replace(plan_of(folder, chosen, edits), seconds=10.0)
    n = int(plan.n_variants.sum())
    assert plan.text().splitlines() == [
        "22 cells of 24 (23 that where takes, then 22 in the window); the longest has 4 tokens",
        f"{n} perturbed cells of {4 * (n - 1) + 2} tokens",
        "1 of the cells have nothing to perturb: too few genes, or none of those asked for",
        f"{n} values, about {n * 7} bytes; about 10 seconds at {n / 10:.1f} perturbed cells/s",
    ]
    told = plan.to_dict()
    assert told["n_cells_without_variants"] == 1
    assert told["estimated_seconds"] == 10.0
    assert "estimated_seconds" not in planned(folder, edits).to_dict()


def test_nothing_to_perturb_is_refused(folder: TokenFolder) -> None:
    edits = Edits("overexpress")
    alone = ChosenCells(np.array([3]), np.array([1]), {"tokens": 23})
    with pytest.raises(InputError, match="none of 1 cells has a gene to overexpress"):
        plan_of(folder, alone, edits)


def test_time_grows_with_tokens_and_with_their_length(folder: TokenFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(folder, Edits("delete"))
    asked = []

    def seconds_per_token(run: object, rank: int) -> float:
        asked.append(rank)
        return 0.5 + 0.25 * plan.chosen.lengths[rank]

    monkeypatch.setattr(plans, "_seconds_per_token", seconds_per_token)
    truth = (plan.n_tokens * (0.5 + 0.25 * plan.chosen.lengths)).sum()
    assert estimated_seconds(None, plan) == pytest.approx(truth)  # type: ignore[arg-type]
    assert asked[0] == asked[1] == 0
    assert plan.chosen.lengths[asked[2]] < plan.chosen.lengths[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_is_timed(folder: TokenFolder, workers: int) -> None:
    edits = Edits("delete", max_len=8)
    plan = planned(folder, edits)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(1, 16, 2, 16, 40, 8)).eval()
    run = PerturbationRun(
        encoder, edits, Comparison("cell", Framing(0, 0), None), "last", plan.chosen.lengths,
        lambda ranks: folder.read(plan.chosen.cells[ranks]), token_budget=16, workers=workers,
    )  # fmt: skip
    assert 0 < estimated_seconds(run, plan) < 60


@pytest.mark.parametrize(
    ("amount", "said"),
    [(7, "7 seconds"), (90, "1.5 minutes"), (8000.0, "2.2 hours"), (3e6, "35 days"), (0.21, "0.2 seconds")],
)
def test_times_in_words(amount: float, said: str) -> None:
    assert in_words(amount, plans._TIMES) == said
