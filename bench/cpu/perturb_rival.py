"""What users run today to perturb cells with Geneformer, written to be compared with: one cell after another, padded.

It works as Geneformer's in-silico perturber does: a BertForMaskedLM whose hidden states are all kept and whose logits
are all computed, variants of one cell as lists of tokens, batches of so many of them padded to the longest, and values
gene by gene in a dictionary. It gets its tokens from memory and does without the perturber's copies through Arrow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from bench.cpu.embed_rival import SECOND_TO_LAST, attention_mask, batches, padded

#: As the perturber names the cell itself.
CELL = "cell_emb"
#: Of one cell: (token that was deleted, what is compared) -> values.
Values = dict[tuple[int, str], list[float]]


def deletion_values(
    model: Any,
    token_lists: Sequence[Any],
    *,
    genes: Collection[int] | None = None,
    emb_layer: int = SECOND_TO_LAST,
    has_cls: bool = False,
    batch_size: int = 100,
) -> list[Values]:
    """Every gene of every cell deleted by itself, and how near the cell stays to what it was.

    Parameters
    ----------
    model
        A BertForMaskedLM.
    token_lists
        Tokens of every cell; with ``has_cls`` each begins with CLS and ends with EOS.
    genes
        Tokens: only these are deleted. None deletes all.
    emb_layer
        0 is the last layer, -1 the second to last.
    has_cls
        Compare the CLS tokens; else the value is the mean over genes of the cosine of their hidden states.
    batch_size
        Variants at once (``forward_batch_size``).

    Returns
    -------
    list of dict
        Of each cell, in order.
    """
    layer = model.config.num_hidden_layers + emb_layer
    wanted = None if genes is None else frozenset(genes)
    return [_of_cell(model, np.asarray(cell), wanted, layer, has_cls, batch_size) for cell in token_lists]


@torch.no_grad()
def _of_cell(
    model: Any, cell: np.ndarray, wanted: frozenset[int] | None, layer: int, has_cls: bool, batch_size: int
) -> Values:
    found: Values = defaultdict(list)
    original = _hidden(model, [cell], layer)[0]
    genes = range(1, len(cell) - 1) if has_cls else range(len(cell))
    places = np.array([place for place in genes if wanted is None or int(cell[place]) in wanted], dtype=int)
    for batch in batches(places, batch_size):
        hidden = _hidden(model, [np.delete(cell, place) for place in batch], layer)
        if has_cls:
            cosines = torch.nn.CosineSimilarity(dim=1)(hidden[:, 0], original[:1])
        else:
            same_genes = torch.stack([torch.cat([original[:place], original[place + 1 :]]) for place in batch])
            cosines = torch.nn.CosineSimilarity(dim=2)(hidden, same_genes).mean(1)
        for place, cosine in zip(batch, cosines, strict=True):
            found[int(cell[place]), CELL].append(cosine.item())
    return found


def _hidden(model: Any, cells: Sequence[np.ndarray], layer: int) -> torch.Tensor:
    """[B, L, C] float32 hidden states; logits of all genes at all places are computed on the way."""
    ids, lengths = padded(cells)
    outputs = model(input_ids=ids, attention_mask=attention_mask(ids, lengths), output_hidden_states=True)
    return outputs.hidden_states[layer].float()
