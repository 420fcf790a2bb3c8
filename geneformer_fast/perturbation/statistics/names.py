"""What tokens are called in tables: gene ids and symbols, where anybody knows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from geneformer_fast.perturbation.statistics.columns import Edit, Run
from geneformer_fast.tokenization.vocabulary import Vocabulary


class Names:
    """Gene ids and symbols of tokens.

    Parameters
    ----------
    run
        Whose rows name the genes that were perturbed.
    vocabulary
        Names all genes, and their symbols; None leaves what the run does not say empty.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary | None = None) -> None:
        self._ids: dict[int, str] = {}
        self._sets = run.sets
        for edit, genes in zip(run.edits, run.genes, strict=True):
            self._ids.update({token: gene for token, gene in zip(edit, genes, strict=True) if gene})
        self._symbols: dict[str, str] = {}
        if vocabulary is not None:
            self._ids |= {token: gene for gene, token in vocabulary.token_ids.items()}
            self._symbols = {gene: symbol for symbol, gene in vocabulary.symbols.items()}

    def gene(self, token: int) -> str | float:
        """The gene id of a token; NaN where nobody knows it."""
        return self._ids.get(token, np.nan)

    def symbol(self, token: int) -> str | float:
        """The symbol of a token; NaN where nobody knows it."""
        gene = self._ids.get(token)
        return np.nan if gene is None else self._symbols.get(gene, np.nan)

    def ids(self, edit: Edit) -> str | None:
        """The gene ids of an edit, joined by ``+``; None where one is not known."""
        genes = [self._ids.get(token) for token in edit]
        return None if None in genes else "+".join(map(str, genes))

    def shown(self, edit: Edit) -> str:
        """An edit for people: its name, or symbols, or what else there is, joined by ``+``."""
        return self._sets.get(edit) or "+".join(self._shown(token) for token in edit)

    def tokens_of(self, genes: Iterable[str]) -> dict[str, int]:
        """Tokens by gene id or symbol, of those that are known."""
        tokens = {gene: token for token, gene in self._ids.items()}
        tokens |= {symbol: tokens[gene] for gene, symbol in self._symbols.items() if gene in tokens}
        return {gene: tokens[gene] for gene in genes if gene in tokens}

    def _shown(self, token: int) -> str:
        for name in (self.symbol(token), self.gene(token)):
            if isinstance(name, str):
                return name
        return f"token {token}"


def columns_of(edits: Iterable[Edit], names: Names) -> dict[str, list[Any]]:
    """The columns ``Gene``, ``Gene_name`` and ``Ensembl_ID`` as the official tables have them; tuples for several."""
    found: dict[str, list[Any]] = {"Gene": [], "Gene_name": [], "Ensembl_ID": []}
    for edit in edits:
        if len(edit) == 1:
            of_edit: tuple[Any, Any, Any] = (edit[0], names.symbol(edit[0]), names.gene(edit[0]))
        else:
            of_edit = (edit, tuple(map(names.symbol, edit)), tuple(map(names.gene, edit)))
        for column, value in zip(found.values(), of_edit, strict=True):
            column.append(value)
    return found
