"""Fine-tuning on classes of genes, with folds of genes: no gene is ever in two of training, evaluation and test."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast.arguments import checked
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.selection import Selection
from geneformer_fast.data.values import preparation_in
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.extract.run import find_vocabulary
from geneformer_fast.finetuning import scores as scoring
from geneformer_fast.finetuning.cells import content_of, digest, origin_of, source_of
from geneformer_fast.finetuning.engine import Choices, Engine, Tested, check_ready, check_splits
from geneformer_fast.finetuning.labels import read_gene_classes
from geneformer_fast.finetuning.losses import IGNORED, logit_scale, make_loss
from geneformer_fast.finetuning.models import pretrained
from geneformer_fast.finetuning.names import check_names
from geneformer_fast.finetuning.objectives import GeneObjective
from geneformer_fast.finetuning.outputs import Finetuned, out_folder
from geneformer_fast.finetuning.predictions import ClassifyingRun, some_cells, task_columns
from geneformer_fast.finetuning.recipes import GENES, with_progress
from geneformer_fast.finetuning.search import Search
from geneformer_fast.finetuning.splits import Split, hold_out, numbers_of, share_for_testing
from geneformer_fast.finetuning.splits import folds as make_folds
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.values import ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary
from geneformer_fast.training.identity import SELECTION
from geneformer_fast.training.loop import Objective
from geneformer_fast.training.profiled import checked_place
from geneformer_fast.training.recipe import Recipe

TASK = "gene_class"
_SHOWN = 5  # gene ids in a message
_CELLS_AT_ONCE = 1024


@checked
def finetune_genes(
    tokens: str | os.PathLike[str],
    model: Encoder | str | os.PathLike[str],
    classes: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    folds: int = 5,
    eval_share: float = 0.0,
    test_share: float | None = None,
    loss: str = "cross-entropy",
    freeze_layers: int = 0,
    freeze_embeddings: bool = False,
    lora: int | None = None,
    where: Mapping[str, Any] | None = None,
    max_cells: int | None = None,
    seed: int | None = None,
    drop_unknown: bool = False,
    recipe: Recipe | None = None,
    search: Search | int | None = None,
    is_final: bool = True,
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] | None = None,
    profile: str | os.PathLike[str] | bool = False,
    progress: bool | None = None,
) -> Finetuned:
    """Fine-tune a pretrained encoder to tell classes of genes, as their context in cells shows them.

    Parameters
    ----------
    tokens
        Token folder; every cell with a labelled gene is learned from.
    model
        Checkpoint folder, or an encoder; it stays as it is.
    classes
        Gene id -> class: a ``.json``, ``.csv`` or ``.tsv`` file (:func:`~.labels.read_gene_classes`), or a mapping.
    out
        Folder for scores, predictions, pictures and the model.
    dictionary
        What the gene ids mean: a folder of dictionaries or a :class:`Vocabulary`. None looks for ``vocabulary.json``
        in the model's folder.
    folds
        0: one division of the genes into training, evaluation and test. 2 or more: cross-validation over genes, after
        which the final model learns from all of them but an evaluation share.
    eval_share, test_share
        Of all genes (with folds: of those outside the test set); 0 for none. A ``test_share`` of None is 0.2; with
        folds there is none to choose. There are few genes as a rule, so that by default none is spared for choosing
        the best epoch.
    loss
        As in :func:`finetune_cells`; classes are counted in genes.
    freeze_layers, freeze_embeddings, lora
        As in :func:`finetune_cells`.
    where
        Cells to learn from and to test with, as in :func:`finetune_cells`.
    max_cells, seed
        Most cells, drawn from those that hold a labelled gene; a seed of None is that of the recipe.
    drop_unknown
        Whether genes that the vocabulary does not know, or no cell expresses, may be left out.
    recipe
        How to train; None is :data:`~geneformer_fast.finetuning.recipes.GENES`.
    search, is_final, device, resume, overwrite, tell, profile, progress
        As in :func:`finetune_cells`.

    Returns
    -------
    Finetuned
        Scores count genes, each by the mean of its probabilities over cells; ``folds[..]["occurrences"]`` counts every
        gene in every cell, as Geneformer's classifier does.

    Raises
    ------
    InputError
        The classes cannot be read, or genes are unknown, in two classes, or too few.
    VocabularyError, OutputError, TrainingError, UnsupportedError
        As in :func:`finetune_cells`.
    """
    wanted = check_ready(search)
    profile = checked_place(profile, Path(out), is_resuming=resume, is_replacing=overwrite)
    test_share = share_for_testing(test_share, folds, 0.2)
    recipe = with_progress(recipe or GENES, progress)
    selection = Selection.of(where, max_cells, seed, default_seed=recipe.seed)
    class_of = read_gene_classes(classes)
    with open_tokens(tokens) as folder, open_tokens(tokens) as again:
        base = pretrained(model, device)
        identity = identity_of(folder, base.config)
        if preparation_in(folder) is not None:
            raise UnsupportedError(
                f"classes of genes are told from ranked tokens, and {identity['family']} reads values; take a model "
                "over ranked tokens, or embed genes (pool 'gene') and classify these"
            )
        vocabulary = find_vocabulary(dictionary, model, base.config)
        assert not isinstance(vocabulary, ValueGenes)  # which no folder of ranks lets through
        if vocabulary is None:
            raise InputError(
                "gene ids need the dictionary that made the tokens: pass dictionary= (--dictionary), the folder with "
                f"{base.config.vocabulary or 'the model'}'s gene dictionaries"
            )
        base.config.check_vocabulary(vocabulary.identity())
        chosen = None if selection is None else selection.matching(folder)
        labelled = labelled_genes(class_of, vocabulary, folder, drop_unknown, chosen)
        cells = _cells_with(folder, labelled, chosen)
        cells = cells if selection is None else selection.drawn(cells)
        work = GeneWork(folder, again, identity, labelled, cells, loss, base.config.vocab_size, recipe.progress)
        splits, final = work.splits(folds, eval_share, test_share, recipe.seed)
        final = final if is_final else None
        choices = Choices(recipe, freeze_layers, freeze_embeddings, wanted, lora)
        every = [*splits, *([] if final is None else [final])]
        check_names({TASK: labelled.classes})
        check_splits(work, base, choices, every)
        asked = {
            "kind": "genes", "loss": loss, "folds": folds, "eval_share": eval_share, "test_share": test_share,
            "freeze_layers": freeze_layers, "freeze_embeddings": freeze_embeddings, "lora": lora,
            "recipe": recipe.to_dict(),
            "is_searching": search is not None, "classes": labelled.classes, "config": base.config.to_dict(),
            SELECTION: None if selection is None else selection.to_dict(),
            "data": digest(labelled.tokens, labelled.codes, cells, folder.lengths()),
            **content_of(folder, base, wanted, every),
        }  # fmt: skip
        origin = origin_of(model, identity, {TASK: loss}, selection)
        with out_folder(Path(out), asked, resume=resume, overwrite=overwrite) as place:
            engine = Engine(work, base, choices, place, origin, source_of(model), profile)
            return engine.run(splits, final, "genes", tell)


@dataclass(frozen=True)
class LabelledGenes:
    """Genes with a class.

    Attributes
    ----------
    tokens, genes, codes
        [G] token ids, ascending; ids; classes.
    classes
        [K] names, sorted.
    n_cells
        [G] cells that hold the gene.
    """

    tokens: np.ndarray
    genes: list[str]
    codes: np.ndarray
    classes: list[str]
    n_cells: np.ndarray


def labelled_genes(
    class_of: Mapping[str, str],
    vocabulary: Vocabulary,
    folder: TokenFolder,
    drop_unknown: bool,
    chosen: np.ndarray | None = None,
) -> LabelledGenes:
    """Classes by token, for the genes that the vocabulary knows and some cell expresses, or some of those chosen.

    Raises
    ------
    InputError
        Genes are unknown or never expressed and may not be left out; two ids of one gene differ in class; nothing is
        left.
    """
    ids = list(class_of)
    # what is unknown is said below
    found = map_genes(ids, vocabulary, source_name="classes", allow_few_genes=True).column_to_token
    n_cells = np.zeros(vocabulary.n_tokens, dtype=np.int64)
    for values, _ in folder.batches(_groups_of(folder, chosen)):
        if len(values) and int(values.max()) >= len(n_cells):
            raise VocabularyError(
                f"{folder.path} holds token {values.max()}, but {vocabulary.name} ends at {len(n_cells) - 1}; tokenize "
                "again with the dictionary that belongs to the model"
            )
        n_cells += np.bincount(values.astype(np.int64), minlength=len(n_cells))
    unknown = [gene for gene, token in zip(ids, found, strict=True) if token < 0]
    unseen = [gene for gene, token in zip(ids, found, strict=True) if token >= 0 and not n_cells[token]]
    if (unknown or unseen) and not drop_unknown:
        said = []
        if unknown:
            said.append(f"{len(unknown)} are not in {vocabulary.name} ({_some(unknown)})")
        if unseen:
            which = "" if chosen is None else "selected "
            said.append(f"{len(unseen)} are expressed in no {which}cell of {folder.path} ({_some(unseen)})")
        raise InputError(
            f"of {len(ids)} genes with a class {' and '.join(said)}; leave them out with --drop-unknown "
            "(drop_unknown=True), or correct their ids"
        )
    by_token: dict[int, str] = {}
    for gene, token in zip(ids, found.tolist(), strict=True):
        if token < 0 or not n_cells[token]:
            continue
        if by_token.get(token, class_of[gene]) != class_of[gene]:
            raise InputError(f"{gene} is another id of a gene with the class {by_token[token]!r}; give it one class")
        by_token[token] = class_of[gene]
    if not by_token:
        raise InputError(f"none of the {len(ids)} genes with a class is expressed in {folder.path}")
    tokens = np.array(sorted(by_token), dtype=np.int64)
    classes = sorted(set(by_token.values()))
    gene_of = {token: gene for gene, token in vocabulary.token_ids.items()}
    codes = np.array([classes.index(by_token[token]) for token in tokens.tolist()], dtype=np.int64)
    return LabelledGenes(tokens, [gene_of[token] for token in tokens.tolist()], codes, classes, n_cells[tokens])


class GeneWork:
    """Classes of genes, see :class:`~geneformer_fast.finetuning.engine.Work`; splits number the labelled genes."""

    kind = "genes"

    def __init__(
        self,
        tokens: TokenFolder,
        eval_tokens: TokenFolder,
        identity: Mapping[str, Any],
        labelled: LabelledGenes,
        cells: np.ndarray,
        loss: str,
        vocab_size: int,
        progress: bool | None = False,
    ) -> None:
        self.tokens, self.eval_tokens, self.identity = tokens, eval_tokens, identity
        self.labelled, self.cells, self.loss, self.vocab_size = labelled, cells, loss, vocab_size
        self.progress = progress
        self.classes = {TASK: labelled.classes}

    def splits(self, n_folds: int, eval_share: float, test_share: float, seed: int) -> tuple[list[Split], Split | None]:
        """Genes of every fold, and of the final model after several."""
        codes, classes = self.labelled.codes, self.labelled.classes
        shares: dict[str, Any] = {"eval_share": eval_share, "seed": seed, "of": "genes"}
        if not n_folds:
            return [hold_out(codes, classes, test_share=test_share, **shares)], None
        return make_folds(codes, classes, n_folds, **shares), hold_out(codes, classes, test_share=0, **shares)

    def numbers(self, split: Split) -> dict[str, dict[str, Any]]:
        """Genes and classes of every part."""
        return numbers_of(split, self.labelled.codes, self.labelled.classes, of="genes")

    def objective(self, split: Split) -> tuple[Objective, np.ndarray]:
        """The loss from the class counts of the training genes."""
        counts = np.bincount(self.labelled.codes[split.train], minlength=len(self.labelled.classes))
        loss = make_loss(self.loss, counts)
        factors = np.full(len(counts), logit_scale(loss))
        return GeneObjective(self._by_token(split.train), self._by_token(split.eval), loss), factors

    def training(self, split: Split) -> dict[str, Any]:
        """Arguments of ``fit``: training and evaluation see the same cells, and ask for other genes in them."""
        nothing = np.zeros(0, dtype=np.int64)
        return {
            "train_cells": self.cells,
            "eval_cells": self.cells if len(split.eval) else nothing,
            "eval_tokens": self.eval_tokens,
        }

    def test(self, encoder: Encoder, split: Split, fold: int) -> Tested:
        """Predictions of the test genes."""
        cells = some_cells(self.tokens, self.cells, self.identity)
        run = ClassifyingRun(encoder, cells, None, self.progress)
        means, truth, occurrences = run.gene_occurrences(self._by_token(split.test))
        tokens, probabilities, n_cells = means.result()
        at = np.searchsorted(self.labelled.tokens, tokens)
        codes = self.labelled.codes[at]
        columns = {
            "gene": pa.array([self.labelled.genes[place] for place in at], pa.string()),
            "token": pa.array(tokens, pa.int64()),
            "n_cells": pa.array(n_cells, pa.int64()),
            "fold": pa.array(np.full(len(tokens), fold), pa.int64()),
            **task_columns(TASK, self.labelled.classes, probabilities, codes),
        }
        extra = {"occurrences": scoring.score(truth, occurrences, self.labelled.classes)} if len(truth) else {}
        return Tested(pa.table(columns), {TASK: (codes, probabilities)} if len(codes) else {}, extra)

    def _by_token(self, genes: np.ndarray) -> np.ndarray:
        """[V] the class of every token among some genes, -100 elsewhere."""
        codes = np.full(self.vocab_size, IGNORED, dtype=np.int64)
        codes[self.labelled.tokens[genes]] = self.labelled.codes[genes]
        return codes


def _cells_with(folder: TokenFolder, labelled: LabelledGenes, chosen: np.ndarray | None) -> np.ndarray:
    """Those of the chosen cells (None: of all) that hold a labelled gene."""
    found = []
    for cells in _groups_of(folder, chosen):
        values, cu_seqlens = folder.read(cells)
        is_labelled = np.isin(values, labelled.tokens)
        counts = np.add.reduceat(np.append(is_labelled, False), cu_seqlens[:-1]) * (np.diff(cu_seqlens) > 0)
        found.append(cells[np.flatnonzero(counts)])
    return np.concatenate(found)


def _groups_of(folder: TokenFolder, chosen: np.ndarray | None) -> list[np.ndarray]:
    """The chosen cells, so many at a time."""
    cells = np.arange(folder.n_cells) if chosen is None else chosen
    return [cells[start : start + _CELLS_AT_ONCE] for start in range(0, len(cells), _CELLS_AT_ONCE)]


def _some(genes: list[str]) -> str:
    return ", ".join(genes[:_SHOWN]) + (" ..." if len(genes) > _SHOWN else "")
