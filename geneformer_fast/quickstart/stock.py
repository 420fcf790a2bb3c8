"""What users run today to embed cells: transformers on padded batches.

It is written to be compared with: tokens are in memory, and nothing holds it back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

#: Cells per batch that the best stock parts are tried with, by device: on CPUs padding costs more than batches bring.
BATCH_SIZES = {"cpu": (1, 2, 4), "cuda": (4, 16, 64)}
#: Geneformer's ``forward_batch_size`` where nobody says otherwise.
EXTRACTOR_BATCH_SIZE = 100

Cells = Sequence[np.ndarray]


def extractor_embeddings(model: Any, cells: Cells, *, batch_size: int) -> np.ndarray:
    """CLS of the last layer as Geneformer's extractor gets it: padded, all hidden states kept, logits of all genes.

    Parameters
    ----------
    model
        A BertForMaskedLM.
    cells
        Tokens of every cell.
    batch_size
        Cells per batch, longest cells first.

    Returns
    -------
    numpy.ndarray
        [cells, C] float32.
    """

    def hidden(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]

    with torch.no_grad():
        return _in_batches(hidden, model, cells, batch_size)


def stock_embeddings(model: Any, cells: Cells, *, batch_size: int) -> np.ndarray:
    """The same from a BertModel with SDPA: no head, no other layer kept, no mask where nothing is padded."""

    def hidden(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # A mask makes SDPA slower.
        return model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask).last_hidden_state

    with torch.inference_mode():
        return _in_batches(hidden, model, cells, batch_size)


def extractor_batch_size(lengths: np.ndarray, vocab_size: int, most_bytes: int) -> int:
    """Cells per batch so that the logits of the longest cells stay below some memory; at most the extractor's own."""
    return int(np.clip(most_bytes // logits_bytes(1, lengths, vocab_size), 1, EXTRACTOR_BATCH_SIZE))


def logits_bytes(batch_size: int, lengths: np.ndarray, vocab_size: int) -> int:
    """Bytes of a batch's logits in float32, at its longest."""
    return batch_size * int(lengths.max()) * vocab_size * 4


def longest_first(cells: Cells) -> np.ndarray:
    """Cell numbers, longest cells first."""
    return np.argsort([-len(tokens) for tokens in cells], kind="stable")


def padded(cells: Cells, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] int64 ids, and their mask: 1 for tokens, 0 for padding."""
    lengths = torch.tensor([len(tokens) for tokens in cells])
    ids = torch.full((len(cells), int(lengths.max())), pad_id)
    for row, tokens in zip(ids, cells, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _in_batches(
    hidden: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], model: Any, cells: Cells, batch_size: int
) -> np.ndarray:
    order = longest_first(cells)
    result = np.empty((len(cells), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = padded([cells[i] for i in chosen], model.config.pad_token_id)
        result[chosen] = hidden(ids.to(model.device), mask.to(model.device))[:, 0].float().cpu().numpy()
    return result
