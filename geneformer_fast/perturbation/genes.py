"""Genes that are asked for, by name or by token, as tokens; and tokens as Ensembl ids."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.vocabulary import Vocabulary

Gene = str | int


class Names:
    """Tokens of genes by whatever they are called.

    Parameters
    ----------
    vocabulary
        Whose names are understood: ids, retired ids and symbols; None understands tokens only.
    special
        Tokens that are no genes.
    n_tokens
        Tokens of the model's table.
    """

    def __init__(self, vocabulary: Vocabulary | None, special: Sequence[int], n_tokens: int) -> None:
        self._vocabulary, self._special, self._n_tokens = vocabulary, frozenset(special), n_tokens
        symbols = {} if vocabulary is None else vocabulary.symbols
        self._symbols = {symbol.upper(): gene for symbol, gene in symbols.items()}

    def find(self, gene: Gene) -> int | None:
        """The token of one gene; None where a name has none."""
        if isinstance(gene, numbers.Integral) or (isinstance(gene, str) and gene.isascii() and gene.isdigit()):
            return self._checked(int(gene))
        if self._vocabulary is None:
            raise UnsupportedError(
                f"gene {gene!r} is a name, and names need a gene dictionary: pass dictionary= (--dictionary), the "
                "folder with the model's token dictionary, or give its token"
            )
        try:
            found = map_genes([gene], self._vocabulary, source_name="genes", allow_few_genes=True)
        except InputError:  # no such id, and there is no other gene; V1's mapping has no symbols
            return self._vocabulary.token_ids.get(self._symbols.get(str(gene).upper(), ""))
        return int(found.token_ids[int(found.column_to_gene[0])])

    def token(self, gene: Gene) -> int:
        """The token of one gene.

        Raises
        ------
        VocabularyError
            It has none.
        UnsupportedError
            It is a name, and there is no dictionary.
        """
        token = self.find(gene)
        if token is None:
            assert self._vocabulary is not None
            raise VocabularyError(
                f"gene {gene!r} has no token in {self._vocabulary.name}, so no cell shows it to the model; leave it "
                "out, or check how it is written (Ensembl ids and symbols are understood)"
            )
        return token

    def tokens(self, genes: Sequence[Gene]) -> tuple[int, ...]:
        """Those of several genes, in their order.

        Raises
        ------
        UnsupportedError
            There are none, or two are the same gene.
        """
        if not len(genes):
            raise UnsupportedError("genes (--genes) must name a gene")
        found: dict[int, Gene] = {}
        for gene in genes:
            token = self.token(gene)
            if token in found:
                same = "" if found[token] == gene else f", as {found[token]!r} and {gene!r}"
                raise UnsupportedError(f"gene {gene!r} is asked for twice{same}: name each once")
            found[token] = gene
        return tuple(found)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self._n_tokens or token in self._special:
            what = "is a special token" if token in self._special else f"is none of the model's {self._n_tokens:,}"
            raise VocabularyError(f"token {token} {what}, not a gene")
        return token

    def ids(self) -> list[str | None] | None:
        """Ensembl id of every token, None where it has none; None without a dictionary."""
        if self._vocabulary is None:
            return None
        names: list[str | None] = [None] * max(self._n_tokens, self._vocabulary.n_tokens)
        for gene, token in self._vocabulary.token_ids.items():
            names[token] = gene
        return names
