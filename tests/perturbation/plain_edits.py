"""What edits mean, in plain Python: one cell and one variant at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from geneformer_fast.perturbation.edits import Edits


@dataclass(frozen=True)
class PlainVariant:
    """A variant, the original it is compared with, and the genes that are in both and were not perturbed."""

    tokens: list[int]
    original: list[int]
    perturbed: list[int]
    dose: int = 0

    def common(self, front: int, back: int) -> list[int]:
        genes = self.tokens[front : len(self.tokens) - back]
        return [gene for gene in genes if gene in self.original and gene not in self.perturbed]


def plain_variants(edits: Edits, cell: list[int]) -> list[PlainVariant]:
    """All variants of one cell, in order."""
    genes = cell[edits.front : len(cell) - edits.back]
    found = []
    for perturbed, doses in itertools.product(_perturbed(edits, genes), range(edits.n_doses)):
        dose = edits.doses[doses] if edits.doses else 0.0
        found.append(_variant(edits, cell, genes, perturbed, dose, doses))
    return found


def _perturbed(edits: Edits, genes: list[int]) -> list[list[int]]:
    if edits.sets is not None:
        lists: list[Any] = [list(each) for each in edits.sets]
    elif edits.anchor is not None:
        others = genes if edits.genes is None else edits.genes
        lists = [[edits.anchor, gene] for gene in others if gene != edits.anchor]
    elif edits.genes is None and edits.pairs:
        lists = [[genes[i], genes[j]] for j in range(len(genes)) for i in range(j)]
    elif edits.genes is None:
        skips = {"overexpress": genes[:1], "activate": genes[:1], "inhibit": genes[-1:]}.get(edits.kind, [])
        lists = [[gene] for gene in genes if gene not in skips]
    elif edits.pairs:
        lists = [list(pair) for pair in itertools.combinations(edits.genes, 2)]
    else:
        lists = [list(edits.genes)] if edits.together else [[gene] for gene in edits.genes]
    if edits.kind == "overexpress" and edits.anchor is None:
        return lists
    has = any if edits.sets is not None else all
    return [each for each in lists if has(gene in genes for gene in each)]


def _variant(
    edits: Edits, cell: list[int], genes: list[int], perturbed: list[int], dose: float, number: int
) -> PlainVariant:
    before, behind = cell[: edits.front], cell[len(cell) - edits.back :]
    rest = [gene for gene in genes if gene not in perturbed]
    there = [gene for gene in perturbed if gene in genes]
    original = list(genes)
    if edits.kind == "delete":
        new = rest
    elif edits.kind == "overexpress":
        put = sorted(perturbed, key=genes.index) if edits.anchor is not None or _is_all_pairs(edits) else perturbed
        limit = edits.max_len or 10**9
        overflow = max(0, len(cell) + len(perturbed) - len(there) - limit)
        lost = rest[len(rest) - overflow :]
        new = put + rest[: len(rest) - overflow]
        original = [gene for gene in genes if gene not in lost]
    elif edits.kind == "swap":
        first, second = perturbed
        new = [{first: second, second: first}.get(gene, gene) for gene in genes]
    else:
        step = max(1, math.floor(dose * len(genes) + 0.5))
        sign = 1 if edits.kind == "inhibit" else -1
        new = _moved(rest, [(genes.index(gene) + sign * step, gene) for gene in sorted(there, key=genes.index)])
    return PlainVariant([*before, *new, *behind], [*before, *original, *behind], perturbed, number)


def _is_all_pairs(edits: Edits) -> bool:
    return edits.pairs and edits.genes is None


def _moved(rest: list[int], moved: list[tuple[int, int]]) -> list[int]:
    """Genes put to places that are free: as wanted, or behind the one before, with room for those behind."""
    n, places, last = len(rest) + len(moved), {}, -1
    for index, (place, gene) in enumerate(moved):
        last = min(max(place, 0, last + 1), n - len(moved) + index)
        places[last] = gene
    others = iter(rest)
    return [places[place] if place in places else next(others) for place in range(n)]
