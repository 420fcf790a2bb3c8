"""``perturbation_stats``: from values of perturbed cells to statements about genes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_fast import __version__
from geneformer_fast.arguments import checked
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.perturbation.reading import Perturbations
from geneformer_fast.perturbation.statistics import bootstrap
from geneformer_fast.perturbation.statistics.aggregate import aggregate_data, aggregate_gene_shifts
from geneformer_fast.perturbation.statistics.agreement import agreeing, sign_agreement
from geneformer_fast.perturbation.statistics.asked import (
    FAULTS,
    check_asked,
    check_mended,
    check_others,
    check_pictures_asked,
    check_place,
    mended,
)
from geneformer_fast.perturbation.statistics.columns import Run, Values
from geneformer_fast.perturbation.statistics.effects import MIN_CELLS, Settings, effects, groups_of
from geneformer_fast.perturbation.statistics.epistasis import epistasis
from geneformer_fast.perturbation.statistics.goal_state_shift import goal_state_shift, goal_state_shift_of_list
from geneformer_fast.perturbation.statistics.mixture import check_mixture, mixture_model
from geneformer_fast.perturbation.statistics.names import Names
from geneformer_fast.perturbation.statistics.result import Statistics
from geneformer_fast.perturbation.statistics.sources import Rows, open_rows, vocabulary_of
from geneformer_fast.perturbation.statistics.versus_null import versus_null
from geneformer_fast.progress import Progress
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas
    from pyarrow import Table


@checked
def perturbation_stats(
    runs: str | os.PathLike[str] | Perturbations | Table | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    mode: str | None = None,
    goal: str | None = None,
    alternative: str | Sequence[str] | None = None,
    null: str | os.PathLike[str] | Perturbations | Table | None = None,
    compare: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    singles: str | os.PathLike[str] | Perturbations | Table | None = None,
    genes: str | Sequence[str] | None = None,
    anchor: str | None = None,
    dose: float | None = None,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    mend: str | Sequence[str] = (),
    group: str | None = None,
    min_cells: int = MIN_CELLS,
    draws: int = bootstrap.DRAWS,
    confidence: float = 0.95,
    fdr: float = 0.05,
    correction: str = "bh",
    seed: int = 0,
    pictures: bool = True,
    embeddings: str | os.PathLike[str] | None = None,
    color: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Statistics:
    """Say of perturbations what each gene does, how sure that is, and how unusual.

    Parameters
    ----------
    runs
        What :func:`perturb` wrote: the folder, or those of all shards of a run; a folder of pickles of the official
        ``InSilicoPerturber``; what ``open_perturbations`` gave; or a
        ``pyarrow.Table`` with its columns.
    out
        Folder for the tables as CSV, pictures, and what the numbers mean in words. None writes nothing.
    mode
        Which official table is made: ``"goal_state_shift"``, ``"vs_null"``, ``"mixture_model"``,
        ``"aggregate_data"`` or ``"aggregate_gene_shifts"``. None takes ``goal_state_shift`` for a run with states,
        ``vs_null`` where there is a ``null``, ``aggregate_gene_shifts`` for values of genes, ``mixture_model`` for
        others, and ``aggregate_data`` where all genes were perturbed together.
    goal, alternative
        States, of the latter several; None: the goal of the run, and all others but its start.
    null
        A run of other cells, which ``vs_null`` compares with; elsewhere its means stand beside, as a control.
    compare
        Runs of the same genes by another layer or another model: in how far they agree.
    singles
        For a run of pairs the run of single genes in the same cells: what pairs do beyond the sum of their genes.
    genes
        Of ``aggregate_data`` and ``aggregate_gene_shifts``: rows of these perturbed genes, by id or symbol.
    anchor
        A gene, by id or symbol. Of ``mixture_model``: the genes that it moves take the place of perturbed ones; of
        ``aggregate_gene_shifts``: pairs with it.
    dose
        Of a run with several doses, this one.
    dictionary
        Gene dictionaries, a folder or a Vocabulary, for the symbols.
    mend
        Faults of the official tables that are mended: ``"components"``, ``"pool"``, ``"ties"``, several of them, or
        ``"all"``. The numbers of the table are then not the official ones.
    group
        A column that was carried, such as the donor: where there are several, a donor is the unit that means,
        intervals and power are about.
    min_cells
        Genes in fewer cells are listed, and not tested.
    draws, confidence, seed
        Resamples of the bootstrap, the share of intervals that hold the mean, and what is drawn by.
    fdr, correction
        The false discovery rate that counts as unusual, and how p-values are adjusted: ``"bh"`` (Benjamini and
        Hochberg) or ``"by"`` (Benjamini and Yekutieli).
    pictures
        Whether pictures are drawn into ``out``.
    embeddings
        What :func:`embed` made of the same token folder, ``.npy`` or ``.parquet``: shifts are shown on its UMAP.
    color
        The column beside these embeddings that is shown on the UMAP, such as the states.
    overwrite
        Whether ``out`` may hold statistics already.
    progress
        Whether to show how far it is; None shows a bar on a terminal, and lines of the log elsewhere.

    Returns
    -------
    Statistics
        ``table`` (the official one), ``effects``, ``agreement``, ``interactions``, as data frames, and ``about``.

    Raises
    ------
    InputError
        A run has no rows, or not those that the mode is about; a column or state is not there.
    OutputError
        A run is unfinished or damaged; ``out`` may not be written.
    UnsupportedError
        An option is out of range or contradicts another; a library is not installed.
    VocabularyError
        A gene is not in the run, nor in the dictionary.
    """
    given = {"anchor": anchor, "genes": genes}
    check_asked(
        mode=mode, mend=mend, has_null=null is not None, given=given, min_cells=min_cells, draws=draws,
        confidence=confidence, fdr=fdr, correction=correction, seed=seed,
    )  # fmt: skip
    check_pictures_asked(embeddings, color, has_pictures=pictures, has_out=out is not None)
    check_others(runs, null=null, compare=compare)
    if out is not None:
        check_place(Path(out), overwrite=overwrite)
        if pictures:
            from geneformer_fast.perturbation.pictures import check_pictures

            check_pictures()
    settings = Settings(min_cells, group, draws, confidence, seed, correction, fdr)  # type: ignore[arg-type]
    asked = _Asked(goal, alternative, mended(mend), genes, anchor, dose, vocabulary_of(dictionary), settings)
    others = [] if compare is None else [compare] if isinstance(compare, str | os.PathLike) else list(compare)
    with Progress(3 + len(others), "statistics", "steps", progress) as bar:
        null_rows, single_rows = (None if each is None else open_rows(each) for each in (null, singles))
        found, run = _statistics(open_rows(runs), mode, asked, null_rows, single_rows, bar)
        if others:
            _compare(found, {str(each): open_rows(each) for each in others}, asked, bar)
        if out is not None:
            drawings = None
            if pictures:
                from geneformer_fast.perturbation.drawings import Drawings

                drawings = Drawings.of(found, run, settings, embeddings, color)
            found.save(out, overwrite=overwrite, pictures=drawings)
        bar.update(1)
    return found


class _Asked:
    """What was asked, of every run alike."""

    def __init__(
        self, goal: str | None, alternative: str | Sequence[str] | None, mend: tuple[str, ...],
        genes: str | Sequence[str] | None, anchor: str | None, dose: float | None, vocabulary: Vocabulary | None,
        settings: Settings,
    ) -> None:  # fmt: skip
        self.goal, self.mend, self.anchor, self.dose = goal, mend, anchor, dose
        self.alternatives = (alternative,) if isinstance(alternative, str) else alternative
        self.genes = (genes,) if isinstance(genes, str) else genes
        self.vocabulary, self.settings = vocabulary, settings

    def states(self, rows: Rows, run: Run) -> list[str]:
        """Goal and alternatives; one empty name without states."""
        if not run.has_states:
            if self.goal is not None or self.alternatives:
                raise InputError(f"{rows.where} has no states; leave goal and alternative out")
            return [""]
        known = rows.states or run.states
        roles = rows.roles
        goal = self.goal or roles.get("goal") or known[min(1, len(known) - 1)]
        start = roles["start"] if roles else known[0] if len(known) > 1 else None
        others = self.alternatives
        if others is None:
            others = [name for name in known if name not in (goal, start)]
        states = [goal, *others]
        for state in states:
            run.towards(state)
        if len(set(states)) < len(states):
            raise UnsupportedError(f"a state is named twice: {', '.join(states)}; goal and alternative must differ")
        return states

    def token(self, rows: Rows) -> int | None:
        """The token of the anchor."""
        if self.anchor is None:
            return None
        return self.tokens(rows.read(dose=self.dose), rows.where, [self.anchor])[self.anchor]

    def tokens(self, run: Run, where: str, genes: Sequence[str]) -> dict[str, int]:
        """Tokens of genes."""
        found = Names(run, self.vocabulary).tokens_of(genes)
        if absent := [gene for gene in genes if gene not in found]:
            advice = "" if self.vocabulary is not None else "; symbols need a dictionary (--dictionary)"
            raise VocabularyError(f"{where}: there is no gene {absent[0]!r} in it{advice}")
        return found


def _statistics(
    rows: Rows, mode: str | None, asked: _Asked, null_rows: Rows | None, single_rows: Rows | None, bar: Progress
) -> tuple[Statistics, Run]:
    """All of one run."""
    settings = asked.settings
    obs = () if settings.group is None else (settings.group,)
    if mode == "mixture_model":
        check_mixture()
    of_anchor = asked.token(rows) if mode in ("mixture_model", "aggregate_gene_shifts") else None
    anchor = of_anchor if mode == "mixture_model" else None
    run = rows.read(obs=obs, anchor=anchor, dose=asked.dose)
    control = None if null_rows is None else null_rows.read(dose=asked.dose)
    if mode is None:
        mode = _mode_of(run, control)
        check_mended(mode, asked.mend if asked.mend != tuple(FAULTS) else "all")
    bar.update(1)
    _warn(run, rows, settings)
    names = Names(run, asked.vocabulary)
    states = asked.states(rows, run)
    run = run if asked.genes is None else _of_genes(run, asked.tokens(run, rows.where, asked.genes))
    table = _table(mode, run, control, names, states, asked.mend, of_anchor)
    made = effects(run, names, settings, states, control=control, n_cells=rows.n_cells)
    if rows.noise is not None:
        size = made["mean"].abs() if run.has_states else 1 - made["mean"]
        made["is_above_noise"] = size > rows.noise
    singles = None if single_rows is None else single_rows.read(dose=asked.dose)
    alone = {edit[0] for edit in run.edits if len(edit) == 1}
    has_pairs = any(len(edit) == 2 and alone.issuperset(edit) for edit in run.edits)
    is_asked = singles is not None or has_pairs
    interactions = epistasis(run, names, settings, states[0], singles) if is_asked else None
    bar.update(1)
    about = _about(rows, mode, states, asked, made, run)
    return Statistics(mode, table, made, interactions=interactions, about=about), run


def _mode_of(run: Run, control: Run | None) -> str:
    if run.has_states:
        return "goal_state_shift"
    if control is not None:
        return "vs_null"
    if len(run.moments.keys):
        return "aggregate_gene_shifts"
    n_edits = int((run.only.counts > 0).sum())
    return "mixture_model" if n_edits > 1 else "aggregate_data"


def _table(
    mode: str, run: Run, control: Run | None, names: Names, states: Sequence[str], mend: Sequence[str],
    anchor: int | None,
) -> pandas.DataFrame:  # fmt: skip
    """The official table."""
    if mode == "goal_state_shift":
        if not run.has_states:
            raise InputError(
                "goal_state_shift is about shifts towards states, and the run has none; perturb with states"
            )
        if len(run.edits) == 1:
            return goal_state_shift_of_list(run, states[0], states[1:])
        return goal_state_shift(run, names, states[0], states[1:], mend=mend)
    if mode == "vs_null":
        assert control is not None
        return versus_null(run, control, names, mend=mend)
    if mode == "mixture_model":
        return mixture_model(run, names, mend=mend)
    return aggregate_data(run, names) if mode == "aggregate_data" else aggregate_gene_shifts(run, names, anchor)


def _of_genes(run: Run, tokens: dict[str, int]) -> Run:
    """The edits of these genes alone."""
    wanted = set(tokens.values())
    at = np.array([number for number, edit in enumerate(run.edits) if wanted.issuperset(edit)], dtype=np.int64)
    if not len(at):
        raise InputError(f"none of {', '.join(tokens)} was perturbed without other genes in this run")
    new = np.full(len(run.edits), -1, dtype=np.int64)
    new[at] = np.arange(len(at))
    return replace(
        run, edits=[run.edits[i] for i in at], genes=[run.genes[i] for i in at], rank=run.rank[at],
        values={state: _taken(values, at) for state, values in run.values.items()}, moments=run.moments.taken(new),
    )  # fmt: skip


def _taken(values: Values, at: np.ndarray) -> Values:
    counts = values.counts[at]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(values.starts[at] - starts[:-1], counts) + np.arange(starts[-1])
    return Values(values.values[rows], values.cells[rows], starts)


def _warn(run: Run, rows: Rows, settings: Settings) -> None:
    if run.n_missing:
        warnings.warn(
            f"{rows.where}: {run.n_missing:,} values are NaN (a cell of which nothing is left has none); they are left "
            "out",
            stacklevel=2,
        )
    if settings.group is not None:
        group, n_groups = groups_of(run, settings.group)
        if n_groups < 2:
            warnings.warn(
                f"{rows.where}: all cells have one value of {settings.group!r}, so that cells are the unit; intervals "
                "over cells say nothing of other donors",
                stacklevel=2,
            )
        elif (group < 0).any():
            warnings.warn(
                f"{rows.where}: {int((group < 0).sum()):,} cells have no {settings.group!r} and are left out of means",
                stacklevel=2,
            )


def _compare(found: Statistics, others: dict[str, Rows], asked: _Asked, bar: Progress) -> None:
    """Put beside it what other runs say."""
    tables = {}
    state = found.about["states"][0] if found.about["states"] else ""
    for name, rows in others.items():
        run = rows.read(dose=asked.dose)
        settings = replace(asked.settings, group=None)
        tables[name] = effects(
            run, Names(run, asked.vocabulary), settings, asked.states(rows, run), n_cells=rows.n_cells
        )
        bar.update(1)
    found.agreement = sign_agreement({found.about["run"]: found.effects, **tables}, state)
    found.effects = agreeing(found.effects, tables, state)


def _about(
    rows: Rows, mode: str, states: Sequence[str], asked: _Asked, made: pandas.DataFrame, run: Run
) -> dict[str, Any]:
    settings = asked.settings
    _, n_groups = groups_of(run, settings.group)
    first = made if "state" not in made else made[made["state"] == states[0]]
    n_tested = int(first["p_value"].notna().sum())
    versions = {"geneformer_fast": __version__, "numpy": np.__version__, "pyarrow": pa.__version__}
    return {
        "format": "geneformer-fast statistics",
        "run": rows.where,
        "mode": mode,
        "states": [state for state in states if state],
        "genes": len(first),
        "cells": rows.n_cells or len(run.cells),
        "tested": n_tested,
        "matched": made.attrs.get("matched", 0),
        "significant": int((first["q_value"] < settings.fdr).sum()),
        "universal": int(first["is_universal"].sum()),
        "missing": run.n_missing,
        "noise": rows.noise,
        "group": settings.group,
        "n_groups": n_groups if n_groups > 1 else 0,
        "min_cells": settings.min_cells,
        "draws": settings.draws,
        "confidence": settings.confidence,
        "fdr": settings.fdr,
        "correction": settings.correction,
        "seed": settings.seed,
        "mend": list(asked.mend),
        "dose": asked.dose,
        "plan": rows.plan,
        "versions": versions,
    }
