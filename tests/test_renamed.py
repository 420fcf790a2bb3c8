"""What has another name now is taken by its old one, with a word; runs of earlier versions stay what they were."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import toys

import geneformer_fast as gf
from geneformer_fast import cli
from geneformer_fast.arguments import checked, renamed, with_new_names
from geneformer_fast.cli.options import renamed as renamed_option
from geneformer_fast.cli.options import twice_given
from geneformer_fast.errors import ArgumentError, OutputError, UnsupportedError
from geneformer_fast.finetuning.search import Search, Space, search
from geneformer_fast.training.identity import check_same
from geneformer_fast.training.pretrain import recipe_of
from geneformer_fast.training.recipe import RENAMED, Recipe


@renamed(old="new")
@checked
def example(path: str, *, new: int | None = None) -> int | None:
    return new


def test_a_keyword_by_its_old_name() -> None:
    with pytest.warns(FutureWarning, match="^example: old is called new now$") as caught:
        assert example("x", old=3) == 3  # type: ignore[call-arg]
    assert caught[0].filename == __file__
    assert example("x", new=4) == 4
    with pytest.raises(ArgumentError, match="example: old is the old name of new, and both are given; leave old out"):
        example("x", old=3, new=3)  # type: ignore[call-arg]
    with pytest.warns(FutureWarning), pytest.raises(ArgumentError, match=r"^example: new must be int or None"):
        example("x", old="3")  # type: ignore[call-arg]
    assert list(inspect.signature(example).parameters) == ["path", "new"]


def test_fields_of_a_recipe_by_their_old_names() -> None:
    with pytest.warns(FutureWarning, match="^Recipe: warmup_ratio is called warmup_share now$") as caught:
        made = Recipe(warmup_ratio=0.2)  # type: ignore[call-arg]
    assert made == Recipe(warmup_share=0.2)
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert dataclasses.replace(made, is_showing_progress=False) == Recipe(warmup_share=0.2, progress=False)
    with pytest.warns(FutureWarning, match="floor_ratio is called floor_share"):
        assert made.floor_ratio == 0.0  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match="both are given"):
        Recipe(warmup_ratio=0.2, warmup_share=0.3)  # type: ignore[call-arg]
    with pytest.warns(FutureWarning):
        assert Space(warmup_ratio=(0.0, 0.1)) == Space(warmup_share=(0.0, 0.1))  # type: ignore[call-arg]


def test_recipes_in_files_and_in_keywords() -> None:
    stored = {"epochs": 2, "warmup_ratio": 0.3, "is_showing_progress": True}
    with pytest.warns(FutureWarning, match=r"^r\.json: warmup_ratio is called warmup_share now$"):
        assert Recipe.from_dict(stored, where="r.json") == Recipe(epochs=2, warmup_share=0.3, progress=True)
    with pytest.warns(FutureWarning):
        assert recipe_of(None, changes=stored) == Recipe(epochs=2, warmup_share=0.3, progress=True)
    with pytest.raises(ArgumentError, match="both are given"):
        recipe_of(None, changes={"warmup_ratio": 0.1, "warmup_share": 0.1})


def test_a_share_of_steps_takes_the_place_of_their_number() -> None:
    """The published recipes say steps, which would win."""
    assert recipe_of("geneformer-v1-10m").schedule_for(100_000).warmup_steps == 10_000
    assert recipe_of("geneformer-v1-10m", changes={"warmup_share": 0.5}).schedule_for(100).warmup_steps == 50


def as_written_before(values: Any) -> Any:
    """Names as earlier versions wrote them."""
    names = {new: old for old, new in RENAMED.items()}
    if not isinstance(values, dict):
        return values
    return {names.get(name, name): as_written_before(value) for name, value in values.items()}


def test_a_run_of_an_earlier_version_is_the_same_run() -> None:
    recipe = Recipe(warmup_share=0.2, floor_share=0.1, progress=True)
    asked = {"recipe": recipe.to_dict(), "search": {"space": dataclasses.asdict(Space()), "seed": 0}}
    there = json.loads(json.dumps(as_written_before(asked)))
    assert "warmup_ratio" in there["recipe"]
    assert "warmup_ratio" in there["search"]["space"]
    check_same(Path("run"), there, asked, what="run")
    other = dataclasses.replace(recipe, warmup_share=0.3, progress=None)
    with pytest.raises(OutputError, match=r"with warmup_share 0\.2, not 0\.3"):
        check_same(Path("run"), there, {"recipe": other.to_dict()}, what="run")


def test_a_search_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")

    def train(recipe: Recipe, layers: int | None, report: Any) -> float:
        return recipe.warmup_share

    recipe = Recipe(is_greater_better=True, progress=False)
    best, _, summary = search(Search(3), recipe, train, tmp_path / "s.db", "s")
    assert summary["best"]["warmup_share"] == best.warmup_share
    storage = f"sqlite:///{tmp_path / 's.db'}"
    study = optuna.load_study(study_name="s", storage=storage)
    assert all("warmup_ratio" in trial.params for trial in study.trials)  # as ever
    study.set_user_attr("asked", as_written_before(study.user_attrs["asked"]))
    _, _, summary = search(Search(4), recipe, train, tmp_path / "s.db", "s")
    assert summary["n_trials"] == 4
    with pytest.raises(OutputError, match="a search with another warmup_share"):
        search(Search(5, Space(warmup_share=(0.0, 0.5))), recipe, train, tmp_path / "s.db", "s")


def test_values_of_files_may_be_renamed_without_a_call() -> None:
    assert with_new_names("x", {"a": "b"}, {"c": 1}) == {"c": 1}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="p", allow_abbrev=False)
    renamed_option(made, "--lr", made.add_argument("--learning-rate", type=float, default=0.5))
    renamed_option(made, "--own", made.add_argument("--adapt", action="store_true"))
    return made


def test_an_option_by_its_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert vars(parser().parse_args([])) == {"learning_rate": 0.5, "adapt": False}
    with pytest.warns(FutureWarning, match="^--lr is called --learning-rate now$"):
        args = parser().parse_args(["--lr", "0.25"])
    assert (args.learning_rate, twice_given(args)) == (0.25, None)
    with pytest.warns(FutureWarning, match="--own is called --adapt now"):
        assert parser().parse_args(["--own"]).adapt is True
    for given in (["--lr", "0.25", "--learning-rate", "0.75"], ["--lr", "0.25", "--learning-rate", "0.5"]):
        with pytest.warns(FutureWarning):
            said = twice_given(parser().parse_args(given))
        assert said == "--lr is the old name of --learning-rate, and both are given; leave --lr out"
    with pytest.raises(SystemExit):
        parser().parse_args(["--learning-rate", "0.75", "--lr", "0.25"])
    assert "both are given; leave --lr out" in capsys.readouterr().err
    assert "--lr" not in parser().format_help()


#: A command with an option by its old name, and what becomes of it.
OLD = [
    ("tokenize x --out o --dictionary d --layer raw", "counts_layer", "raw"),
    ("medians x --out o --layer raw", "counts_layer", "raw"),
    ("medians x --out o --mapping d", "dictionary", "d"),
    ("medians x --out o --mapping-preset v1", "preset", "v1"),
    ("embed x --out o --model m --key k", "key_added", "k"),
    ("predict x --out o --model m --key k", "key_added", "k"),
    ("quantize m --out o --cells 3", "max_cells", 3),
    ("profile --batch-tokens 5", "token_budget", 5),
    ("pretrain t --out o --own-vocabulary", "adapt_vocabulary", True),
    ("finetune cells t --model m --out o --label l --lr 0.1", "learning_rate", 0.1),
    ("finetune cells t --model m --out o --label l --batch 7", "batch_cells", 7),
    ("finetune genes t --model m --out o --classes c --warmup 0.1", "warmup_share", 0.1),
    ("finetune genes t --model m --out o --classes c --freeze 2", "freeze_layers", 2),
]


@pytest.mark.parametrize(("line", "name", "value"), OLD)
def test_commands_take_their_old_options(line: str, name: str, value: Any) -> None:
    with pytest.warns(FutureWarning, match="is called --"):
        assert getattr(cli.parsed(line.split()), name) == value


def test_old_options_beside_new_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, pytest.warns(FutureWarning):
        cli.parsed(["tokenize", "x", "--out", "o", "--dictionary", "d", "--layer", "raw", "--counts-layer", "counts"])
    assert stop.value.code == 2
    assert "--layer is the old name of --counts-layer, and both are given" in capsys.readouterr().err


def test_functions_take_their_old_keywords(tmp_path: Path) -> None:
    cells, words = toys.cells(5), toys.vocabulary()
    cells.layers["counts"] = cells.X.copy()
    with pytest.warns(FutureWarning, match=r"tokenize: (layer is called counts_layer|vocabulary is called dictionary)"):
        old = gf.tokenize(cells, vocabulary=words, layer="counts")  # type: ignore[call-arg]
    new = gf.tokenize(cells, dictionary=words, counts_layer="counts")
    assert old.values.tolist() == new.values.tolist()  # type: ignore[union-attr]
    words.save(tmp_path)
    with pytest.warns(FutureWarning, match="medians: mapping is called dictionary now"):
        made = gf.medians(cells, mapping=words, progress=False)  # type: ignore[call-arg]
    assert made.fingerprint == gf.medians(cells, dictionary=tmp_path, progress=False).fingerprint
    with pytest.warns(FutureWarning, match="n_cells is called max_cells"), pytest.raises(UnsupportedError):
        gf.quantize(toys.encoder(words), n_cells=3)  # type: ignore[call-arg]
