"""Which features of a 10x matrix belong to which genome."""

from __future__ import annotations

import numpy as np

from geneformer_fast.counts.block import CountMatrix
from geneformer_fast.counts.columns import ColumnSubset
from geneformer_fast.counts.features import is_expression
from geneformer_fast.counts.selection import CHOSEN_BY
from geneformer_fast.counts.table import Table
from geneformer_fast.errors import InputError


def gene_features(
    name: str, matrix: CountMatrix, features: dict[str, np.ndarray], genome: str | None
) -> tuple[CountMatrix, Table]:
    """Keep the genes of one genome; what is no gene stays for `features.gene_expression` to leave out.

    Parameters
    ----------
    name
        File, for errors.
    matrix
        Cells x features.
    features
        ``gene_ids`` and, where the file has them, ``gene_symbol``, ``feature_types``, ``genome``; [n_features] each.
    genome
        Which genome, needed where there are several.

    Raises
    ------
    InputError
        Several genomes and none chosen, or an unknown genome.
    """
    keep = np.ones(matrix.shape[1], dtype=bool)
    for column, values in features.items():
        if len(values) != matrix.shape[1]:
            raise InputError(f"{name}: {len(values)} {column} for a matrix with {matrix.shape[1]} features")
    is_gene = is_expression(features["feature_types"].tolist()) if "feature_types" in features else None
    genomes = features.get("genome")
    if genomes is not None:
        present = sorted(set(genomes if is_gene is None else genomes[is_gene]) - {""})
        chosen = choose_genome(name, present, genome)
        if len(present) > 1:
            keep = genomes == chosen if is_gene is None else (genomes == chosen) | ~is_gene
            prefix = f"{chosen}_"
            ids = [text.removeprefix(prefix) for text in features["gene_ids"]]
            features = {**features, "gene_ids": np.array(ids, dtype=object)}
    elif genome is not None:
        raise InputError(
            f"{name}: layer {genome!r} was asked for, but the file names no genomes; leave out {CHOSEN_BY}"
        )
    if keep.all():
        kept, columns = matrix, features
    else:
        kept, columns = ColumnSubset(matrix, keep), {key: values[keep] for key, values in features.items()}
    readers = {key: lambda values=values: values for key, values in columns.items()}  # type: ignore[misc]
    return kept, Table(f"{name}: features", kept.shape[1], readers, readers["gene_ids"])


def choose_genome(name: str, present: list[str], asked: str | None) -> str | None:
    """The genome to read; a single one needs no choice.

    Raises
    ------
    InputError
        Several and none asked for, or one that is not there.
    """
    if asked is not None:
        if asked not in present:
            raise InputError(f"{name}: no genome {asked!r}; there are {', '.join(present) or 'none'}")
        return asked
    if len(present) > 1:
        raise InputError(f"{name}: holds several genomes ({', '.join(present)}); choose one with {CHOSEN_BY}")
    return present[0] if present else None
