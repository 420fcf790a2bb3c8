"""A quantized model beside the one it was made of: what users see of both, on their own cells."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.arguments import checked, renamed
from geneformer_fast.checkpoints import load
from geneformer_fast.config import usable_device
from geneformer_fast.data.identity import identity_of
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, InputError, UnsupportedError
from geneformer_fast.finetuning.labels import column_values
from geneformer_fast.finetuning.losses import IGNORED
from geneformer_fast.finetuning.models import read_card
from geneformer_fast.finetuning.predictions import probabilities_of
from geneformer_fast.finetuning.scores import score
from geneformer_fast.quantization.answers import N_GENES, Answers, Questions
from geneformer_fast.quantization.convert import without_numbers
from geneformer_fast.quantization.report import columns
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens

#: What a quantized model should hold: cosine of a cell's embeddings, shares of its nearest neighbours and of the genes
#: expected at a masked place that stay, and how far the macro-F1 of a classifier may fall.
LEAST_COSINE, LEAST_NEIGHBOURS, LEAST_GENES, MOST_F1 = 0.9995, 0.95, 0.95, 0.005
N_NEIGHBOURS = 15
#: Cells that are compared unless more are asked for.
N_CELLS = 2000
_DISTANCES = 1 << 24  # at once: 64 MB


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes
    ----------
    name
        What is measured.
    exact, quantized
        Of the model in floating point, and of the quantized one. What compares the two is 1 for the former.
    bound
        What it should hold, in words; empty where there is no such thing.
    is_held
        Whether it does; None without a bound.
    note
        What is to be said of it below the table.
    """

    name: str
    exact: float
    quantized: float
    bound: str = ""
    is_held: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A quantized model beside the one it was made of.

    Attributes
    ----------
    measures
        Rows of the table.
    n_cells, n_masked
        Cells that were compared, and masked genes.
    scheme
        What the model was quantized to; None where it was not.
    exact_dtype, dtype
        Of the products in floating point of the first model and of the quantized one.
    """

    measures: list[Measure]
    n_cells: int
    n_masked: int
    scheme: str | None
    exact_dtype: str
    dtype: str

    @property
    def is_held(self) -> bool:
        """Whether every bound is."""
        return all(measure.is_held is not False for measure in self.measures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "is_held": self.is_held}

    def as_text(self) -> str:
        """The table that is printed."""
        rows = [("", self.exact_dtype, "quantized", "bound", "")]
        for measure in self.measures:
            held = {None: "", True: "held", False: "MISSED"}[measure.is_held]
            rows.append((measure.name, _number(measure.exact), _number(measure.quantized), measure.bound, held))
        masked = f", {self.n_masked:,} masked genes" if self.n_masked else ""
        about = f"{self.n_cells:,} cells{masked}; quantized to {self.scheme}, other products in {self.dtype}"
        return "\n".join([*columns(rows, right=(1, 2)), *(m.note for m in self.measures if m.note), about])


@renamed(n_cells="max_cells")
@checked
def check(
    model: Encoder | str | os.PathLike[str],
    quantized: Encoder | str | os.PathLike[str],
    tokens: str | os.PathLike[str] | TokenFolder,
    *,
    label: str | None = None,
    layer: str | int = "penultimate",
    max_cells: int | None = N_CELLS,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Check:
    """Compare a quantized model with the one it was made of, on cells: one after the other, so that only one is held.

    Embeddings are compared by their cosine and by each cell's nearest neighbours; of a classifier of cells the classes
    it tells, and its macro-F1 where tokens carry the right ones; of a head of masked genes the genes it expects.

    Parameters
    ----------
    model, quantized
        Folders, or encoders.
    tokens
        Token folder.
    label
        The column with the right classes, of a classifier of one task; None: the one it was trained on, where tokens
        carry it. The model must be a folder, which knows the names of its classes.
    layer
        Whose embeddings, as in ``embed``.
    max_cells
        Most cells that are compared, drawn at random; None takes all.
    dtype, device
        Of the quantized model, where it is a folder. The other one computes in float32.
    token_budget
        Tokens per batch; None chooses by device.
    seed
        Of cells and masks.
    progress
        Whether to show progress bars; None shows them on a terminal, and lines of the log elsewhere.

    Returns
    -------
    Check

    Raises
    ------
    CheckpointError
        A folder holds no model, or the two are no models of one kind.
    InputError
        There are fewer than two cells, or none with a right class.
    UnsupportedError
        ``label`` where there is no classifier of cells, or one of several tasks.
    VocabularyError
        The tokens belong to another vocabulary than the model.
    """
    if not isinstance(tokens, TokenFolder):
        with open_tokens(tokens) as folder:
            return check(
                model, quantized, folder, label=label, layer=layer, max_cells=max_cells, dtype=dtype, device=device,
                token_budget=token_budget, seed=seed, progress=progress,
            )  # fmt: skip
    if max_cells is not None and max_cells < 2:
        raise UnsupportedError(f"max_cells must be at least 2, not {max_cells}")
    check_enough(tokens)
    drawn = np.random.default_rng(seed).permutation(tokens.n_cells)[:max_cells]
    questions = Questions(tokens, drawn, layer, token_budget, seed, progress)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = model.eval() if isinstance(model, Encoder) else load(model, dtype="float32", device=device)
    tasks = _tasks(model, encoder, tokens, drawn, label)
    exact = questions.ask(encoder)
    del encoder
    encoder = quantized.eval() if isinstance(quantized, Encoder) else load(quantized, dtype=dtype, device=device)
    return compared(exact, questions.ask(encoder), tasks)


def check_askable(
    model: str | os.PathLike[str], tokens: str | os.PathLike[str], *, label: str | None, device: str | None
) -> None:
    """See that :func:`check` will find what it needs, before the model that it is to look at is made.

    Raises
    ------
    CheckpointError, InputError, UnsupportedError, VocabularyError
        As it would.
    """
    if device is not None:
        usable_device(device)
    with open_tokens(tokens) as folder:
        check_enough(folder)
        encoder = without_numbers(Path(model))
        identity_of(folder, encoder.config)
        _tasks(model, encoder, folder, np.arange(folder.n_cells), label)


def check_enough(tokens: TokenFolder) -> None:
    """See that there are cells to compare with each other."""
    if tokens.n_cells < 2:
        has = f"{tokens.n_cells} cell{'' if tokens.n_cells == 1 else 's'}"
        raise InputError(f"{tokens.path} has {has}, and two at least are needed to compare models; name another folder")


@dataclass(frozen=True)
class Task:
    """A task of a classifier of cells: its classes, and of each cell the right one, -100 where nobody knows."""

    name: str
    classes: list[str]
    truth: np.ndarray | None


def _tasks(model: Any, encoder: Encoder, tokens: TokenFolder, cells: np.ndarray, label: str | None) -> list[Task]:
    """What a classifier of cells tells apart, with the right answers where there are some."""
    card = None
    if not isinstance(model, Encoder) and hasattr(encoder.head, "classifier"):
        card = read_card(Path(model), encoder)
    if card is None or card["kind"] != "cells":
        if label is not None:
            raise UnsupportedError(
                f"label {label!r} is for a classifier of cells in a folder, and this is none; leave it out"
            )
        return []
    if label is not None and len(card["tasks"]) > 1:
        names = ", ".join(task["name"] for task in card["tasks"])
        raise UnsupportedError(
            f"label {label!r} is for a classifier of one task, and this one tells apart {names}; carry these columns "
            "along with tokenize --obs, and leave label out"
        )
    found = []
    for task in card["tasks"]:
        column, classes = label or task["name"], list(task["classes"])
        truth = None
        if label is not None or column in tokens.columns:
            code_of = {name: code for code, name in enumerate(classes)}
            values = column_values(tokens, column, role="label")[cells]
            truth = np.array([code_of.get(value, IGNORED) for value in values], dtype=np.int64)
            if (truth == IGNORED).all():
                raise InputError(
                    f"{tokens.path}: no cell's {column!r} is one of the classes of the model, {', '.join(classes[:20])}"
                )
        found.append(Task(task["name"], classes, truth))
    return found


def compared(exact: Answers, changed: Answers, tasks: Sequence[Task] = ()) -> Check:
    """What two models said of the same cells, side by side.

    Raises
    ------
    CheckpointError
        They are no models of one kind.
    """
    _check_alike(exact, changed)
    measures = [
        *_of_embeddings(exact, changed),
        *_of_classes(exact, changed, tasks),
        *_of_genes(exact, changed),
        Measure("model, MB", exact.n_bytes / 1e6, changed.n_bytes / 1e6),
    ]
    n_masked = 0 if exact.targets is None else len(exact.targets)
    return Check(measures, len(exact.embeddings), n_masked, changed.scheme, exact.dtype, changed.dtype)


def _check_alike(exact: Answers, changed: Answers) -> None:
    """Two models of one kind answer alike."""
    for name in ("embeddings", "logits", "genes"):
        one, other = getattr(exact, name), getattr(changed, name)
        shapes = [None if answer is None else answer.shape for answer in (one, other)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"the two models are not of one kind: {name} are {shapes[0]} of the first, {shapes[1]} of the other; "
                "name a model and what was made of it"
            )


def _of_embeddings(exact: Answers, changed: Answers) -> list[Measure]:
    one, other = (torch.from_numpy(answers.embeddings).double() for answers in (exact, changed))
    cosine = F.cosine_similarity(one, other, dim=1)
    least = float(cosine.min())
    return [
        Measure("cosine of embeddings, least", 1.0, least, f">= {LEAST_COSINE}", least >= LEAST_COSINE),
        Measure("cosine of embeddings, median", 1.0, float(cosine.median())),
        _of_neighbours(one, other),
    ]


def _of_neighbours(one: torch.Tensor, other: torch.Tensor) -> Measure:
    """Nearest neighbours, as far as there are any: cells may be nearer to each other than numbers are told apart.

    A model that was hardly trained gives all cells nearly one embedding; rounding that to bfloat16, in which many keep
    embeddings, already changes who is near to whom. No more can be asked of a quantized model then.
    """
    shared, least, note = neighbours_shared(one, other), LEAST_NEIGHBOURS, ""
    k = min(N_NEIGHBOURS, len(one) - 1)
    if shared < least and (rounded := neighbours_shared(one, one.bfloat16().to(one.dtype))) < least:
        least = rounded
        note = (
            f"cells are too alike to ask for {LEAST_NEIGHBOURS} of their neighbours: to round the first model's "
            f"embeddings to bfloat16 leaves {rounded:.3g}"
        )
    return Measure(f"{k} nearest neighbours shared", 1.0, shared, f">= {least:.3g}", shared >= least, note)


def _of_classes(exact: Answers, changed: Answers, tasks: Sequence[Task]) -> list[Measure]:
    if exact.logits is None or changed.logits is None:
        return []
    if not tasks:
        same = float((exact.logits.argmax(1) == changed.logits.argmax(1)).mean())
        return [Measure("cells called the same", 1.0, same)]
    measures = []
    sizes = [len(task.classes) for task in tasks]
    pairs = zip(*(probabilities_of(answers.logits, sizes) for answers in (exact, changed)), strict=True)  # type: ignore[arg-type]
    for task, (one, other) in zip(tasks, pairs, strict=True):
        same = float((one.argmax(1) == other.argmax(1)).mean())
        measures.append(Measure(f"{task.name}: cells called the same", 1.0, same))
        if task.truth is not None:
            known = task.truth != IGNORED
            before, after = (score(task.truth[known], p[known], task.classes)["macro_f1"] for p in (one, other))
            is_held = before - after <= MOST_F1
            measures.append(Measure(f"{task.name}: macro-F1", before, after, f"within {MOST_F1}", is_held))
    return measures


def _of_genes(exact: Answers, changed: Answers) -> list[Measure]:
    if exact.genes is None or changed.genes is None or exact.targets is None or not len(exact.targets):
        return []
    one, other = exact.genes, changed.genes
    shared = float((one[:, :, None] == other[:, None, :]).any(2).mean())
    before, after = (float((genes == exact.targets[:, None]).any(1).mean()) for genes in (one, other))
    return [
        Measure(f"{N_GENES} likeliest genes shared", 1.0, shared, f">= {LEAST_GENES}", shared >= LEAST_GENES),
        Measure(f"masked gene among {N_GENES} likeliest", before, after),
    ]


def neighbours_shared(one: torch.Tensor, other: torch.Tensor, k: int = N_NEIGHBOURS) -> float:
    """Share of each cell's ``k`` nearest neighbours (Euclidean) among embeddings [n, C] that it keeps among others."""
    n_cells, shared = len(one), 0
    k = min(k, n_cells - 1)
    step = max(1, _DISTANCES // n_cells)
    for start in range(0, n_cells, step):
        rows = torch.arange(start, min(start + step, n_cells))
        near, far = (_nearest(x, rows, k) for x in (one, other))
        shared += int((near[:, :, None] == far[:, None, :]).any(2).sum())
    return shared / (n_cells * k)


def _nearest(embeddings: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """[R, k] the cells nearest to those of ``rows``, which are none of them."""
    distances = torch.cdist(embeddings[rows], embeddings)
    distances[torch.arange(len(rows)), rows] = torch.inf
    return distances.topk(k, largest=False).indices


def _number(value: float) -> str:
    return f"{value:,.6g}"
