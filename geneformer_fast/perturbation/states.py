"""Embeddings of states: what cells of a kind look like on average, to tell where a perturbation moves a cell."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast.arguments import check_seed, checked
from geneformer_fast.checkpoints import load
from geneformer_fast.data.selection import Selection
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.extract.cells import Cells, open_cells
from geneformer_fast.extract.encoding import EncodingRun
from geneformer_fast.files.schema import parse_json
from geneformer_fast.files.tensors import metadata_of, read_tensors
from geneformer_fast.files.writing import write_tensors
from geneformer_fast.perturbation.pickles import read_state_vectors
from geneformer_fast.tokenization.arrow import open_tokens

#: How cells of a state become one embedding.
STATISTICS = ("mean", "median")
#: Cells of a state that are taken at most, as Geneformer's own extractor does.
MAX_CELLS = 1000
_FORMAT = "geneformer-fast states"
_ABOUT = "make it again with geneformer_fast.state_embeddings"
_FIELDS = ("column", "start", "goal", "alternatives")


@dataclass(frozen=True)
class StateRoles:
    """Which values of a column of obs are the states, and what each is in a question.

    Attributes
    ----------
    column
        Of obs, carried by the tokens.
    start
        Cells of this state are perturbed; None perturbs cells whatever their state.
    goal
        The state that they should move to, or None.
    alternatives
        Further states to compare with.
    """

    column: str
    start: str | None = None
    goal: str | None = None
    alternatives: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> StateRoles:
        """From plain values under these names.

        Raises
        ------
        UnsupportedError
            A name is none of these, the column or every state is missing, or a state is named twice.
        """
        unknown = next((name for name in asked if name not in _FIELDS), None)
        if unknown is not None:
            raise UnsupportedError(f"states say {', '.join(_FIELDS)}, and nothing else; what is {unknown!r}?")
        if not isinstance(asked.get("column"), str):
            raise UnsupportedError("states need a column of obs that tells them apart: say column")
        others = asked.get("alternatives") or ()
        others = (others,) if isinstance(others, str) else tuple(others)
        roles = cls(asked["column"], asked.get("start"), asked.get("goal"), others)
        if not roles.names:
            raise UnsupportedError("states need names: say start, goal or alternatives")
        twice = next((name for name in roles.names if roles.names.count(name) > 1), None)
        if twice is not None:
            raise UnsupportedError(f"the state {twice!r} is named twice: start, goal and alternatives must differ")
        return roles

    @property
    def names(self) -> tuple[str, ...]:
        """All of them: start, goal, alternatives."""
        return tuple(str(name) for name in (self.start, self.goal, *self.alternatives) if name is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, states as text."""
        start, goal = (None if name is None else str(name) for name in (self.start, self.goal))
        return {"column": self.column, "start": start, "goal": goal, "alternatives": [*map(str, self.alternatives)]}


@dataclass(frozen=True)
class States:
    """Embeddings of states.

    Attributes
    ----------
    names
        S states.
    embeddings
        [S, C] float32.
    about
        How they were made, in plain values: statistic, layer, pool, model, column, cells of each; empty where nobody
        knows.
    """

    names: tuple[str, ...]
    embeddings: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names):
            raise InputError(
                f"embeddings {[*self.embeddings.shape]} must be a row for each of {len(self.names)} states"
            )
        for name, row in zip(self.names, self.embeddings, strict=True):
            if not np.isfinite(row).all():
                raise InputError(f"the embedding of state {name!r} holds values that are not finite; make it again")
            if not row.any():
                raise InputError(f"the embedding of state {name!r} is zero, which nothing moves towards; make it again")

    def of(self, names: Sequence[str]) -> States:
        """Those of some states, in the order of the names.

        Raises
        ------
        InputError
            There is no embedding of one of them.
        """
        absent = next((name for name in names if name not in self.names), None)
        if absent is not None:
            raise InputError(f"there is no embedding of state {absent!r}; there are {', '.join(self.names)}")
        rows = [self.names.index(name) for name in names]
        return States(tuple(names), self.embeddings[rows], self.about)

    def check(self, encoder: Encoder, layer: str | int, pool: str) -> None:
        """Refuse to compare with embeddings of another width, layer or kind.

        Raises
        ------
        InputError
            They were made otherwise.
        """
        width, n_blocks = encoder.config.width, encoder.config.layer_index(layer)
        if self.embeddings.shape[1] != width:
            raise InputError(f"embeddings of states have {self.embeddings.shape[1]} dimensions, the model's {width}")
        for name, mine in (("blocks_computed", n_blocks), ("pool", pool)):
            if self.about.get(name, mine) != mine:
                raise InputError(
                    f"embeddings of states were made with {name} {self.about[name]}, and cells are compared with "
                    f"{mine}; {_ABOUT} for this layer and mode"
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, which :func:`read_states` reads."""
        path = Path(path)
        about = {"format": _FORMAT, "version": 1, "names": list(self.names), "about": dict(self.about)}
        tensors = {"embeddings": torch.from_numpy(np.ascontiguousarray(self.embeddings, dtype=np.float32))}
        write_tensors(path, tensors, {"states": json.dumps(about)})
        return path


def read_states(path: str | os.PathLike[str]) -> States:
    """Embeddings of states that :meth:`States.save` wrote, or (.pkl, .pickle) Geneformer's own extractor.

    Raises
    ------
    InputError
        The file is absent, damaged, or something else.
    """
    path = Path(path)
    if path.suffix in (".pkl", ".pickle"):
        vectors = read_state_vectors(path)
        return States(tuple(vectors), np.stack([*vectors.values()]))
    embeddings = read_tensors(path, InputError, _ABOUT).get("embeddings")
    text = metadata_of(path).get("states")
    about = {} if text is None else parse_json(text, path, InputError)
    if embeddings is None or not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise InputError(f"{path} holds no embeddings of states; {_ABOUT}")
    if about.get("version") != 1:
        raise InputError(f"{path} was written by a newer geneformer_fast (version {about.get('version')!r})")
    names, rest = about.get("names"), about.get("about")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(rest, dict):
        raise InputError(f"{path} does not name its states; {_ABOUT}")
    return States(tuple(names), embeddings.float().numpy(), rest)


@checked
def state_embeddings(
    tokens: str | os.PathLike[str],
    model: Encoder | str | os.PathLike[str],
    column: str,
    states: str | Sequence[str],
    *,
    layer: str | int = "penultimate",
    pool: str | None = None,
    statistic: str = "mean",
    where: Mapping[str, Any] | None = None,
    max_cells: int | None = MAX_CELLS,
    seed: int = 42,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> States:
    """What cells of some states look like on average.

    Parameters
    ----------
    tokens
        Token folder that carries the column.
    model
        Checkpoint folder, or an :class:`Encoder`.
    column, states
        Column of obs, and its values that are states.
    layer
        As in :func:`geneformer_fast.embed`.
    pool
        What a cell's embedding is: ``"cls"``, or ``"mean"`` over its genes; None takes ``"cls"`` where the vocabulary
        has that token.
    statistic
        ``"mean"`` over the cells, or ``"median"``: in each dimension, the lower of the two in the middle.
    where
        Cells to take at all, as in :func:`geneformer_fast.embed`.
    max_cells, seed
        Most cells of a state, drawn by the seed as Geneformer's own extractor draws them; None takes all.
    dtype, device, token_budget, progress
        As in :func:`geneformer_fast.embed`.

    Returns
    -------
    States

    Raises
    ------
    InputError
        The tokens carry no such column, or no cell has the state.
    UnsupportedError
        No such layer, pool or statistic.
    """
    if isinstance(model, Encoder):
        encoder = model.eval()
    else:
        encoder = load(model, dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return embeddings_of(
        encoder, tokens, column, [states] if isinstance(states, str) else states, layer=layer, pool=pool,
        statistic=statistic, where=where,
        max_cells=max_cells, seed=seed, token_budget=token_budget, progress=progress,
    )  # fmt: skip


def embeddings_of(
    encoder: Encoder,
    tokens: str | os.PathLike[str],
    column: str,
    states: Sequence[str],
    *,
    layer: str | int,
    pool: str | None,
    statistic: str,
    where: Mapping[str, Any] | None,
    max_cells: int | None,
    seed: int,
    token_budget: int | None,
    progress: bool | None,
) -> States:
    """:func:`state_embeddings` with an encoder."""
    if statistic not in STATISTICS:
        raise UnsupportedError(f"statistic must be one of {', '.join(STATISTICS)}, not {statistic!r}")
    for what, number in (("max_cells", max_cells), ("token_budget", token_budget)):
        if number is not None and number < 1:
            raise UnsupportedError(f"{what} must be at least 1, not {number}")
    check_seed(seed)
    if not states:
        raise UnsupportedError("states must name a state")
    rows, n_cells = [], {}
    with open_cells(tokens, None, encoder.config, {"obs": {}}, progress) as cells:
        pool = _pool_of(pool, cells)
        # Cells without genes have no mean over them.
        special = cells.vocabulary["special"]
        n_special = 0 if pool == "cls" or cells.cls_id is None else sum(name in special for name in ("cls", "eos"))
        with open_tokens(tokens) as folder:
            found = {name: _cells_of(folder, column, name, where, max_cells, seed, n_special) for name in states}
        for name, chosen in found.items():
            some = cells.of_rows(chosen, Selection({column: (name,)}), is_compact=True)
            embedded = EncodingRun(encoder, some, pool, layer, token_budget, progress).to_memory()
            n_cells[str(name)] = len(chosen)
            rows.append(_averaged(embedded, statistic))
    about = {
        "statistic": statistic, "column": column, "layer": str(layer), "pool": pool, "n_cells": n_cells,
        "blocks_computed": encoder.config.layer_index(layer),
    }  # fmt: skip
    return States(tuple(str(name) for name in states), np.stack(rows), about)


def _cells_of(
    folder: Any, column: str, name: str, where: Mapping[str, Any] | None, max_cells: int | None, seed: int,
    n_special: int,
) -> np.ndarray:  # fmt: skip
    """Ascending numbers of the cells of a state that are taken, of those that have more than special tokens."""
    is_taken = np.zeros(folder.n_cells, dtype=bool)
    is_taken[Selection({column: (name,)}).matching(folder)] = True
    allowed = Selection.of(where, None, None)
    if allowed is not None:
        is_allowed = np.zeros(folder.n_cells, dtype=bool)
        is_allowed[allowed.matching(folder)] = True
        is_taken &= is_allowed
    cells = np.flatnonzero(is_taken)
    if not len(cells):
        raise InputError(f"{folder.path}: no cell with {column} {name!r} is among those that are chosen by where")
    is_empty = folder.lengths()[cells] <= n_special
    if n_special and is_empty.any():
        warnings.warn(
            f"{folder.path}: {is_empty.sum():,} cells with {column} {name!r} have no genes and are left out of its "
            "embedding",
            stacklevel=4,
        )
        cells = cells[~is_empty]
        if not len(cells):
            raise InputError(
                f"{folder.path}: no cell with {column} {name!r} has a gene; use mode cls, or another state"
            )
    if max_cells is not None and max_cells < len(cells):
        # As datasets.Dataset.shuffle(seed) orders them, of which the official extractor takes the first.
        cells = np.sort(cells[np.random.default_rng(seed).permutation(len(cells))[:max_cells]])
    return cells


def _pool_of(pool: str | None, cells: Cells) -> str:
    has_cls = cells.cls_id is not None
    if pool is None:
        return "cls" if has_cls else "mean"
    if pool not in ("cls", "mean"):
        raise UnsupportedError(f"pool must be cls or mean, not {pool!r}")
    if pool == "cls" and not has_cls:
        raise UnsupportedError(f"{cells.vocabulary.get('name')} has no CLS token; use pool mean")
    return pool


def _averaged(embedded: np.ndarray, statistic: str) -> np.ndarray:
    if statistic == "mean":
        return embedded.mean(0, dtype=np.float64).astype(np.float32)
    return np.sort(embedded, axis=0)[(len(embedded) - 1) // 2]
