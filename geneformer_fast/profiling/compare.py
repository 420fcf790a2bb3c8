"""The same cells by transformers as it comes: padded batches of stock parts, in the same dtype, on the same device.

Its batches are cut as ours are, longest cells first and of as many positions as ours have tokens, so that it pads as
little as stock parts can; attention is SDPA, and no mask is passed where nothing is padded. Training is a plain loop
around ``BertForMaskedLM``, which computes the logits of all positions: that is how stock parts have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.checkpoints import hf, save
from geneformer_fast.config import matmul_dtype
from geneformer_fast.data.batches import BatchPlan, Piece
from geneformer_fast.data.loader import load_pieces
from geneformer_fast.data.masking import MaskedBatch
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import ProfileError, UnsupportedError
from geneformer_fast.extract.encoding import WINDOW_CELLS
from geneformer_fast.profiling.figures import Finding
from geneformer_fast.profiling.findings import findings
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import profile
from geneformer_fast.profiling.scenarios import Embedding, Training
from geneformer_fast.profiling.scenarios.cells import evenly
from geneformer_fast.profiling.scenarios.passes import N_ACTIVE, measured
from geneformer_fast.profiling.scenarios.request import SECONDS
from geneformer_fast.ragged import Ragged

ENGINE = "transformers"
#: How often both compute the same cells, one after the other.
N_TURNS = 3
_IGNORED = -100
# Agreement of embeddings, as cosine similarity per cell, centred over cells: two ways in 16 bits differ by roundings,
# 12 layers of stock parts in bfloat16 from float32 down to 0.982 (bench/results, V2-104M).
_LEAST_COSINE = {torch.float32: 0.999, torch.float64: 0.999}
_LEAST_COSINE_16 = 0.95
_CELLS_COMPARED = 16


def compared(ours: Embedding | Training, report: Report, trace: Path | None = None) -> Report:
    """A report with that of transformers on the same cells within it.

    Parameters
    ----------
    ours
        What was measured.
    report
        What it came to.
    trace
        Where torch's profiler writes what it saw of transformers.

    Raises
    ------
    UnsupportedError
        BERT cannot express the model, or it is quantized; transformers is not installed.
    ProfileError
        The two do not compute the same.
    """
    check_comparable(ours.encoder)
    with stock_of(ours) as stock:
        if isinstance(stock, StockEmbedding):
            stock.check_agreement(cast(Embedding, ours))
        theirs = stock.report(trace)
        turns = in_turns(ours.cells_per_s, stock.cells_per_s)
    whole = dataclasses.replace(report, compared=[theirs])
    return dataclasses.replace(whole, findings=[_finding(turns), *findings(whole)])


def check_comparable(encoder: Encoder) -> None:
    """Refuse what stock parts cannot compute, before anything is measured.

    Raises
    ------
    UnsupportedError
        Says what it is.
    """
    if encoder.quantization is not None:
        raise UnsupportedError(
            "--compare stock: this model is quantized, and stock transformers would multiply it in floats; compare the "
            "model before it was quantized"
        )
    if not hf.is_bert(encoder):
        raise UnsupportedError(
            "--compare stock: transformers' BERT cannot express this encoder (it is post-norm over tokens, with relu or "
            "gelu), so there is nothing to compare with"
        )
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--compare stock needs transformers, which is not installed: pip install 'geneformer-fast[hf]'"
        ) from None


@contextlib.contextmanager
def stock_of(ours: Embedding | Training) -> Iterator[StockEmbedding | StockTraining]:
    """The same model by transformers, with the same weights."""
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as place:
        folder = Path(place) / "model"
        save(ours.encoder, folder)
        yield StockEmbedding(ours, folder) if isinstance(ours, Embedding) else StockTraining(ours, folder)


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
        with _quiet():
            # Not with dtype=, which transformers before 4.56 calls torch_dtype.
            model = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False)
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
        return measured(
            self, self.ours.n_cells, steps=request.steps, seconds=request.seconds or SECONDS, trace=trace,
            model=self.model, name=self.ours.name, mode=self.ours.mode, engine=ENGINE, tokens=self.cells.what,
            settings={**self.ours.settings(), "blocks_computed": self.ours.encoder.config.n_layers, "attention": "sdpa"},
        )  # fmt: skip

    def cells_per_s(self) -> float:
        """Of a few batches, in a moment."""
        from geneformer_fast.profiling.scenarios.passes import tried

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


class StockTraining:
    """BertForMaskedLM on padded batches: forward, loss, backward, clipping, AdamW; the same cells and masks as ours.

    Parameters
    ----------
    ours
        What it is compared with.
    folder
        A Hugging Face folder of the same weights.
    """

    def __init__(self, ours: Training, folder: Path) -> None:
        from transformers import BertForMaskedLM

        self.ours, self.recipe = ours, ours.chosen_recipe(1)
        self.device = ours.encoder.device
        self.dtype = matmul_dtype(self.recipe.precision, self.device) or torch.float32
        with _quiet():
            model = BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
        self.model: Any = model.float().to(self.device).train()
        if self.recipe.is_recomputing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.recipe.learning_rate, betas=self.recipe.betas, eps=self.recipe.eps,
            weight_decay=self.recipe.weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def steps(self, n_steps: int) -> Iterator[dict[str, Any]]:
        """So many steps; what ``Run.step`` is to be told of each."""
        plan = BatchPlan(
            self.ours.cells.lengths(), self.ours.train_cells, batch_tokens=self.recipe.batch_tokens,
            token_budget=self.recipe.token_budget, seed=self.recipe.seed,
        )  # fmt: skip
        pieces = load_pieces(
            cast(Any, self.ours.cells), plan.pieces(0, n_steps), self.ours.objective.collate, seed=self.recipe.seed,
            workers=self.recipe.workers,
        )  # fmt: skip
        with contextlib.closing(pieces):
            for _, group in itertools.groupby(pieces, key=_place_of):
                batches = [batch for _, batch in group]
                self._step(batches)
                yield {
                    "lengths": np.concatenate([np.diff(batch.tokens.cu_seqlens.numpy()) for batch in batches]),
                    "head_rows": sum(len(batch.rows) for batch in batches),
                }

    def report(self, trace: Path | None = None) -> Report:
        """Measure it."""
        from geneformer_fast.profiling.scenarios.train import N_WARMUP

        request = self.ours.request
        n_steps = request.steps or max(1, round((request.seconds or SECONDS) / self._seconds_of(1, N_WARMUP)))
        settings = {**self.ours.settings(), "attention": "sdpa", "logits": "of all positions"}
        with profile(
            self.model, name=self.ours.name, mode=self.ours.mode, engine=ENGINE, optimizer=self.optimizer,
            n_warmup=N_WARMUP, n_steps=n_steps, n_active=N_ACTIVE, trace=trace, tokens=self.ours.cells.what,
            settings=settings,
        ) as run:  # fmt: skip
            for told in self.steps(N_WARMUP + n_steps + 2 + N_ACTIVE):
                run.step(**told)
        return run.report

    def cells_per_s(self) -> float:
        """Of a few steps, in a moment."""
        n_cells = 0
        begin = time.perf_counter()
        for place, told in enumerate(self.steps(3)):
            if place == 0:
                begin = time.perf_counter()
            else:
                n_cells += len(told["lengths"])
        return n_cells / (time.perf_counter() - begin)

    def _seconds_of(self, n_steps: int, n_warmup: int) -> float:
        """Of one step."""
        begin = time.perf_counter()
        for place, _ in enumerate(self.steps(n_steps + n_warmup), start=1):
            if place == n_warmup:
                begin = time.perf_counter()
        return max(1e-6, (time.perf_counter() - begin) / n_steps)

    def _step(self, batches: list[MaskedBatch]) -> None:
        """One optimizer step; padded pieces of no more positions than ours have tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        n_masked = max(1, sum(len(batch.rows) for batch in batches))
        for batch in batches:
            for ids, mask, labels in self._padded(batch):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    logits = self.model(input_ids=ids, attention_mask=mask).logits
                    loss = F.cross_entropy(
                        logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
                    )
                self.scaler.scale(loss / n_masked).backward()
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            return
        # Where nobody computes ahead, the loss is looked at as ours is.
        loss.item()

    def _padded(self, batch: MaskedBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """[B, L] ids, mask and labels of pieces, longest cells first."""
        labels = torch.full_like(batch.tokens.values, _IGNORED)
        labels[batch.rows] = batch.targets
        bounds = batch.tokens.cu_seqlens.tolist()
        order = np.argsort([first - last for first, last in itertools.pairwise(bounds)], kind="stable")
        start = 0
        while start < len(order):
            longest = bounds[order[start] + 1] - bounds[order[start]]
            chosen = order[start : start + max(1, self.ours.token_budget // longest)]
            cut = [slice(bounds[i], bounds[i + 1]) for i in chosen]
            shown = Ragged.from_cells([batch.tokens.values[each] for each in cut])
            asked = Ragged.from_cells([labels[each] for each in cut])
            yield (
                shown.to_padded(self.model.config.pad_token_id).to(self.device),
                shown.mask().long().to(self.device),
                asked.to_padded(_IGNORED).to(self.device),
            )
            start += len(chosen)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float]) -> list[tuple[float, float]]:
    """Cells/s of both, one after the other, so that noise on the machine hits both."""
    return [(ours(), theirs()) for _ in range(N_TURNS)]


def _finding(turns: list[tuple[float, float]]) -> Finding:
    ratios = sorted(ours / theirs for ours, theirs in turns)
    middle = statistics.median(ratios)
    ours, theirs = (statistics.median(each) for each in zip(*turns, strict=True))
    said = "times as fast as" if middle >= 1 else "times the speed of"
    return Finding(
        "stock",
        f"on these cells this project is {middle:.2f} {said} stock transformers: {ours:,.3g} cells/s and {theirs:,.3g} "
        f"(medians of {len(turns)} turns; {ratios[0]:.2f} to {ratios[-1]:.2f} times)",
        {
            "ratio": middle,
            "ratio_least": ratios[0],
            "ratio_most": ratios[-1],
            "ours_per_s": ours,
            "stock_per_s": theirs,
        },
    )


def _place_of(pair: tuple[Piece, Any]) -> tuple[int, int]:
    return pair[0].epoch, pair[0].step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks about heads that are not there, and its bar for loading."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
