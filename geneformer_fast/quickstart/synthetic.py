"""Synthetic single cells that behave like real ones where it matters: sparsity, scale, nuisance, overlapping types.

Genes differ in mean expression by four orders of magnitude; types come in lineages that share programs, so neighbours
are hard to tell apart; every cell has its own library size, programs that have nothing to do with its type (cycle,
stress), and some ambient RNA; donors and batches shift genes. Counts are negative binomial given all that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import anndata

LINEAGES = {
    "lymphoid": ("CD4 T-like", "CD8 T-like", "NK-like", "B-like"),
    "myeloid": ("monocyte-like", "dendritic-like"),
    "stromal": ("fibroblast-like", "endothelial-like"),
}
# Unequal on purpose: rare types are where accuracy and macro-F1 part.
SHARES = (0.26, 0.16, 0.09, 0.14, 0.17, 0.05, 0.08, 0.05)
PROGRAMS = ("cycle", "stress")
# Real human ids end at about ENSG00000310000: these can be mistaken for no real gene.
FIRST_ENSEMBL_NUMBER = 90_000_000_001


@dataclass(frozen=True)
class Recipe:
    """Sizes and strengths of a synthetic data set.

    Attributes
    ----------
    n_cells, n_genes, n_donors, n_batches
        Sizes; a donor belongs to one batch.
    median_counts, library_sigma
        Median total counts of a cell, and the standard deviation of their natural logarithm.
    n_lineage_genes, n_marker_genes, n_program_genes
        Genes per lineage, per type and per shared program.
    lineage_strength, marker_strength, program_strength
        Mean natural-log fold change of those genes.
    donor_sigma, batch_sigma
        Standard deviation of natural-log shifts of every gene, per donor and per batch.
    ambient
        Mean share of a cell's counts that comes from the average of all cells.
    blending
        Mean weight of another type of the same lineage in a cell: cells between types, as along a differentiation.
    dispersion
        Of the negative binomial: variance = mean + dispersion * mean^2.
    """

    n_cells: int = 3000
    n_genes: int = 1000
    n_donors: int = 10
    n_batches: int = 2
    median_counts: float = 2500.0
    library_sigma: float = 0.45
    n_lineage_genes: int = 40
    n_marker_genes: int = 80
    n_program_genes: int = 50
    lineage_strength: float = 0.8
    marker_strength: float = 1.7
    program_strength: float = 0.9
    donor_sigma: float = 0.25
    batch_sigma: float = 0.25
    ambient: float = 0.1
    blending: float = 0.18
    dispersion: float = 0.35


def synthetic_cells(recipe: Recipe | None = None, *, seed: int = 0) -> anndata.AnnData:
    """Make a synthetic data set.

    Parameters
    ----------
    recipe
        Sizes and strengths; None takes the defaults.
    seed
        The same seed gives the same cells.

    Returns
    -------
    anndata.AnnData
        ``X`` [n_cells, n_genes], CSR float32 whole counts. ``obs``: ``cell_type``, ``lineage``, ``donor``, ``batch``
        (categories), ``n_counts`` (float64), ``filter_pass`` (1). ``var``: ``ensembl_id`` (unlike any real id),
        ``symbol``, ``role`` (what the gene does here: ``marker:<type>``, ``lineage:<name>``, ``program:<name>`` or
        ``background``).
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    recipe = recipe or Recipe()
    rng = np.random.default_rng(seed)
    types = [name for names in LINEAGES.values() for name in names]
    lineage_of = {name: lineage for lineage, names in LINEAGES.items() for name in names}
    type_index = rng.choice(len(types), recipe.n_cells, p=SHARES)
    donor = rng.integers(recipe.n_donors, size=recipe.n_cells)
    batch = donor % recipe.n_batches

    roles, type_effects, program_effects = _gene_effects(recipe, types, lineage_of, rng)
    log_mean = _log_mean(recipe.n_genes, rng)
    donor_effects = rng.normal(0, recipe.donor_sigma, (recipe.n_donors, recipe.n_genes))
    batch_effects = rng.normal(0, recipe.batch_sigma, (recipe.n_batches, recipe.n_genes))
    # Most cells hardly run a program, a few run it fully.
    activity = rng.beta(0.5, 2.0, (recipe.n_cells, len(PROGRAMS)))

    log_rate = log_mean + _mixed(type_index, types, lineage_of, recipe.blending, rng) @ type_effects
    log_rate += activity @ program_effects
    log_rate += donor_effects[donor] + batch_effects[batch]
    shares = np.exp(log_rate)
    shares /= shares.sum(1, keepdims=True)
    soup = shares.mean(0)
    ambient = rng.beta(2.0, 2.0 / recipe.ambient - 2.0, (recipe.n_cells, 1))
    shares = (1 - ambient) * shares + ambient * soup
    library = recipe.median_counts * np.exp(rng.normal(0, recipe.library_sigma, (recipe.n_cells, 1)))
    library *= np.where(batch == 0, 1.0, 0.75)[:, None]
    rate = shares * library * rng.gamma(1 / recipe.dispersion, recipe.dispersion, shares.shape)
    counts = rng.poisson(rate).astype(np.float32)

    names = pd.Index([f"gene{i:05d}" for i in range(recipe.n_genes)])
    numbers = FIRST_ENSEMBL_NUMBER + rng.permutation(recipe.n_genes)
    var = pd.DataFrame(
        {
            "ensembl_id": [f"ENSG{number:011d}" for number in numbers],
            "symbol": [f"SYN{i}" for i in range(recipe.n_genes)],
            "role": pd.Categorical(roles),
        },
        index=names,
    )
    cell_types = pd.Categorical.from_codes(type_index, types)
    obs = pd.DataFrame(
        {
            "cell_type": cell_types,
            "lineage": pd.Categorical([lineage_of[name] for name in cell_types]),
            "donor": pd.Categorical([f"donor{i:02d}" for i in donor]),
            "batch": pd.Categorical([f"batch{i}" for i in batch]),
            "n_counts": counts.sum(1, dtype=np.float64),
            "filter_pass": np.ones(recipe.n_cells, dtype=np.int64),
        },
        index=pd.Index([f"cell{i:06d}" for i in range(recipe.n_cells)]),
    )
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def _mixed(
    type_index: np.ndarray, types: list[str], lineage_of: dict[str, str], blending: float, rng: np.random.Generator
) -> np.ndarray:
    """Weights [n_cells, n_types] of type programs: mostly a cell's own, the rest one relative's."""
    weights = np.zeros((len(type_index), len(types)))
    relatives = [
        [i for i, other in enumerate(types) if lineage_of[other] == lineage_of[name] and i != row]
        for row, name in enumerate(types)
    ]
    cells = np.arange(len(type_index))
    other = np.array([rng.choice(relatives[row]) for row in type_index], dtype=np.int64)
    # A few cells lie halfway, most lie near their own type.
    share = rng.beta(0.6, 0.6 * (0.5 / blending - 1), len(cells)) * 0.5
    weights[cells, type_index] = 1 - share
    weights[cells, other] = share
    return weights


def _log_mean(n_genes: int, rng: np.random.Generator) -> np.ndarray:
    """Natural logarithm of each gene's mean share: log-normal over about four orders of magnitude, plus a heavy top."""
    log_mean = rng.normal(0.0, 1.6, n_genes)
    # As ribosomal and mitochondrial genes do, a few take a large part of every cell's counts.
    log_mean[rng.choice(n_genes, max(1, n_genes // 50), replace=False)] += 2.5
    return log_mean


def _gene_effects(
    recipe: Recipe, types: list[str], lineage_of: dict[str, str], rng: np.random.Generator
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Each gene's role, the log fold changes [types, genes], and those of shared programs [programs, genes]."""
    roles = ["background"] * recipe.n_genes
    free = list(rng.permutation(recipe.n_genes))
    type_effects = np.zeros((len(types), recipe.n_genes))
    program_effects = np.zeros((len(PROGRAMS), recipe.n_genes))

    def take(role: str, n: int) -> np.ndarray:
        chosen = np.array([free.pop() for _ in range(min(n, len(free)))], dtype=np.int64)
        for gene in chosen:
            roles[gene] = role
        return chosen

    for lineage, members in LINEAGES.items():
        genes = take(f"lineage:{lineage}", recipe.n_lineage_genes)
        rows = np.array([types.index(name) for name in members])
        type_effects[np.ix_(rows, genes)] += rng.normal(recipe.lineage_strength, 0.4, len(genes))
    for row, name in enumerate(types):
        genes = take(f"marker:{name}", recipe.n_marker_genes)
        type_effects[row, genes] += rng.normal(recipe.marker_strength, 0.4, len(genes))
        # Markers leak into the closest relatives, as those of real types do.
        relatives = np.array([i for i, other in enumerate(types) if lineage_of[other] == lineage_of[name] and i != row])
        leak = rng.uniform(0.0, 0.6, (len(relatives), len(genes)))
        type_effects[np.ix_(relatives, genes)] += leak * type_effects[row, genes]
    for row, name in enumerate(PROGRAMS):
        genes = take(f"program:{name}", recipe.n_program_genes)
        program_effects[row, genes] = rng.normal(recipe.program_strength, 0.4, len(genes)) * 2
    return roles, type_effects, program_effects
