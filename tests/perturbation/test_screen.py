"""First-order estimates: the forward pass they differentiate, their limit of small changes, and what they choose."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

import geneformer_fast as gf
from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.compare import Comparison, Framing
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.engine import PerturbationRun
from geneformer_fast.perturbation.screen import GradientScreen, hidden_states
from geneformer_fast.perturbation.screened import screened_genes, screened_pairs
from geneformer_fast.ragged import Ragged

GEOMETRY = {
    "post": {},
    "pre": {"norm": "pre", "final_norm": True, "embedding_norm": False},
    "swiglu": {"norm": "pre", "activation": "swiglu"},
}
CELL = torch.tensor([2, *range(5, 35), 3])
FRAMING = Framing(1, 1)


def encoder(dtype: torch.dtype = torch.float32, **changes: Any) -> Encoder:
    torch.manual_seed(3)
    values = dict(n_layers=3, width=32, n_heads=2, ff_width=48, vocab_size=60, max_len=40)
    model = Encoder(EncoderConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 + (0.1 if parameter.ndim == 1 else 0.0))
    return model.cast(dtype)


def states(model: Encoder) -> torch.Tensor:
    return torch.randn(3, model.config.width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", ["last", "penultimate", "embeddings"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_hidden_states_are_those_of_the_encoder(name: str, layer: str) -> None:
    model = encoder(**GEOMETRY[name])
    wanted = model(Ragged.from_cells([CELL]), layer=layer).values
    screen = GradientScreen(model, "delete", "cls", layer, FRAMING)
    found = hidden_states(model, screen._summed(CELL), torch.zeros(len(CELL)), model.config.layer_index(layer))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def exact(model: Encoder, kind: str, mode: str, embeddings: torch.Tensor | None) -> np.ndarray:
    edits = Edits(kind, front=1, back=1, max_len=40)
    values = CELL.numpy()
    run = PerturbationRun(
        model, edits, Comparison(mode, FRAMING, embeddings), "last", np.array([len(CELL)]),
        lambda ranks: (values, np.array([0, len(values)])), workers=0,
    )  # fmt: skip
    return np.concatenate([piece.effects.cell for piece in run.values()])


@pytest.mark.parametrize("has_states", [True, False])
@pytest.mark.parametrize("mode", ["cls", "cell"])
@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_estimates_are_exact_where_changes_are_small(kind: str, mode: str, has_states: bool) -> None:
    """Places that differ little, and values that weigh little: what is of second order goes away."""
    model = encoder(torch.float64)
    width = model.config.width
    with torch.no_grad():
        # A similarity is of second order itself, and float32: its changes must not be too small.
        model.embeddings.position.weight.mul_(1e-3 if has_states else 0.02)
        for block in model.blocks:
            block.qkv.weight[:width].mul_(0.1)
            block.qkv.weight[2 * width :].mul_(1e-2 if has_states else 0.3)
    embeddings = states(model) if has_states else None
    screen = GradientScreen(model, kind, mode, "last", FRAMING, embeddings, n_directions=400)
    found = screen.cell(CELL)
    assert found.tokens.tolist() == CELL[1:-1].tolist()
    wanted = exact(model, kind, mode, embeddings)
    estimates = found.values[int(kind == "overexpress") :]
    assert estimates.shape == wanted.shape
    if has_states:
        assert np.abs(estimates - wanted).max() <= 0.15 * np.abs(wanted).max()
        assert np.corrcoef(estimates.ravel(), wanted.ravel())[0, 1] > 0.99
    else:
        assert np.corrcoef(estimates[:, 0], wanted[:, 0])[0, 1] > 0.93
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of some cells, and a model with its vocabulary."""
    folder, words = tmp_path_factory.mktemp("place"), toys.vocabulary()
    toys.cells(9).write_h5ad(folder / "cells.h5ad")
    gf.tokenize(folder / "cells.h5ad", folder / "tokens", dictionary=words, obs="kind", progress=False)
    words.save(gf.save(toys.encoder(words), folder / "model"))
    return folder


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_the_best_are_computed_exactly(kind: str, place: Path, tmp_path: Path) -> None:
    ask = {"kind": kind, "states": {"column": "kind", "goal": "b", "alternatives": ["a"]}, "device": "cpu"}
    every = gf.perturb(place / "tokens", place / "model", progress=False, **ask)
    out = gf.perturb(
        place / "tokens", place / "model", tmp_path / "new", screen="gradient", best=5, progress=False, **ask
    )
    found = gf.open_perturbations(out)
    rows, told = found.to_frame(), found.manifest["report"]["screen"]
    best = [each["token"] for each in told["best"]]
    assert len(best) == 5
    sizes = [abs(each["estimates"][0]) for each in told["best"]]
    assert sizes == sorted(sizes, reverse=True)
    token = every["tokens"].str[0]
    assert told["n_genes"] == token.nunique()
    wanted = every[token.isin(best)]
    key = ["cell", "state", "token"]
    # The first-ranked gene of a cell stays where it is: overexpressed, it changes nothing.
    both = (
        rows.assign(token=rows["tokens"].str[0])
        .merge(wanted.assign(token=token), on=key, how="left", suffixes=("", "_all"))
    )  # fmt: skip
    np.testing.assert_allclose(both["value"], both["value_all"].fillna(0.0), atol=2e-6)
    assert both["value_all"].notna().sum() == len(wanted)
    n_cells = {each["token"]: each["n_cells"] for each in told["best"]}
    assert n_cells == wanted["tokens"].str[0].value_counts().floordiv(2).to_dict()


def test_estimates_of_genes_are_means_over_cells(place: Path) -> None:
    model = gf.load(place / "model", device="cpu", dtype="float32")
    screen = GradientScreen(model, "delete", "cls", "last", FRAMING, n_directions=3)
    folder = gf.open_tokens(place / "tokens")
    cells = np.array([4, 0, 7])
    found = screened_genes(screen, folder, cells, progress=False)
    values: dict[int, list[float]] = {}
    for cell in cells:
        each = screen.cell(torch.from_numpy(folder.read([cell])[0].astype(np.int64)))
        for token, value in zip(each.tokens.tolist(), each.values[:, 0].tolist(), strict=True):
            values.setdefault(token, []).append(value)
    assert dict(zip(found.tokens[:, 0].tolist(), found.n_cells.tolist(), strict=True)) == {
        token: len(each) for token, each in values.items()
    }
    means = [np.mean(values[token]) for token in found.tokens[:, 0].tolist()]
    np.testing.assert_allclose(found.estimates[:, 0], means, rtol=1e-6)
    assert means == sorted(means)  # the least similar first


@pytest.mark.parametrize("has_states", [True, False])
def test_estimates_of_pairs_are_those_of_both_genes_together(has_states: bool, place: Path) -> None:
    """Against one cell after another in plain Python: changes add up, and means are over the cells that have both."""
    model = gf.load(place / "model", device="cpu", dtype="float32")
    vectors = states(model) if has_states else None
    screen = GradientScreen(model, "delete", "cls", "last", FRAMING, vectors, n_directions=5)
    folder, cells = gf.open_tokens(place / "tokens"), np.array([4, 0, 7])
    found = screened_pairs(screen, folder, cells, goal=0, best=10_000, progress=False)
    values: dict[tuple[int, ...], list[np.ndarray]] = {}
    for cell in cells:
        genes, changes = screen.changes(torch.from_numpy(folder.read([cell])[0].astype(np.int64)))
        for one, other in itertools.combinations(range(len(genes)), 2):
            pair = tuple(sorted((int(genes[one]), int(genes[other]))))
            both = changes[one].astype(np.float64) + changes[other]
            values.setdefault(pair, []).append(both if has_states else np.array([1 - np.square(both).mean() / 2]))
    pairs = [tuple(pair) for pair in found.tokens.tolist()]
    assert dict(zip(pairs, found.n_cells.tolist(), strict=True)) == {pair: len(each) for pair, each in values.items()}
    means = np.array([np.mean(values[pair], axis=0) for pair in pairs])
    np.testing.assert_allclose(found.estimates, means, rtol=1e-5, atol=1e-9)
    sizes = np.abs(means[:, 0] - (0.0 if has_states else 1.0))
    assert (np.diff(sizes) <= 1e-9).all()

    anchor = pairs[0][0]
    with_anchor = screened_pairs(screen, folder, cells, goal=0, best=3, anchor=anchor, progress=False)
    of_anchor = {frozenset(pair): n for pair, n in zip(pairs, found.n_cells.tolist(), strict=True) if anchor in pair}
    tokens = with_anchor.tokens.tolist()
    assert {frozenset(pair): n for pair, n in zip(tokens, with_anchor.n_cells.tolist(), strict=True)} == of_anchor
    assert {first for first, _ in tokens} == {anchor}


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("way", ["pairs", "anchor"])
def test_the_best_pairs_are_computed_exactly(way: str, kind: str, place: Path, tmp_path: Path) -> None:
    ask: dict[str, Any] = {"kind": kind, "states": {"column": "kind", "goal": "b"}, "device": "cpu", "max_cells": 3}
    folder = gf.open_tokens(place / "tokens")
    ask |= {"pairs": True} if way == "pairs" else {"anchor": int(folder.read([4])[0][3])}
    every = gf.perturb(place / "tokens", place / "model", progress=False, **ask)
    out = gf.perturb(
        place / "tokens", place / "model", tmp_path / "new", screen="gradient", best=6, progress=False, **ask
    )
    found = gf.open_perturbations(out)
    rows, told = found.to_frame(), found.manifest["report"]["screen"]
    best = {frozenset(each["tokens"]): each["n_cells"] for each in told["best"]}
    assert len(best) == 6
    assert set(rows["tokens"].map(frozenset)) == set(best)

    def by_pair(frame: Any) -> dict[Any, float]:
        return {(row.cell, frozenset(row.tokens), row.state): row.value for row in frame.itertuples()}

    every, chosen = by_pair(every), by_pair(rows)
    assert chosen.keys() == {key for key in every if key[1] in best}
    assert {pair: sum(key[1] == pair for key in chosen) // len(found.states) for pair in best} == best
    np.testing.assert_allclose([chosen[key] for key in chosen], [every[key] for key in chosen], atol=2e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"best": 5}, "is of a screen"),
        ({"screen": "magic"}, "must be one of gradient"),
        ({"screen": "gradient", "best": 0}, "at least 1"),
        ({"screen": "gradient", "kind": "inhibit", "doses": 0.5}, "of deletions or overexpressions"),
        ({"screen": "gradient", "genes": [5]}, "leave genes and lists out"),
        ({"screen": "gradient", "genes": [5, 6], "pairs": True}, "leave genes and lists out"),
        ({"screen": "gradient", "sets": [[5, 6]]}, "leave genes and lists out"),
    ],
)
def test_what_cannot_be_screened_is_refused(options: dict[str, Any], says: str, place: Path) -> None:
    with pytest.raises(UnsupportedError, match=says):
        gf.perturb(place / "tokens", place / "model", device="cpu", progress=False, **options)


@pytest.mark.parametrize("how", ["int8", "int8-weights", "bfloat16"])
def test_models_of_fewer_bits_are_estimated_too(how: str) -> None:
    size = {"width": 64, "ff_width": 128}
    model = encoder(**size)
    other = encoder(torch.bfloat16, **size) if how == "bfloat16" else gf.quantize(encoder(**size), scheme=how)
    wanted, found = (
        GradientScreen(each, "delete", "cls", "last", FRAMING, states(model)).cell(CELL).values.ravel()
        for each in (model, other)
    )
    assert np.corrcoef(wanted, found)[0, 1] > 0.9
