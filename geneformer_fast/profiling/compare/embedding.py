"""Embedding by stock parts: ``BertModel`` on padded batches, pooled as ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_fast.errors import ProfileError
from geneformer_fast.extract.encoding import WINDOW_CELLS
from geneformer_fast.profiling.compare.quiet import ENGINE, quiet
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.request import SECONDS
from geneformer_fast.profiling.scenarios import Embedding
from geneformer_fast.profiling.scenarios.cells import evenly
from geneformer_fast.profiling.scenarios.passes import measured, tried
from geneformer_fast.ragged import Ragged

# Agreement of embeddings, as cosine similarity per cell, centred over cells: two ways in 16 bits differ by roundings,
# 12 layers of stock parts in bfloat16 from float32 down to 0.982 (bench/results, V2-104M).
_LEAST_COSINE = {torch.float32: 0.999, torch.float64: 0.999}
_LEAST_COSINE_16 = 0.95
_CELLS_COMPARED = 16


class StockEmbedding:
    """BertModel on padded batches, pooled as ours.

    Parameters
    ----------
    ours
        What it is compared with.
    folder
        A Hugging Face folder of the same weights.
    """

    def __init__(self, ours: Embedding, folder: Path) -> None:
        from transformers import BertModel

        self.ours, self.cells, self.token_budget = ours, ours.cells, ours.token_budget
        self.device, self.dtype = ours.encoder.device, ours.encoder.dtype
        with quiet():
            # Not with dtype=, which transformers before 4.56 calls torch_dtype.
            model: Any = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False)
        self.model: Any = model.to(device=self.device, dtype=self.dtype).eval()
        self.special = sorted(self.cells.identity["special"].values())

    def n_steps(self, chosen: np.ndarray) -> int:
        """Batches of a pass over some cells."""
        return sum(1 for _ in self._batches(chosen))

    def steps(self, chosen: np.ndarray, *, is_alone: bool = False) -> Iterator[dict[str, Any]]:
        """One pass; the lengths of each batch, once it is embedded."""
        for _, lengths, _ in self._embedded(chosen):
            yield {"lengths": lengths}

    def embeddings(self, chosen: np.ndarray) -> np.ndarray:
        """[len(chosen), C] of some cells."""
        found = np.empty((len(chosen), self.model.config.hidden_size), dtype=np.float32)
        for places, _, rows in self._embedded(chosen):
            found[places] = rows
        return found

    def check_agreement(self, ours: Embedding) -> None:
        """Refuse to time what does not compute the same.

        Raises
        ------
        ProfileError
            Says how far off it is.
        """
        chosen = evenly(self.cells.lengths(), min(_CELLS_COMPARED, ours.n_cells))
        if len(chosen) < 2:
            return
        pair = [each - each.mean(0) for each in (ours.embeddings(chosen), self.embeddings(chosen))]
        norms = [np.linalg.norm(each, axis=1) for each in pair]
        least = float(((pair[0] * pair[1]).sum(1) / np.maximum(norms[0] * norms[1], 1e-12)).min())
        if least < _LEAST_COSINE.get(self.dtype, _LEAST_COSINE_16):
            raise ProfileError(
                f"--compare stock: embeddings by transformers are not the same (least centred cosine {least:.4f} over "
                f"{len(chosen)} cells), so that their times say nothing; try --dtype float32, and tell us"
            )

    def report(self, trace: Path | None = None) -> Report:
        """Measure it."""
        request = self.ours.request
        settings = {"blocks_computed": self.model.config.num_hidden_layers, "attention": "sdpa"}
        return measured(
            self, self.ours.n_cells, steps=request.steps, seconds=request.seconds or SECONDS, trace=trace,
            model=self.model, name=self.ours.name, mode=self.ours.mode, engine=ENGINE, tokens=self.cells.what,
            settings=self.ours.settings() | settings,
        )  # fmt: skip

    def cells_per_s(self) -> float:
        """Of a few batches, in a moment."""
        return tried(self, self.ours.n_cells).cells_per_s

    def _batches(self, chosen: np.ndarray) -> Iterator[np.ndarray]:
        """Places in ``chosen``: longest cells of a window first, as many as the budget has positions for."""
        lengths = self.cells.lengths()[chosen]
        for start in range(0, len(chosen), WINDOW_CELLS):
            order = start + np.argsort(-lengths[start : start + WINDOW_CELLS], kind="stable")
            first = 0
            while first < len(order):
                size = max(1, self.token_budget // int(lengths[order[first]]))
                yield order[first : first + size]
                first += size

    def _embedded(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(places, lengths, embeddings) of each batch."""
        layer = None if self.ours.layer == "last" else self.ours.n_layers
        for places in self._batches(chosen):
            values, bounds = self.cells.read(chosen[places])
            tokens = Ragged.from_lengths(torch.from_numpy(values.astype(np.int64)), torch.from_numpy(np.diff(bounds)))
            mask = tokens.mask()
            ids = tokens.to_padded(self.model.config.pad_token_id).to(self.device)
            with torch.inference_mode():
                outputs = self.model(
                    # A mask makes SDPA slower, so none is passed where nothing is padded.
                    input_ids=ids, attention_mask=None if bool(mask.all()) else mask.long().to(self.device),
                    output_hidden_states=layer is not None,
                )  # fmt: skip
                hidden = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
                rows = self._pooled(hidden.float(), ids, mask.to(self.device))
            yield places, np.diff(bounds), rows.cpu().numpy()

    def _pooled(self, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.ours.pool == "cls":
            return hidden[:, 0]
        kept = mask & ~torch.isin(ids, torch.tensor(self.special, device=self.device))
        return (hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
