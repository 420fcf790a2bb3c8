"""What the original tools make of a cell, one after another, as plainly as it can be said.

Written from how the tools go about it, not from the code under test: dense rows, the order of operations and the
precision that they have.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def aligned(adata, names, *, dtype=np.float64):
    """[cells, genes of a list] counts by name, those of equal columns added; and which genes there are."""
    x = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    rows = np.zeros((adata.n_obs, len(names)), dtype=dtype)
    place = {name: i for i, name in enumerate(names)}
    there = np.zeros(len(names), dtype=bool)
    for column, name in enumerate(adata.var_names):
        if name in place:
            rows[:, place[name]] += x[:, column].astype(dtype)
            there[place[name]] = True
    return rows, there


def aido_row(counts, there, *, missing="zero", total=None):
    """[genes + 2] what preprocess_counts makes of an aligned cell, in float64."""
    total = counts.sum() if total is None else total
    row = np.log1p(counts / total * 10000)
    depth = max(np.log10(total), 5.0)
    if missing == "mask":
        row[~there] = -1
    return np.minimum(np.concatenate([row, [depth, depth]]), 20)


def aido_row_float32(counts):
    """The same in float32 and torch's words."""
    import torch

    x = torch.from_numpy(counts[None].astype(np.float32))
    total = x.sum(dim=1, keepdim=True)
    depth = torch.maximum(torch.log10(total), torch.tensor(5.0))
    return torch.clamp(torch.cat((torch.log1p(x / total * 10000), depth, depth), dim=1), max=20)[0].numpy()


def scbert_row(counts):
    """[genes + 1] what scanpy (float32) and SCDataset make of an aligned cell."""
    x = counts.astype(np.float32)
    total = x.sum(dtype=np.float32)
    x = x / np.float32(total / np.float32(1e4))
    x = (np.log1p(x) / np.log(2)).astype(np.float32)
    x[x > 5] = 5
    return np.append(x.astype(np.int64), 0)


def scgpt_bins(values, rands, n_bins=51):
    """Bins of the non-zero values of a cell by ``binning`` with the random numbers it draws."""
    values = values.astype(np.float32)
    bins = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    left, right = np.digitize(values, bins), np.digitize(values, bins, right=True)
    return np.ceil(rands * (right - left) + left).astype(np.int64)


def scgpt_allowed(values, n_bins=51):
    """(least, largest) bin that ``binning`` may give each of the non-zero values of a cell."""
    values = values.astype(np.float32)
    bins = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    left, right = np.digitize(values, bins), np.digitize(values, bins, right=True)
    return np.where(right < left, right + 1, left), left


def scgpt_top(counts, ids, most):
    """Places of at most so many genes: largest counts, of equal ones the smaller ids, in order of ids."""
    order = sorted(range(len(ids)), key=lambda i: (-counts[i], ids[i]))[:most]
    return sorted(order, key=lambda i: ids[i])
