"""A fine-tuning goes on with what it began with or not at all, alone in its folder; names are what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import sqlite3
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import toys
from typed_cells import SHORT, typed_cells

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import InputError, OutputError, UnsupportedError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.finetuning import engine
from geneformer_fast.finetuning.search import Search, Space, search

ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)


@pytest.fixture(scope="module")
def begun(home, tmp_path_factory):
    """A fine-tuning of two folds of which the first is finished."""
    out = tmp_path_factory.mktemp("begun") / "out"

    def stop(self, number, split, *, is_final):
        if number == 2:
            raise KeyboardInterrupt
        return fold(self, number, split, is_final=is_final)

    fold = engine.Engine._fold
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(engine.Engine, "_fold", stop)
        gf.finetune_cells(home / "tokens", home / "model", "kind", out, folds=2, recipe=ONE_EPOCH, is_final=False)
    return out


@pytest.fixture
def half(begun, tmp_path):
    """A copy of it."""
    return shutil.copytree(begun, tmp_path / "half")


def go_on(home, out, *, tokens=None, model=None, recipe=ONE_EPOCH, **options):
    options = {"folds": 2, "is_final": False, "resume": True, **options}
    return gf.finetune_cells(tokens or home / "tokens", model or home / "model", "kind", out, recipe=recipe, **options)


def test_another_pretrained_model_of_the_same_shape_is_refused(home, half, tmp_path):
    import torch

    torch.manual_seed(77)
    gf.save(gf.Encoder(gf.load(home / "model").config, head="mlm"), tmp_path / "other")
    with pytest.raises(OutputError, match="a fine-tuning of other weights to begin with"):
        go_on(home, half, model=tmp_path / "other")
    # The same weights in another folder are the same.
    shutil.copytree(home / "model", tmp_path / "same")
    assert go_on(home, half, model=tmp_path / "same").scores["n"] == 90


def test_other_tokens_of_equal_lengths_are_refused(home, half, tmp_path):
    cells = typed_cells()
    cells.X = cells.X[:, ::-1].tocsr()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    columns = [name for name in cells.obs if name != "obs_names"]
    gf.tokenize(tmp_path / "cells.h5ad", tmp_path / "tokens", dictionary=toys.vocabulary(), obs=columns, progress=False)
    ours, theirs = gf.open_tokens(home / "tokens"), gf.open_tokens(tmp_path / "tokens")
    assert np.array_equal(ours.lengths(), theirs.lengths())
    with pytest.raises(OutputError, match="a fine-tuning of other tokens, however alike they look"):
        go_on(home, half, tokens=tmp_path / "tokens")


def test_the_machine_may_change_and_nothing_else(home, half):
    with pytest.raises(OutputError, match=r"with learning_rate 0\.02, not 0\.5"):
        go_on(home, half, recipe=dataclasses.replace(ONE_EPOCH, learning_rate=0.5))
    with pytest.raises(OutputError, match=r"with eval share 0\.1, not 0\.2"):
        go_on(home, half, eval_share=0.2)
    other = dataclasses.replace(ONE_EPOCH, token_budget=512, progress=True, workers=0)
    assert go_on(home, half, recipe=other).scores["n"] == 90


def test_a_fine_tuning_of_an_earlier_version_goes_on_with_a_warning(home, half):
    path = half / "finetune.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("weights", "tokens_content", "splits")}))
    with pytest.warns(
        UserWarning, match="did not write down what its tokens and weights to begin with and splits held"
    ):
        go_on(home, half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(home, half)
    # Groups were divided otherwise, so that what is there is of other cells: that is said.
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "splits"} | {"data": "0" * 64}))
    with pytest.raises(
        OutputError, match=r"of an earlier version, with other labels or splits.*divided groups otherwise"
    ):
        go_on(home, half)


def test_a_finished_fold_is_what_was_written(home, half):
    place = half / "folds" / "fold-1"
    path, table = place / "scores.json", place / "predictions.parquet"
    text, content, whole = path.read_text(), json.loads(path.read_text()), table.read_bytes()
    for name in ("accuracy", "macro_f1"):  # one digit
        changed = text.replace(f'"{name}": 0.', f'"{name}": 0.1', 1)
        assert changed != text
        path.write_text(changed)
        with pytest.raises(OutputError, match=r"scores\.json is damaged.*remove its folder to make that fold again"):
            go_on(home, half)
    path.write_text(text)
    table.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(OutputError, match=r"predictions\.parquet is damaged.*remove its folder"):
        go_on(home, half)
    table.write_bytes(whole)
    # Folds of earlier versions say no checksums, but have to make sense.
    old = {key: value for key, value in content.items() if key not in ("sha256", "predictions_sha256")}
    for wrong in ({**old, "tasks": 5}, {**old, "tasks": {"kind": {}}}, {"tasks": {}}, {**old, "roc": [1]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(OutputError, match=r"scores\.json: .*remove its folder"):
            go_on(home, half)
    path.write_text(json.dumps(old))
    assert go_on(home, half).scores["n"] == 90
    assert "sha256" not in json.loads((half / "scores.json").read_text())["folds"][0]


def test_two_at_once_is_one_sentence(home, half, capsys):
    with folder_lock(half):
        with pytest.raises(OutputError, match="half is being written by another process"):
            go_on(home, half)
        words = ["finetune", "cells", str(home / "tokens"), "--model", str(home / "model"), "--label", "kind"]
        assert main([*words, "--out", str(half), "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert "being written by another process" in said
        assert said.count("\n") == 1
    assert (half / "folds" / "fold-1" / "scores.json").exists()


def test_leftovers_never_block(home, half, tmp_path):
    for name in (
        ".finetune.json.tmp",
        ".scores.json.abc.part/scores.json",
        "folds/fold-1/.predictions.parquet.partial",
    ):
        for place in (half, tmp_path / "new"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("{")
    assert go_on(home, half).scores["n"] == 90
    assert not list(half.rglob(".*"))
    shutil.rmtree(tmp_path / "new" / "folds")
    go_on(home, tmp_path / "new", resume=False)


@contextlib.contextmanager
def room_for(n_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [1, 300, 3000, 12_000, 60_000])
def test_a_full_disk_is_one_sentence_wherever_it_comes(home, tmp_path, n_bytes):
    """Small files fit at first, then checkpoints do not, then the tables, the pictures and the model."""
    options = dict(recipe=ONE_EPOCH, test_share=0.3)
    with room_for(n_bytes), pytest.raises(OutputError, match=r"\w+\.\w+ cannot be written") as caught:
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name.endswith((".part", ".partial", ".tmp"))]
    made = gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", resume=True, **options)
    assert gf.load(made.model)
    assert pq.read_table(made.predictions).num_rows == 27


def by_rate(recipe, freeze_layers, report):
    value = -abs(np.log10(recipe.learning_rate) + 4)
    report({"macro_f1": value})
    return value


@pytest.mark.parametrize(
    ("first", "second", "said", "is_old"),
    [
        (Space(), Space(learning_rate=(1e-6, 1e-5)), "learning_rate", True),
        (Space(), Space(weight_decay=(0.0, 0.1)), "weight_decay", False),
        pytest.param(Space(), Space(schedule=("linear",)), "schedule", True, marks=pytest.mark.slow),
        pytest.param(
            Space(freeze_layers=(0, 4)), Space(freeze_layers=(0, 1)), "freeze_layers", False, marks=pytest.mark.slow
        ),
        pytest.param(Space(freeze_layers=(0, 4)), Space(), "freeze_layers", False, marks=pytest.mark.slow),
        (Space(freeze_layers=(0, 4)), Space(), "freeze_layers", True),
    ],
)
def test_a_search_of_another_space_is_refused(tmp_path, first, second, said, is_old):
    pytest.importorskip("optuna")
    storage = tmp_path / "s.db"
    search(Search(3, first), SHORT, by_rate, storage, "s")
    if is_old:  # an earlier version wrote the trials down, and nothing of what it searched
        with contextlib.closing(sqlite3.connect(storage)) as database, database:
            database.execute("delete from study_user_attributes")
    with pytest.raises(OutputError, match=f"holds a search with another {said}"):
        search(Search(5, second), SHORT, by_rate, storage, "s")
    recipe, _, summary = search(Search(5, first), SHORT, by_rate, storage, "s")
    assert summary["n_trials"] == 5
    assert first.learning_rate[0] <= recipe.learning_rate <= first.learning_rate[1]


def test_a_search_for_something_else_is_refused(tmp_path):
    pytest.importorskip("optuna")
    search(Search(2), SHORT, by_rate, tmp_path / "s.db", "s")
    for changes in ({"monitor": "loss", "is_greater_better": False}, {"epochs": 3}):
        with pytest.raises(OutputError, match=f"holds a search with another ({'|'.join(changes)})"):
            search(Search(3), dataclasses.replace(SHORT, **changes), by_rate, tmp_path / "s.db", "s")
    search(Search(3), dataclasses.replace(SHORT, token_budget=99), by_rate, tmp_path / "s.db", "s")


def test_a_search_without_room_or_with_a_damaged_file_is_one_sentence(tmp_path):
    pytest.importorskip("optuna")
    search(Search(1), SHORT, by_rate, tmp_path / "s.db", "s")
    size = (tmp_path / "s.db").stat().st_size
    with room_for(size), pytest.raises(OutputError, match=r"s\.db cannot be written: the disk is full") as caught:
        search(Search(500), SHORT, by_rate, tmp_path / "s.db", "s")
    assert "\n" not in str(caught.value)
    assert search(Search(4), SHORT, by_rate, tmp_path / "s.db", "s")[2]["n_trials"] >= 4
    (tmp_path / "bad.db").write_bytes(b"no database" * 500)
    with pytest.raises(OutputError, match=r"bad\.db cannot be read .*remove it to search anew") as caught:
        search(Search(1), SHORT, by_rate, tmp_path / "bad.db", "s")
    assert "\n" not in str(caught.value)


def test_a_space_that_is_none_is_refused(home, tmp_path):
    for bad in (
        {"learning_rate": (0.0, 1.0)}, {"learning_rate": (1e-3, 1e-5)}, {"weight_decay": (0.0, float("inf"))},
        {"warmup_share": (0.0, 2.0)}, {"warmup_share": (float("nan"), 1.0)}, {"schedule": ()},
        {"schedule": ("steep",)}, {"freeze_layers": (2, 1)},
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=f"{next(iter(bad))}|schedules"):
            Space(**bad)
    with pytest.raises(UnsupportedError, match="cannot freeze 9 layers: the model has 2"):
        gf.finetune_cells(
            home / "tokens", home / "model", "kind", tmp_path / "out", recipe=ONE_EPOCH,
            search=Search(1, Space(freeze_layers=(0, 9))),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory):
    """Tokens whose labels are called as the columns of predictions are."""
    folder = tmp_path_factory.mktemp("odd")
    cells = typed_cells()
    for name in ("cell", "fold", "row", "kind_predicted", "gene"):
        cells.obs[name] = cells.obs["kind"].to_numpy()
    cells.obs["kind"] = np.where(cells.obs["kind"] == "T", "x: y", cells.obs["kind"])
    cells.obs["kind: x"] = np.where(cells.obs["is_lymphoid"], "y", "z")
    cells.obs["endless"] = np.where(np.arange(90) == 7, np.inf, np.arange(90) % 2)
    names = ["cell", "fold", "row", "gene", "kind", "kind_predicted", "kind: x", "endless"]
    cells.write_h5ad(folder / "cells.h5ad")
    gf.tokenize(folder / "cells.h5ad", folder / "tokens", dictionary=toys.vocabulary(), obs=names, progress=False)
    return folder / "tokens"


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("cell", "'cell' of the predictions would hold the truth of 'cell', but it says which row is which"),
        ("fold", "'fold' of the predictions would hold"),
        ("row", "'row' of the predictions would hold"),
        ("gene", "'gene' of the predictions would hold"),
        (
            ["kind", "kind_predicted"],
            "'kind_predicted' of the predictions would hold the truth of 'kind_predicted', but",
        ),
        (["kind", "kind: x"], "'kind: x: y' of the predictions would hold the probability of 'y' in 'kind: x', but it"),
    ],
)
def test_names_that_predictions_need_are_refused(oddly_named, home, tmp_path, label, said):
    with pytest.raises(InputError, match=said) as caught:
        gf.finetune_cells(oddly_named, home / "model", label, tmp_path / "out", recipe=ONE_EPOCH)
    assert "tokenize --obs NEW=OLD" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_infinite_label_is_named(oddly_named, home, tmp_path):
    with pytest.raises(InputError, match="the label 'endless' of cell 7 is infinite, which is no class"):
        gf.finetune_cells(oddly_named, home / "model", "endless", tmp_path / "out", recipe=ONE_EPOCH)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["test_share", "eval_share"])
def test_shares_that_are_none_are_refused(home, tmp_path, name, share):
    with pytest.raises(UnsupportedError, match=f"{name} must be from 0"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", recipe=ONE_EPOCH, **{name: share})


def test_a_test_share_beside_folds_is_not_ignored(home, tmp_path, capsys):
    with pytest.raises(UnsupportedError, match=r"with 2 folds everything is tested once.*--test-share"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", folds=2, test_share=0.1)
    words = ["finetune", "cells", str(home / "tokens"), "--model", str(home / "model"), "--label", "kind"]
    assert main([*words, "--out", str(tmp_path / "out"), "--folds", "2", "--test-share", "0.1"]) == 2
    assert "everything is tested once" in capsys.readouterr().err


def test_no_test_share_is_said_where_scores_would_be(home, tmp_path):
    made = gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", test_share=0, recipe=ONE_EPOCH)
    assert str(made).startswith("no cells were held out for testing (a test_share of 0), so there are no scores")
    assert made.scores["tasks"] == {}
    assert gf.load(made.model)


def test_splits_are_told_before_the_first_step_and_stored(home, tmp_path, monkeypatch):
    told: list[str] = []
    original = engine.fit

    def fit(*args, **options):
        assert len(told) == 4, "training began before the splits were told"
        return original(*args, **options)

    monkeypatch.setattr(engine, "fit", fit)
    made = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", group="donor", folds=3, recipe=ONE_EPOCH,
        tell=told.append,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in told] == ["fold-1", "fold-2", "fold-3", "final"]
    assert "test 30 cells (33.3%) of 2 groups" in told[0]
    stored = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert list(stored) == ["fold-1", "fold-2", "fold-3", "final"]
    for number, fold in enumerate(made.scores["folds"], 1):
        assert fold["split"] == stored[f"fold-{number}"]
        assert {part: fold["split"][part]["cells"] for part in fold["sizes"]} == fold["sizes"]
        assert fold["split"]["test"]["groups"] == 2
    assert sum(fold["split"]["test"]["classes"]["T"] for fold in made.scores["folds"]) == 45


def test_a_split_that_a_later_fold_is_refused_for_is_refused_first(home, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *args, **options: pytest.fail("training began"))
    with pytest.raises(UnsupportedError, match="patience needs evaluation cells to choose by"):
        gf.finetune_cells(
            home / "tokens", home / "model", "kind", tmp_path / "out", folds=2, eval_share=0,
            recipe=dataclasses.replace(ONE_EPOCH, patience=2),
        )  # fmt: skip


def test_one_donor_without_folds_says_what_to_do(home, tmp_path):
    with pytest.raises(InputError, match=r"need 3 groups, but there is one \(x\).*take no group column$"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", group="same", recipe=ONE_EPOCH)


def test_pictures_of_tasks_that_differ_in_signs_only_have_names_of_their_own(tmp_path):
    assert [engine._suffix(task, ["a b", "a_b", "c"]) for task in ("a b", "a_b", "c")] == ["_a_b_1", "_a_b_2", "_c"]


def test_ctrl_c_says_which_folds_are_finished_and_how_to_go_on(home, tmp_path, capsys, monkeypatch):
    fold = engine.Engine._fold

    def stop(self, number, split, *, is_final):
        if number == 2:
            raise KeyboardInterrupt
        return fold(self, number, split, is_final=is_final)

    words = [
        "finetune",
        "cells",
        str(home / "tokens"),
        "--model",
        str(home / "model"),
        "--label",
        "kind",
        "--folds",
        "2",
    ]
    words += ["--epochs", "1", "--no-final", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_fold", stop)
        assert main(words) == 130
    said = capsys.readouterr()
    assert "interrupted: 1 fold is finished, in" in said.err
    assert "run the same command with --resume (resume=True) to go on" in said.err
    assert "fold-1: training" in said.err
    assert main([*words, "--quiet", "--resume"]) == 0
    assert os.listdir(tmp_path / "out" / "folds")
