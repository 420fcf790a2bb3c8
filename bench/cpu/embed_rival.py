"""What users run today to embed cells with Geneformer, written to be compared with: transformers, padded.

``extractor_embeddings`` calls transformers as Geneformer's extractor does; ``stock_embeddings`` is the best that stock
parts give. Both get their tokens from memory and batches as large as is fastest: nothing holds them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

PAD = 0
#: How many more layers than the one asked for the extractor counts: -1 is the second to last, 0 the last.
SECOND_TO_LAST = -1


def extractor_embeddings(
    model: Any,
    token_lists: Sequence[Any],
    *,
    emb_mode: str = "cell",
    emb_layer: int = SECOND_TO_LAST,
    has_cls: bool = False,
    batch_size: int = 100,
) -> np.ndarray:
    """As Geneformer's extractor: longest cells first, each batch padded to its longest, all hidden states, all logits.

    Parameters
    ----------
    model
        A BertForMaskedLM.
    token_lists
        Tokens of every cell.
    emb_mode
        ``"cls"``, or ``"cell"``: the mean over tokens; with CLS and EOS, without these.
    emb_layer
        0 is the last layer, -1 the second to last.
    has_cls
        Whether cells begin with CLS and end with EOS.
    batch_size
        Cells per batch.

    Returns
    -------
    numpy.ndarray
        [cells, C] float32, in the order of ``token_lists`` (the extractor itself leaves them sorted).
    """
    layer = model.config.num_hidden_layers + emb_layer
    parts = []
    order = longest_first(token_lists)
    with torch.no_grad():
        for cells in batches(order, batch_size):
            ids, lengths = padded([token_lists[i] for i in cells])
            outputs = model(input_ids=ids, attention_mask=attention_mask(ids, lengths), output_hidden_states=True)
            parts.append(pooled(outputs.hidden_states[layer], lengths, emb_mode, has_cls))
    return unsorted(torch.cat(parts), order)


def stock_embeddings(
    model: Any, token_lists: Sequence[Any], *, emb_mode: str = "cell", has_cls: bool = False, batch_size: int = 100
) -> np.ndarray:
    """The last layer of a BertModel (bfloat16, SDPA): longest cells first, padded, no head, no other layer kept."""
    parts = []
    order = longest_first(token_lists)
    with torch.inference_mode():
        for cells in batches(order, batch_size):
            ids, lengths = padded([token_lists[i] for i in cells])
            is_ragged = int(lengths.min()) < ids.shape[1]
            # A mask makes SDPA slower, so none is passed where nothing is padded.
            mask = attention_mask(ids, lengths) if is_ragged else None
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            parts.append(pooled(hidden.float(), lengths, emb_mode, has_cls))
    return unsorted(torch.cat(parts), order)


def longest_first(token_lists: Sequence[Any]) -> np.ndarray:
    """Cell numbers, longest cells first."""
    return np.argsort([-len(tokens) for tokens in token_lists], kind="stable")


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """``order`` cut into batches."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded(token_lists: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] int64 token ids and [B] lengths."""
    lengths = torch.tensor([len(tokens) for tokens in token_lists])
    ids = torch.full((len(token_lists), int(lengths.max())), PAD)
    for row, tokens in zip(ids, token_lists, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens)
    return ids, lengths


def attention_mask(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[B, L] int64, 1 for tokens and 0 for padding."""
    return (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def pooled(hidden: torch.Tensor, lengths: torch.Tensor, emb_mode: str, has_cls: bool) -> torch.Tensor:
    """[B, C] embeddings from hidden states [B, L, C]."""
    if emb_mode == "cls":
        return hidden[:, 0]
    if has_cls:
        hidden, lengths = hidden[:, 1:], lengths - 2
    keep = torch.arange(hidden.shape[1]) < lengths[:, None]
    return (hidden * keep[:, :, None]).sum(1) / lengths[:, None]


def unsorted(rows: torch.Tensor, order: np.ndarray) -> np.ndarray:
    """Rows back in the order they were asked for."""
    result = np.empty(tuple(rows.shape), dtype=np.float32)
    result[order] = rows.float().numpy()
    return result
