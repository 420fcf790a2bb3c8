"""What a caller asks for, made ready: edits in tokens, what is compared, which cells, and how much it will be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast import families
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.values import preparation_in
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.run import find_vocabulary
from geneformer_fast.perturbation.compare import Comparison, Framing
from geneformer_fast.perturbation.counts import CellCounts, CountEdits
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.engine import PerturbationRun
from geneformer_fast.perturbation.genes import Gene, Names
from geneformer_fast.perturbation.kinds import COUNTS, MODES, check_screen
from geneformer_fast.perturbation.plan import Plan, plan_of
from geneformer_fast.perturbation.screen import GradientScreen
from geneformer_fast.perturbation.screened import Screened, screened_genes, screened_pairs
from geneformer_fast.perturbation.selection import chosen_cells
from geneformer_fast.perturbation.sets import read_sets, tokens_of_sets
from geneformer_fast.perturbation.shards import Shard
from geneformer_fast.perturbation.states import MAX_CELLS, StateRoles, States, embeddings_of, read_states
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.values import ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary
from geneformer_fast.training.distributed import Ranks

#: A file of states, embeddings by name, or what was read or made before.
Embeddings = States | Mapping[str, Any] | str | os.PathLike[str]
#: Genes that a screen leaves to be computed, where nobody says how many.
BEST = 100


@dataclass(frozen=True)
class Question:
    """What is asked, as :func:`geneformer_fast.perturb` takes it."""

    kind: str
    genes: str | Gene | Sequence[Gene]
    together: bool
    pairs: bool
    anchor: Gene | None
    sets: str | os.PathLike[str] | Mapping[str, Sequence[Gene]] | Sequence[Sequence[Gene]] | None
    doses: float | Sequence[float] | None
    mode: str | None
    layer: str | int
    states: Mapping[str, Any] | None
    state_embeddings: Embeddings | None
    where: Mapping[str, Any] | None
    max_cells: int | None
    seed: int | None
    window: tuple[int | None, int | None] | None
    official: bool
    counts: Any = None
    screen: str | None = None
    best: int | None = None

    def check(self) -> StateRoles | None:
        """Refuse at once what can be seen to be wrong without a model; the states that are asked for."""
        if self.mode is not None and self.mode not in MODES:
            raise UnsupportedError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.states is None and self.state_embeddings is not None:
            raise UnsupportedError("state_embeddings are of states: say which with states")
        check_screen(self.screen, self.best, self.kind, self.genes, together=self.together, sets=self.sets)
        if self.counts is not None and self.kind != COUNTS:
            raise UnsupportedError(f"counts (--counts) are of kind 'counts'; kind {self.kind!r} needs none")
        if self.seed is not None and self.max_cells is None:
            raise UnsupportedError("seed (--seed) is of the draw of cells: say how many with max_cells (--max-cells)")
        return None if self.states is None else StateRoles.of(self.states)


@dataclass(frozen=True)
class Prepared:
    """A run that can begin.

    Attributes
    ----------
    run, plan
        The pass over the variants, and what it will be: of one part of the cells.
    ranks
        [n] ascending: which of all chosen cells these are.
    n_cells
        How many are chosen in all parts together.
    names
        Genes by name.
    states
        Embeddings of states; None without.
    sets
        Names of the sets that are perturbed; empty without any, or where they have none.
    screened
        What a screen said of the genes that are perturbed; None without one.
    """

    run: PerturbationRun
    plan: Plan
    ranks: np.ndarray
    n_cells: int
    names: Names
    states: States | None
    sets: tuple[str, ...] = ()
    screened: dict[str, Any] | None = None


def prepared(
    question: Question,
    folder: TokenFolder,
    encoder: Encoder,
    model: Encoder | str | os.PathLike[str],
    dictionary: str | os.PathLike[str] | Vocabulary | None,
    shard: Shard,
    processes: Ranks,
    *,
    token_budget: int | None,
    workers: int | None,
    progress: bool | None,
) -> Prepared:
    """A question about one part of the cells of a folder, for an encoder.

    Raises
    ------
    GeneformerFastError
        It cannot be answered; says why.
    """
    roles, config = question.check(), encoder.config
    families.refuse(config, "perturb")
    if config.inputs != "tokens":
        raise UnsupportedError("this encoder reads values, not ranked tokens; perturb() serves encoders over tokens")
    config.layer_index(question.layer)
    identity = identity_of(folder, config)
    if preparation_in(folder) is not None:
        raise UnsupportedError(
            f"genes are perturbed where they are ranked, and {folder.path} holds values of {identity['family']}; "
            "change counts, and embed them with the others"
        )
    vocabulary = find_vocabulary(dictionary, model, config)
    assert not isinstance(vocabulary, ValueGenes)  # which no folder of ranks lets through
    if vocabulary is not None:
        config.check_vocabulary(vocabulary.identity())
    special = identity["special"]
    framing = Framing(int("cls" in special), int("eos" in special))
    mode = _mode(question.mode, "cls" in special)
    names = Names(vocabulary, list(special.values()), config.vocab_size)
    sets = _named_sets(question.sets, names)
    edits = _edits(question, names, framing, config.max_len, roles, sets)
    chosen = chosen_cells(
        folder, edits, where=question.where, max_cells=question.max_cells, seed=question.seed, window=question.window,
        state=None if roles is None or roles.start is None else (roles.column, roles.start), n_tokens=config.vocab_size,
    )  # fmt: skip
    states = None if roles is None else _states(question, roles, folder, encoder, mode, token_budget, progress)
    embeddings = None if states is None else torch.from_numpy(states.embeddings).to(encoder.device)
    comparison = Comparison(mode, framing, embeddings)
    screened = None
    if question.screen is not None:
        screen = GradientScreen(encoder, edits.kind, mode.partition("_")[0], question.layer, framing, embeddings)
        goal = 0 if roles is None or roles.goal is None else roles.names.index(str(roles.goal))
        found = None
        if processes.is_first:
            found = _screened(screen, edits, folder, chosen.cells, goal, question.best or BEST, progress)
        edits = _best_of(edits, found, question.best or BEST, processes, encoder.device)
        screened = None if found is None else found.to_dict(question.best or BEST)
    plan = plan_of(
        folder, chosen, edits, n_states=0 if states is None else len(states.names), has_gene_values=comparison.has_genes
    )
    ranks = shard.ranks(len(chosen))
    if not len(ranks):
        raise UnsupportedError(f"shard {shard} has no cell: there are {len(chosen):,}")
    part = plan.of_ranks(ranks)
    if edits.kind == COUNTS:
        if vocabulary is None:
            raise UnsupportedError(
                "kind 'counts' ranks cells again, which needs their gene dictionary: pass dictionary= (--dictionary), "
                "the folder with the model's token and median dictionaries"
            )
        counts = CellCounts.read(folder, part.chosen.cells, vocabulary, question.counts, of_run=chosen.cells)
        edits = CountEdits.of(edits, counts)
    run = PerturbationRun(
        encoder, edits, comparison, question.layer, part.chosen.lengths,
        lambda some: folder.read(part.chosen.cells[some]),
        token_budget=token_budget, workers=workers, progress=progress, is_official=question.official,
    )  # fmt: skip
    return Prepared(run, part, ranks, len(chosen), names, states, tuple(sets) if sets is not None else (), screened)


def _screened(
    screen: GradientScreen,
    edits: Edits,
    folder: TokenFolder,
    cells: np.ndarray,
    goal: int,
    best: int,
    progress: bool | None,
) -> Screened:
    """Genes, or pairs of them, by their estimated effects."""
    if not edits.pairs and edits.anchor is None:
        return screened_genes(screen, folder, cells, goal=goal, progress=progress)
    return screened_pairs(screen, folder, cells, goal=goal, best=best, anchor=edits.anchor, progress=progress)


def _best_of(edits: Edits, found: Screened | None, best: int, processes: Ranks, device: torch.device) -> Edits:
    """The edits with the largest estimated effects, in all processes those that the first one found."""
    given = None if found is None else torch.from_numpy(np.ascontiguousarray(found.tokens[:best]))
    tokens = processes.whole_numbers_of_first(given, device).tolist()
    if not edits.pairs and edits.anchor is None:
        return replace(edits, genes=tuple(gene for (gene,) in tokens), is_present=True)
    return replace(edits, chosen=tuple(map(tuple, tokens)), is_present=True)


def _mode(mode: str | None, has_cls: bool) -> str:
    if mode is None:
        return "cls" if has_cls else "cell"
    if mode.startswith("cls") and not has_cls:
        raise UnsupportedError(
            f"mode {mode!r} compares CLS tokens, which this vocabulary lacks; use {mode.replace('cls', 'cell')!r}"
        )
    return mode


def _named_sets(sets: Any, names: Names) -> dict[str, tuple[int, ...]] | None:
    """Sets of a file, or given by name, in tokens; None where there are none, or they have no names."""
    if isinstance(sets, str | os.PathLike):
        sets = read_sets(sets)
    return tokens_of_sets(sets, names.find) if isinstance(sets, Mapping) else None


def _edits(
    question: Question,
    names: Names,
    framing: Framing,
    max_len: int,
    roles: StateRoles | None,
    named: Mapping[str, tuple[int, ...]] | None,
) -> Edits:
    """The edits, in tokens."""
    genes = question.genes
    is_all = isinstance(genes, str) and genes == "all"
    if question.sets is not None and not is_all:
        raise UnsupportedError("sets (--sets) are lists of genes of their own: leave genes (--genes) out")
    sets: tuple[tuple[int, ...], ...] | None = None
    if named is not None:
        sets = tuple(named.values())
    elif question.sets is not None:
        sets = tuple(names.tokens(each) for each in question.sets)  # type: ignore[union-attr]
    listed = None if is_all else names.tokens([genes] if isinstance(genes, str | int | np.integer) else genes)
    anchor = None if question.anchor is None else names.token(question.anchor)
    if question.official and roles is not None:
        anchor = None  # which is what the official tool does: single perturbations
    doses = question.doses
    # Of numpy too: its float32 is no float.
    shares = () if doses is None else (doses,) if isinstance(doses, float | int | np.number) else tuple(doses)
    return Edits(
        question.kind, listed, together=question.together, pairs=question.pairs, anchor=anchor,
        sets=sets, doses=tuple(map(float, shares)),
        front=framing.n_front, back=framing.n_back, max_len=max_len,
    )  # fmt: skip


def _states(
    question: Question,
    roles: StateRoles,
    folder: TokenFolder,
    encoder: Encoder,
    mode: str,
    token_budget: int | None,
    progress: bool | None,
) -> States:
    """Embeddings of the states that are asked for: given, or made of the same tokens."""
    pool, given = "cls" if mode.startswith("cls") else "mean", question.state_embeddings
    if given is None:
        return embeddings_of(
            encoder, folder.path, roles.column, roles.names, layer=question.layer, pool=pool, statistic="mean",
            where=question.where, max_cells=MAX_CELLS, seed=42, token_budget=token_budget, progress=progress,
        )  # fmt: skip
    if isinstance(given, Mapping):
        try:
            rows = [np.asarray(torch.as_tensor(row).detach().float().cpu()).reshape(-1) for row in given.values()]
        except (TypeError, ValueError, RuntimeError):
            raise UnsupportedError("state_embeddings by name must be vectors of numbers") from None
        if len({len(row) for row in rows}) != 1:
            raise UnsupportedError("state_embeddings must have one width: a vector for each state")
        given = States(tuple(map(str, given)), np.stack(rows))
    elif not isinstance(given, States):
        given = read_states(Path(given))
    found = given.of(roles.names)
    found.check(encoder, question.layer, pool)
    return found
