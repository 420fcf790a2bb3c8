"""The study of real cells, small: it learns, beats guessing, and goes on where it was stopped."""

from __future__ import annotations

import json

import pytest

from bench import finetune_real
from bench.finetune_real import BASELINES, Size, Study


@pytest.mark.slow
def test_cell_lines_are_told_apart(shared_dir, tmp_path, monkeypatch):
    size = Size(pretraining_steps=400)
    study = Study(tmp_path / "work", size)
    rows = finetune_real.run(study, ["mix_celseq2"], ["plain"])
    table = rows["mix_celseq2"]
    assert set(table) == {*BASELINES, "plain"}
    # Five cell lines, the largest of them 35 % of the cells: guessing gives a macro-F1 of 0.1.
    assert table["plain"]["macro_f1"]["mean"] > 0.8
    assert all(table[baseline]["macro_f1"]["mean"] > 0.9 for baseline in BASELINES)
    for row in table.values():
        assert sum(row["n_by_class"].values()) == 909
        assert len(row["macro_f1"]["folds"]) == 5

    def nothing(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(finetune_real, "finetune_cells", nothing)
    monkeypatch.setattr(Study, "baselines", nothing)
    again = finetune_real.run(Study(tmp_path / "work", size), ["mix_celseq2"], ["plain"])
    assert again == json.loads(json.dumps(rows))
    assert finetune_real.content(study, rows)["sets"]["mix_celseq2"]["label"] == "cell_line"
    with pytest.raises(SystemExit, match="a study of another size"):
        Study(tmp_path / "work", Size(steps=7))
