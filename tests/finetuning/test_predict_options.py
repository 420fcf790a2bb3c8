"""Every option of ``predict`` with every input and output: it has its effect, or it is refused in one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import toys
from places import Place, columns_of, in_turn, places
from typed_cells import SHORT_GENES, TYPES, gene_classes, typed_cells

import geneformer_fast as gf
from geneformer_fast.cli import build_parser, main
from geneformer_fast.errors import InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.extract import encoding
from geneformer_fast.files.locks import file_lock
from geneformer_fast.finetuning import predict as module

PLACES = places((".parquet", ".csv", ".h5ad"))
TABLES = (".parquet", ".csv")


class Workplace:
    """A folder with counts and their tokens, and calls of ``predict`` on them."""

    def __init__(self, folder: Path, out: Path, model: Path) -> None:
        self.folder, self.out, self.model = folder, out, model

    def data(self, place: Place) -> Any:
        if place.source == "anndata":
            return anndata.read_h5ad(self.folder / "new.h5ad")
        return self.folder / ("new.h5ad" if place.source == "file" else "new")

    def predict(self, place: Place, data: Any = None, **options: Any) -> Any:
        data = self.data(place) if data is None else data
        out = None if place.suffix is None else self.out / f"z{place.suffix}"
        options = {"progress": False, "overwrite": out is not None, **options}
        result = gf.predict(data, options.pop("model", self.model), out, **options)
        return data if result is None else result

    def columns(self, place: Place, **options: Any) -> dict[str, list[Any]]:
        """Columns of the result, whatever holds it."""
        result = self.predict(place, **options)
        if isinstance(result, Path):
            return columns_of(result)
        return (result.obs if isinstance(result, anndata.AnnData) else result).to_dict("list")

    def refuses(
        self, place: Place, match: str, error: type[Exception] = UnsupportedError, data: Any = None, **options: Any
    ) -> None:
        there = sorted(self.out.iterdir())
        with pytest.raises(error, match=match) as caught:
            self.predict(place, data, **options)
        assert "\n" not in str(caught.value)
        assert sorted(self.out.iterdir()) == there, "a refusal leaves nothing"


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    adata = typed_cells(20, seed=9)
    adata.layers["other"] = typed_cells(20, seed=4).X
    adata.layers["tpm"] = adata.X * 1.37
    adata.var["other_ids"] = toys.gene_ids()[::-1]
    adata.write_h5ad(folder / "new.h5ad")
    toys.vocabulary(name="another").save(folder / "another")
    gf.tokenize(folder / "new.h5ad", folder / "new", dictionary=toys.vocabulary(), obs=["donor"], progress=False)
    return folder


@pytest.fixture
def at(new: Path, tmp_path: Path, done: Any) -> Workplace:
    return Workplace(new, tmp_path, done.model)


def of_counts(at: Workplace, place: Place, **options: Any) -> None:
    """Other counts or genes are other probabilities; tokens are read already."""
    if place.source == "tokens":
        at.refuses(place, "is about reading counts", **options)
        return
    plain, changed = at.columns(place), at.columns(place, **options)
    assert plain["kind_probability"] != changed["kind_probability"]


def check_dictionary(at: Workplace, place: Place, dictionary: str) -> None:
    at.refuses(place, "made with another, but the model reads toy", VocabularyError, dictionary=at.folder / dictionary)


def check_allow_float(at: Workplace, place: Place, allow_float: bool) -> None:
    if place.source == "tokens":
        at.refuses(place, "is about reading counts", allow_float=allow_float)
        return
    at.refuses(place, "not whole numbers", InputError, counts_layer="tpm")
    assert len(at.columns(place, counts_layer="tpm", allow_float=allow_float)["kind_predicted"]) == 20


def check_allowance(at: Workplace, place: Place, **option: bool) -> None:
    """What is refused without the option passes with it."""
    if place.source == "tokens":
        at.refuses(place, "is about reading counts", **option)
        return
    data = anndata.read_h5ad(at.folder / "new.h5ad")
    if "allow_few_genes" in option:
        data.var_names = [*toys.gene_ids()[:9], *(f"ENSG{10_000_000_000 + i:011d}" for i in range(toys.N_GENES - 9))]
    else:
        data.obs_names = ["same"] * data.n_obs
    source: Any = data
    if place.source == "file":
        source = at.out.parent / f"{at.out.name}.h5ad"
        data.write_h5ad(source)
    at.refuses(place, "gene|more than once", InputError, data=source)
    assert at.predict(place, source, **option) is not None


def check_n_counts(at: Workplace, place: Place, n_counts: str) -> None:
    if place.source == "tokens":
        at.refuses(place, "is about reading counts", n_counts=n_counts)
    else:
        at.refuses(place, "no column 'sex' for the total counts", InputError, n_counts=n_counts)


def check_obs(at: Workplace, place: Place, obs: dict[str, str]) -> None:
    if place.is_in_place or place.suffix == ".h5ad":
        at.refuses(place, r"obs \(--obs\) has no effect on an", obs=obs)
        return
    columns = at.columns(place, obs=obs)
    assert columns["origin"] == [f"d{i % 6}" for i in range(20)]
    assert columns["obs_names"] == [f"cell{i}" for i in range(20)]
    at.refuses(place, "no column 'sex'", InputError, obs=["sex"])
    for taken in ("row", "kind_predicted", "kind: NK"):
        at.refuses(place, f"called '{taken}', and so is one of the result", InputError, obs={"donor": taken})


def check_where(at: Workplace, place: Place, where: dict[str, Any]) -> None:
    """Those cells and no others, with the predictions that they have among all; an AnnData keeps its rows."""
    whole, some = at.columns(place), at.columns(place, where=where)
    is_there = [i % 6 == 2 for i in range(20)]
    if place.is_in_place or place.suffix == ".h5ad":
        kept = [each for each, is_known in zip(some["kind_probability"], is_there, strict=True) if is_known]
        others = [each for each, is_known in zip(some["kind_probability"], is_there, strict=True) if not is_known]
        assert np.isnan(others).all()
    else:
        kept = some["kind_probability"]
        assert some["row"] == [2, 8, 14]
    np.testing.assert_allclose(kept, np.array(whole["kind_probability"])[is_there], atol=1e-6)
    at.refuses(place, "no cell has donor 'd9'; there are d0, d1, d2", InputError, where={"donor": ["d1", "d9"]})


def check_draw(at: Workplace, place: Place, **option: int) -> None:
    if "seed" in option:
        at.refuses(place, "is of the draw of cells: say how many", **option)
    columns = [at.columns(place, max_cells=5, seed=each)["kind_probability"] for each in (1, 2)]
    known = [{i: each for i, each in enumerate(column) if each == each} for column in columns]
    assert [len(each) for each in known] == [5, 5]
    assert known[0] != known[1]


def check_key(at: Workplace, place: Place, key_added: str) -> None:
    columns = at.columns(place, key_added=key_added)
    assert set(columns["guess_predicted"]) <= set(TYPES)
    assert "kind_predicted" not in columns


def check_copy(at: Workplace, place: Place, copy: bool) -> None:
    if not place.is_in_place:
        at.refuses(place, "copy=True returns a changed AnnData", copy=copy)
        return
    for is_backed in (False, True):
        data = anndata.read_h5ad(at.folder / "new.h5ad", backed="r" if is_backed else None)
        made = at.predict(place, data, copy=copy)
        assert "kind_predicted" in made.obs
        assert not made.isbacked
        assert "kind_predicted" not in data.obs


def check_loading(at: Workplace, place: Place, **options: Any) -> None:
    if "dtype" in options:
        plain, changed = at.columns(place, dtype="float32"), at.columns(place, **options)
        assert plain["kind_probability"] != changed["kind_probability"]
    else:
        at.refuses(place, "no device is called 'abacus'", **options)


def check_token_budget(at: Workplace, place: Place, token_budget: int) -> None:
    budgets = []
    whole = encoding.token_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "token_batches", lambda lengths, n: budgets.append(n) or whole(lengths, n))
        at.predict(place, token_budget=token_budget)
    assert budgets == [token_budget]


def check_memory_budget(at: Workplace, place: Place, memory_budget: str) -> None:
    at.refuses(place, "is too small: this process takes .* the smallest that works is", memory_budget="1MB")
    held = []
    with pytest.MonkeyPatch.context() as patch:
        whole = encoding.MemoryBudget.batch
        patch.setattr(encoding.MemoryBudget, "batch", lambda memory, n: held.append(memory.limit) or whole(memory, n))
        at.predict(place, memory_budget=memory_budget)
    assert held
    assert set(held) == {500 * 10**9}


def check_overwrite(at: Workplace, place: Place, overwrite: bool) -> None:
    if place.suffix is None:
        at.refuses(place, "needs an output file", overwrite=overwrite)
        return
    at.predict(place, overwrite=False)
    at.refuses(place, "exists already", OutputError, overwrite=False)
    at.predict(place, overwrite=overwrite)
    with (
        file_lock(at.out / f"z{place.suffix}"),
        pytest.raises(OutputError, match="is being written by another process"),
    ):
        at.predict(place)


def check_progress(at: Workplace, place: Place, progress: bool) -> None:
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geneformer_fast.progress._bar", lambda *bar: shown.append(bar))
        at.predict(place, progress=progress)
    assert bool(shown) is progress


#: Every option of ``predict``: a value, and what it does or why it is refused, place by place.
OPTIONS: dict[str, tuple[Any, Callable[..., None]]] = {
    "dictionary": ("another", check_dictionary),
    "counts_layer": ("other", of_counts),
    "gene_column": ("other_ids", of_counts),
    "allow_float": (True, check_allow_float),
    "allow_duplicate_cells": (True, check_allowance),
    "allow_few_genes": (True, check_allowance),
    "n_counts": ("sex", check_n_counts),
    "obs": ({"donor": "origin"}, check_obs),
    "where": ({"donor": "d2"}, check_where),
    "max_cells": (5, check_draw),
    "seed": (1, check_draw),
    "key_added": ("guess", check_key),
    "copy": (True, check_copy),
    "dtype": ("bfloat16", check_loading),
    "device": ("abacus", check_loading),
    "token_budget": (40, check_token_budget),
    "memory_budget": ("500GB", check_memory_budget),
    "overwrite": (True, check_overwrite),
    "progress": (True, check_progress),
}


@pytest.mark.parametrize(("option", "place"), in_turn(OPTIONS, PLACES, every=8))
def test_no_option_is_ignored(option: str, place: Place, at: Workplace) -> None:
    value, check = OPTIONS[option]
    check(at, place, **{option: value})


def test_no_option_and_no_output_is_missing_here() -> None:
    options = [name for name in inspect.signature(gf.predict).parameters if name not in ("data", "model", "out")]
    assert sorted(options) == sorted(OPTIONS), "a new option needs its line in OPTIONS"
    assert {place.suffix for place in PLACES} == {None, *module.SUFFIXES}, "a new output needs its place in PLACES"


def test_the_command_has_every_option_and_hands_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("geneformer_fast.cli.predict.check", None)  # nothing of it is there
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "predict", lambda data, model, out, **given: seen.update(given) or out)
    given = {
        "dictionary": "d", "counts_layer": "c", "gene_column": "g", "obs": "new=old", "key_added": "k",
        "dtype": "float16", "device": "cuda:3", "token_budget": "7", "memory_budget": "2GB", "n_counts": "n",
        "where": "donor=d1", "max_cells": "9", "seed": "3",
    }  # fmt: skip
    flags = ["allow_float", "allow_duplicate_cells", "allow_few_genes", "overwrite"]
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    arguments += [f"--{flag.replace('_', '-')}" for flag in flags]
    assert main(["predict", "in", "--model", "m", "--out", str(tmp_path / "o.csv"), *arguments]) == 0
    expected: dict[str, Any] = {**given, "obs": {"old": "new"}, "token_budget": 7}
    expected |= {"where": {"donor": ["d1"]}, "max_cells": 9, "seed": 3}
    assert seen == {**expected, **dict.fromkeys(flags, True), "progress": None}
    assert main(["predict", "in", "--model", "m", "--out", str(tmp_path / "o.csv"), "--quiet"]) == 0
    assert seen["progress"] is False
    assert set(seen) == set(OPTIONS) - {"copy"}
    parsed = build_parser(["predict"]).parse_args(["predict", "in", "--model", "m", "--out", "o"])
    others = {"command", "run", "check", "interrupted", "parser", "inputs", "model", "out", "no_verify"}
    others |= {"quiet", "verbose", "json", "progress"}  # of these only --quiet is about progress
    assert set(vars(parsed)) - others == set(seen) - {"progress"}


@pytest.fixture(scope="module")
def genes_model(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("genes") / "done"
    recipe = dataclasses.replace(SHORT_GENES, epochs=1)
    return gf.finetune_genes(home / "tokens", home / "model", gene_classes(), out, folds=0, recipe=recipe).model


def test_models_of_genes(genes_model: Path, at: Workplace) -> None:
    """A table of genes, wherever it goes; what is about cells is refused."""
    for place in PLACES:
        if place.suffix == ".h5ad":
            at.refuses(place, "rows of genes go into a table", model=genes_model)
            continue
        columns = at.columns(place, model=genes_model, key_added="loudness")
        assert list(columns)[:4] == ["gene", "token", "n_cells", "loudness_predicted"]
        at.refuses(place, "has no meaning where rows are genes", model=genes_model, obs=["donor"])
        if place.is_in_place:
            at.refuses(place, "copy=True needs classes of cells", model=genes_model, copy=True)


def test_a_table_of_text_is_read_back_as_it_was(at: Workplace) -> None:
    """Commas, quotes, line breaks and what a spreadsheet would take for a formula."""
    adata = anndata.read_h5ad(at.folder / "new.h5ad")
    odd = ['a,"b"', "x\ny", "=1+1", " lead", "é", "", "NA"] + ["plain"] * 13
    adata.obs["note"] = odd
    adata.obs_names = [f"{name},{i}" for i, name in enumerate(odd)]
    gf.predict(adata, at.model, at.out / "z.csv", obs=["note"], progress=False)
    frame = pd.read_csv(at.out / "z.csv", keep_default_na=False)
    assert frame["note"].tolist() == odd
    assert frame["obs_names"].tolist() == adata.obs_names.tolist()
    said = json.loads((at.out / "z.csv.json").read_text())
    assert said["cells"] == 20
    assert np.isfinite(frame["kind_probability"]).all()


def test_ctrl_c_says_what_is_there(at: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = at.out / "z.csv"
    arguments = ["predict", str(at.folder / "new"), "--model", str(at.model), "--out", str(out)]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gf.Encoder, "forward", interrupt)
    assert main(arguments) == 130
    said = capsys.readouterr().err
    assert f"interrupted: {out} is not written, and nothing half-written is left; run the same command again" in said
    assert not list(at.out.iterdir())


@pytest.mark.slow
def test_two_at_once_and_killed_at_any_moment(at: Workplace) -> None:
    """Two commands into one output, one of them killed: what is there is whole and of one of them."""
    root = Path(gf.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    rng, out = random.Random(0), at.out / "z.parquet"
    for prefix in "ab":
        adata = typed_cells(3000, seed=ord(prefix))
        adata.obs_names = [f"{prefix}{i}" for i in range(3000)]
        adata.write_h5ad(at.out.parent / f"{prefix}.h5ad")
        gf.tokenize(
            at.out.parent / f"{prefix}.h5ad", at.out.parent / f"tokens_{prefix}", dictionary=toys.vocabulary(),
            progress=False, overwrite=True,
        )  # fmt: skip

    def start(prefix: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "geneformer_fast", "predict", at.out.parent / f"tokens_{prefix}", "--model"]
        command += [at.model, "--out", out, "--overwrite", "--token-budget", 8]
        return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)

    def whose() -> set[str]:
        """Whose cells the table holds."""
        table = pd.read_parquet(out)
        assert len(table) == 3000
        assert np.isfinite(table["kind_probability"]).all()
        return {name[0] for name in table["obs_names"]}

    for _ in range(3):
        runs = [start(prefix) for prefix in "ab"]
        while not (at.out / ".z.parquet.lock").exists() and any(run.poll() is None for run in runs):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 4.0))
        runs[rng.randrange(2)].send_signal(signal.SIGKILL)
        for run in runs:
            _, said = run.communicate()
            assert run.returncode in (0, 2, -signal.SIGKILL)
            assert run.returncode != 2 or "is being written by another process" in said
        assert not out.exists() or len(whose()) == 1
    assert start("b").wait() == 0
    assert whose() == {"b"}
    assert not toys.leftovers(at.out)
