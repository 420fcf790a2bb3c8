"""Every option of ``embed`` with every input and output: it has its effect, or it is refused in one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import toys
from places import Place, columns_of, in_turn, places

from geneformer_fast import embed, load, save, tokenize
from geneformer_fast.cli import build_parser, main
from geneformer_fast.errors import GeneformerFastError, InputError, OutputError, UnsupportedError, VocabularyError
from geneformer_fast.extract import encoding, run
from geneformer_fast.extract.outputs import read_cells

KEY = "X_geneformer"
PLACES = places((".npy", ".arrow", ".parquet", ".csv", ".h5ad"))
TABLES = (".npy", ".arrow", ".parquet", ".csv")


@dataclass
class Workplace:
    """A folder with counts, their tokens and a model, and calls of ``embed`` on them."""

    folder: Path
    out: Path

    def data(self, place: Place) -> Any:
        if place.source == "anndata":
            return anndata.read_h5ad(self.folder / "cells.h5ad")
        return self.folder / ("cells.h5ad" if place.source == "file" else "tokens")

    def target(self, place: Place) -> Path | None:
        return None if place.suffix is None else self.out / f"z{place.suffix}"

    def embed(self, place: Place, data: Any = None, **options: Any) -> Any:
        """What ``embed`` returns, or the AnnData that it changed."""
        data = self.data(place) if data is None else data
        options = {"progress": False, "overwrite": place.suffix is not None, **options}
        result = embed(data, options.pop("model", self.folder / "model"), self.target(place), **options)
        return data if result is None else result

    def values(self, place: Place, key: str = KEY, **options: Any) -> np.ndarray:
        result = self.embed(place, **options)
        if isinstance(result, Path):
            values = read_cells(result, np.arange(11 if place.source == "tokens" else 12), key)
        else:
            values = result.obsm[key] if isinstance(result, anndata.AnnData) else result
        return values[~np.isnan(values).any(1)]

    def refuses(
        self, place: Place, match: str, error: type[Exception] = UnsupportedError, data: Any = None, **options: Any
    ) -> None:
        data = self.data(place) if data is None else data
        there = sorted(self.out.iterdir())
        with pytest.raises(error, match=match) as caught:
            self.embed(place, data, **options)
        assert "\n" not in str(caught.value)
        assert sorted(self.out.iterdir()) == there, "a refusal leaves nothing"
        if place.source == "anndata":
            assert KEY not in data.obsm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    words, adata = toys.vocabulary(), toys.cells(12, empty=(3,))
    adata.layers["other"] = toys.cells(12, seed=7, empty=(3,)).X
    adata.layers["tpm"] = adata.X * 1.37
    adata.var["other_ids"] = toys.gene_ids()[::-1]
    adata.write_h5ad(folder / "cells.h5ad")
    save(toys.encoder(words), folder / "model")
    words.save(folder / "model")
    toys.vocabulary(name="another").save(folder / "another")
    tokenize(folder / "cells.h5ad", folder / "tokens", dictionary=words, obs=["kind", "score"], progress=False)
    return folder


@pytest.fixture
def at(home: Path, tmp_path: Path) -> Workplace:
    return Workplace(home, tmp_path)


def changes(at: Workplace, place: Place, **options: Any) -> None:
    """The result is another one."""
    plain, changed = at.values(place, dtype="float32"), at.values(place, **{"dtype": "float32", **options})
    assert plain.shape == changed.shape
    assert np.abs(plain - changed).max() > 1e-3


def of_counts(match: str = "is about reading counts") -> Callable[..., None]:
    """Effective on counts, refused for tokens."""

    def check(at: Workplace, place: Place, **options: Any) -> None:
        if place.source == "tokens":
            at.refuses(place, match, **options)
        else:
            changes(at, place, **options)

    return check


def check_pool(at: Workplace, place: Place, **options: Any) -> None:
    changes(at, place, **options)
    if place.suffix == ".h5ad":
        at.refuses(place, "rows of genes go into a table", pool="gene")
        return
    result = at.embed(place, pool="gene")
    if place.suffix in TABLES:
        columns = columns_of(result)
        assert [name for name in columns if not name.startswith("embedding")] == ["token", "gene", "n_cells"]
    else:
        assert (result.varm[KEY] if place.is_in_place else result).shape[1] == 32
    for name, value in (("obs", ["kind"]), ("plot", "p.png"), ("heatmap", "h.png")):
        at.refuses(place, "rows.* genes", pool="gene", **{name: value})


def check_dictionary(at: Workplace, place: Place, dictionary: str) -> None:
    at.refuses(place, "made with another, but the model reads toy", VocabularyError, dictionary=at.folder / dictionary)


def check_allow_float(at: Workplace, place: Place, allow_float: bool) -> None:
    if place.source == "tokens":
        at.refuses(place, "is about reading counts", allow_float=allow_float)
        return
    at.refuses(place, "not whole numbers", InputError, counts_layer="tpm")
    assert len(at.values(place, counts_layer="tpm", allow_float=allow_float)) == 11


def check_allowance(match: str) -> Callable[..., None]:
    """What is refused without the option passes with it."""

    def check(at: Workplace, place: Place, **option: Any) -> None:
        if place.source == "tokens":
            at.refuses(place, "is about reading counts", **option)
            return
        data = anndata.read_h5ad(at.folder / "cells.h5ad")
        if "allow_few_genes" in option:
            ids = [*toys.gene_ids()[:4], *(f"ENSG{10_000_000_000 + i:011d}" for i in range(toys.N_GENES - 4))]
            data.var_names = data.var["ensembl_id"] = ids
        elif "n_counts" in option:
            data.obs["n_counts"] = 0.0
        else:
            data.obs_names = ["same"] * data.n_obs
        source: Any = data
        if place.source == "file":
            source = at.out.parent / f"{at.out.name}.h5ad"
            data.write_h5ad(source)
        at.refuses(place, match, InputError, data=source)
        assert at.embed(place, source, **option) is not None

    return check


def check_obs(at: Workplace, place: Place, obs: dict[str, str]) -> None:
    if place.suffix not in TABLES:
        at.refuses(place, r"obs \(--obs\) (has no effect on|needs an output file)", obs=obs)
        return
    columns = columns_of(at.embed(place, obs=obs))
    assert set(columns["label"]) <= {"a", "b", "c"}
    assert columns["obs_names"][:3] == ["cell0", "cell1", "cell2"]
    missing = {"score": "there"} if place.source == "tokens" else {}
    at.refuses(place, "no column 'sex'", InputError, obs={"sex": "sex", **missing})


def check_where(at: Workplace, place: Place, where: dict[str, str]) -> None:
    """Those cells and no others, with the numbers that they have among all; an AnnData keeps its rows."""
    kinds = anndata.read_h5ad(at.folder / "cells.h5ad").obs["kind"].tolist()
    is_there = np.array([kind == "a" for i, kind in enumerate(kinds) if i != 3])
    whole, some = at.values(place, dtype="float32"), at.embed(place, dtype="float32", where=where)
    if isinstance(some, Path) and place.suffix != ".h5ad":
        assert columns_of(some)["obs_names"] == [f"cell{i}" for i, kind in enumerate(kinds) if kind == "a" and i != 3]
        some = read_cells(some, np.arange(is_there.sum()), KEY)
    elif not isinstance(some, np.ndarray):
        some = (anndata.read_h5ad(some) if isinstance(some, Path) else some).obsm[KEY]
        assert len(some) == 12
        some = some[~np.isnan(some).any(1)]
    np.testing.assert_allclose(some, whole[is_there], atol=2e-6)
    at.refuses(place, "no column 'sex' to choose cells by", InputError, where={"sex": "f"})


def check_max_cells(at: Workplace, place: Place, max_cells: int) -> None:
    whole = at.values(place, dtype="float32")
    # This draw leaves out the cell without genes, which would have no embedding.
    some = at.values(Place(place.source, None), dtype="float32", max_cells=max_cells, seed=1)
    assert len(some) == max_cells
    assert all(np.isclose(row, whole, atol=2e-6).all(1).any() for row in some)
    at.refuses(place, "max_cells must be at least 1", max_cells=0)


def check_seed(at: Workplace, place: Place, seed: int) -> None:
    at.refuses(place, r"seed \(--seed\) is of the draw of cells", seed=seed)
    place = Place(place.source, None)
    drawn = [at.values(place, max_cells=4, seed=each, dtype="float32").round(4).tolist() for each in (0, seed, seed)]
    assert drawn[0] == at.values(place, max_cells=4, dtype="float32").round(4).tolist()
    assert drawn[0] != drawn[1] == drawn[2]


def check_as_frame(at: Workplace, place: Place, as_frame: bool) -> None:
    if place.suffix is not None:
        at.refuses(place, "as_frame=True returns a table, so it needs no output file", as_frame=as_frame)
        return
    data, whole = at.data(place), at.values(place, dtype="float32")
    frame = at.embed(place, data, as_frame=as_frame, dtype="float32", obs=["kind"])
    assert frame.index.tolist() == [f"cell{i}" for i in range(12) if i != 3]
    assert frame.columns[0] == "kind"
    np.testing.assert_allclose(frame.filter(like="embedding_").to_numpy(), whole, atol=2e-6)
    assert place.source != "anndata" or KEY not in data.obsm
    # The same as the file that it stands for.
    path = embed(data, at.folder / "model", at.out / "z.csv", dtype="float32", obs=["kind"], progress=False)
    pd.testing.assert_frame_equal(frame.reset_index(), pd.read_csv(path), atol=1e-6, check_dtype=False)
    genes = at.embed(place, as_frame=as_frame, pool="gene")
    assert set(genes.index) <= set(toys.gene_ids())
    assert list(genes.columns[:3]) == ["token", "n_cells", "embedding_0"]
    assert not genes.isna().any().any()


def check_key(at: Workplace, place: Place, key_added: str) -> None:
    if place.is_in_place or place.suffix == ".h5ad":
        assert len(at.values(place, key=key_added, key_added=key_added)) == 11
    else:
        at.refuses(place, r"key_added \(--key-added\) names a place in obsm", key_added=key_added)


def check_copy(at: Workplace, place: Place, copy: bool) -> None:
    if not place.is_in_place:
        at.refuses(place, "copy=True returns a changed AnnData", copy=copy)
        return
    data = at.data(place)
    made = at.embed(place, data, copy=copy)
    assert KEY in made.obsm
    assert KEY not in data.obsm


def check_loading(at: Workplace, place: Place, **options: Any) -> None:
    """About checkpoints; refused where the model is one already."""
    if "dtype" in options:
        changes(at, place, **options)
    else:
        at.refuses(place, "no device is called 'abacus'", **options)
    name = next(iter(options))
    at.refuses(place, rf"{name} \(--{name}\) is about loading", model=load(at.folder / "model"), **options)


def check_token_budget(at: Workplace, place: Place, token_budget: int) -> None:
    budgets = []
    whole = encoding.token_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "token_batches", lambda lengths, n: budgets.append(n) or whole(lengths, n))
        at.embed(place, token_budget=token_budget)
    assert budgets == [token_budget]


def check_memory_budget(at: Workplace, place: Place, memory_budget: str) -> None:
    at.refuses(place, "is too small: this process takes .* the smallest that works is", memory_budget="1MB")
    held = []
    with pytest.MonkeyPatch.context() as patch:
        whole = encoding.MemoryBudget.batch
        patch.setattr(encoding.MemoryBudget, "batch", lambda memory, n: held.append(memory.limit) or whole(memory, n))
        at.embed(place, memory_budget=memory_budget)
    assert held
    assert set(held) == {500 * 10**9}


def check_overwrite(at: Workplace, place: Place, overwrite: bool) -> None:
    if place.suffix is None:
        at.refuses(place, "needs an output file", overwrite=overwrite)
        return
    at.embed(place, overwrite=False)
    at.refuses(place, "exists already", OutputError, overwrite=False)
    at.embed(place, overwrite=overwrite)


def check_progress(at: Workplace, place: Place, progress: bool) -> None:
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geneformer_fast.progress._bar", lambda *bar: shown.append(bar))
        at.embed(place, progress=progress)
    assert bool(shown) is progress


def check_plot(at: Workplace, place: Place, plot: str) -> None:
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_umap", lambda values, labels, *a, **k: drawn.append((len(values), labels, *a, k)))
        at.embed(place, plot=at.out / plot, pool="mean", layer="last")
    said = {"label": None, "title": "model, layer last, pool mean"}
    assert drawn == [(11, None, at.out / plot, said)]
    (at.out / plot).write_text("mine")
    at.refuses(place, "exists already", OutputError, plot=at.out / plot, overwrite=False)
    assert (at.out / plot).read_text() == "mine"


def check_heatmap(at: Workplace, place: Place, heatmap: str) -> None:
    drawn = []
    path = at.out / heatmap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_heatmap", lambda values, labels, *a, **k: drawn.append((len(values), *labels, a, k)))
        at.embed(place, heatmap=path, color="kind", pool="mean", layer="last")
    kinds = anndata.read_h5ad(at.folder / "cells.h5ad").obs["kind"].tolist()
    title = "model, layer last, pool mean"
    assert drawn == [(11, *kinds[:3], *kinds[4:], (path,), {"label": "kind", "title": title})]
    at.refuses(place, r"shows cells by a column: name it with color \(--color\)", heatmap=path)
    at.refuses(place, "two pictures, and both are to be", heatmap=path, plot=path, color="kind")
    path.write_text("mine")
    at.refuses(place, "exists already", OutputError, heatmap=path, color="kind", overwrite=False)
    assert path.read_text() == "mine"


def check_color(at: Workplace, place: Place, color: str) -> None:
    at.refuses(place, r"color \(--color\) colours a picture", color=color)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_umap", lambda values, labels, path, label, title: drawn.append((list(labels), label)))
        at.embed(place, plot=at.out / "p.png", color=color)
    kinds = anndata.read_h5ad(at.folder / "cells.h5ad").obs["kind"].tolist()
    assert drawn == [(kinds[:3] + kinds[4:], "kind")]
    if place.suffix in TABLES:
        # The column to colour by keeps the name that it is to have in the table.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                run, "plot_umap", lambda values, labels, path, label, title: drawn.append((list(labels), label))
            )
            result = at.embed(place, plot=at.out / "p.png", color=color, obs={"kind": "label"})
        assert drawn[1] == drawn[0]
        assert {"label"} == {"label", "kind"} & set(columns_of(result))


#: Every option of ``embed``: a value, and what it does or why it is refused, place by place.
OPTIONS: dict[str, tuple[Any, Callable[..., None]]] = {
    "pool": ("mean", check_pool),
    "layer": ("last", changes),
    "dictionary": ("another", check_dictionary),
    "counts_layer": ("other", of_counts()),
    "gene_column": ("other_ids", of_counts()),
    "allow_float": (True, check_allow_float),
    "allow_duplicate_cells": (True, check_allowance("appear more than once")),
    "allow_few_genes": (True, check_allowance("gene")),
    "n_counts": ("computed", check_allowance("Total counts must be positive")),
    "obs": ({"kind": "label"}, check_obs),
    "where": ({"kind": "a"}, check_where),
    "max_cells": (4, check_max_cells),
    "seed": (5, check_seed),
    "as_frame": (True, check_as_frame),
    "key_added": ("X_mine", check_key),
    "copy": (True, check_copy),
    "dtype": ("bfloat16", check_loading),
    "device": ("abacus", check_loading),
    "token_budget": (40, check_token_budget),
    "memory_budget": ("500GB", check_memory_budget),
    "overwrite": (True, check_overwrite),
    "progress": (True, check_progress),
    "plot": ("p.png", check_plot),
    "heatmap": ("h.png", check_heatmap),
    "color": ("kind", check_color),
}


@pytest.mark.parametrize(("option", "place"), in_turn(OPTIONS, PLACES, every=8))
def test_no_option_is_ignored(option: str, place: Place, at: Workplace) -> None:
    value, check = OPTIONS[option]
    check(at, place, **{option: value})


def test_no_option_and_no_output_is_missing_here() -> None:
    options = [name for name in inspect.signature(embed).parameters if name not in ("data", "model", "out")]
    assert sorted(options) == sorted(OPTIONS), "a new option needs its line in OPTIONS"
    assert {place.suffix for place in PLACES} == {None, *run.SUFFIXES}, "a new output needs its place in PLACES"


def test_the_command_has_every_option_and_hands_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("geneformer_fast.cli.embed.check", None)  # nothing of it is there
    seen: dict[str, Any] = {}
    monkeypatch.setattr("geneformer_fast.extract.embed", lambda data, model, out, **given: seen.update(given) or out)
    given = {
        "pool": "mean", "layer": "last", "dictionary": "d", "counts_layer": "c", "gene_column": "g", "obs": "new=old",
        "n_counts": "computed",
        "key_added": "k", "dtype": "float16", "device": "cuda:3", "token_budget": "7",
        "memory_budget": "2GB", "plot": "p.png", "heatmap": "h.png", "color": "kind",
        "where": "kind=a,b", "max_cells": "9", "seed": "3",
    }  # fmt: skip
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    flags = ["allow_float", "allow_duplicate_cells", "allow_few_genes", "overwrite"]
    arguments += [f"--{flag.replace('_', '-')}" for flag in flags]
    assert main(["embed", "in", "--model", "m", "--out", str(tmp_path / "o.npy"), *arguments]) == 0
    expected: dict[str, Any] = {**given, "obs": {"old": "new"}, "token_budget": 7}
    expected |= {"where": {"kind": ["a", "b"]}, "max_cells": 9, "seed": 3}
    assert seen == {**expected, **dict.fromkeys(flags, True), "progress": None}
    assert main(["embed", "in", "--model", "m", "--out", str(tmp_path / "o.npy"), "--quiet"]) == 0
    assert seen["progress"] is False
    # On the command line there is no AnnData to copy, and nobody takes a data frame.
    assert set(seen) == set(OPTIONS) - {"copy", "as_frame"}
    parsed = build_parser(["embed"]).parse_args(["embed", "in", "--model", "m", "--out", "o"])
    others = {"command", "run", "check", "interrupted", "parser", "inputs", "model", "out", "no_verify"}
    others |= {"quiet", "verbose", "json", "progress"}  # of these only --quiet is about progress
    assert set(vars(parsed)) - others == set(seen) - {"progress"}


def test_names_that_the_table_needs_itself(at: Workplace) -> None:
    for place in PLACES:
        if place.suffix in (".arrow", ".parquet"):
            at.refuses(
                place, r"called 'embedding'.*--obs another_name=embedding", InputError, obs={"kind": "embedding"}
            )
        if place.suffix == ".csv":
            at.refuses(place, "called 'embedding_31'", InputError, obs={"kind": "embedding_31"})


@pytest.mark.parametrize("obs", [{"kind": "length"}, {"kind": "obs_names"}, {"kind": "x", "score": "x"}])
def test_taken_names(obs: dict[str, str], at: Workplace) -> None:
    for place in PLACES:
        if place.suffix in TABLES:
            at.refuses(place, "taken", GeneformerFastError, obs=obs)


@pytest.mark.parametrize("is_copied", [True, False])
def test_an_anndata_backed_by_its_file(is_copied: bool, at: Workplace) -> None:
    expected = at.values(Place("anndata", None))
    backed = anndata.read_h5ad(at.folder / "cells.h5ad", backed="r")
    result = at.embed(Place("anndata", None), backed, copy=is_copied)
    found = result.obsm[KEY]
    np.testing.assert_allclose(found[~np.isnan(found).any(1)], expected, atol=2e-6)
    assert (KEY in backed.obsm) is not is_copied
    assert result.isbacked is not is_copied
    if is_copied:
        assert (result.X != anndata.read_h5ad(at.folder / "cells.h5ad").X).nnz == 0
    backed.file.close()
