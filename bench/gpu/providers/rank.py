"""Candidates of the ranking case: counts on the device as CSR to ranked tokens, and a sort of a padded matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.gpu.impls import Question, with_impls
from bench.gpu.measure import Candidate, Place, Prepared, Unavailable, Variant, Work
from bench.gpu.providers.operations import operation

FIRST_TOKEN = 4


@dataclass(frozen=True)
class RankCase:
    """Cells, genes expressed per cell on average, genes in the matrix, tokens kept."""

    n_cells: int = 16_384
    n_expressed: int = 3000
    n_genes: int = 20_000
    keep: int = 2048

    def variants(self, place: Place) -> list[Variant]:
        """One, with sums of counts in float64, as the exact path needs them."""
        sizes = (8, 12, 40, 8) if place.is_tiny else (self.n_cells, self.n_expressed, self.n_genes, self.keep)
        return [_Ranking(place, *sizes).variant()]


class _Ranking:
    def __init__(self, place: Place, n_cells: int, n_expressed: int, n_genes: int, keep: int) -> None:
        self.place, self.keep = place, keep
        self.n_cells, self.n_expressed, self.n_genes = n_cells, n_expressed, n_genes
        self.question = Question("rank_genes", "float64", {"keep": keep, "n_expressed": n_expressed})

    def variant(self) -> Variant:
        """Least bytes: counts and columns read, tokens written."""
        n_bytes = self.n_cells * (self.n_expressed * (4 + 4) + self.keep * 8)
        return Variant(
            name=f"{self.n_expressed}_to_{self.keep}",
            what=f"{self.n_cells:,} cells of about {self.n_expressed:,} genes, {self.keep:,} tokens kept",
            work=Work(n_bytes=n_bytes, counts={"cells": self.n_cells}),
            build=self.build,
            truth=self.truth,
            tolerance={"tokens": 0.0, "cu_seqlens": 0.0},  # exact or wrong
            question=self.question.as_json(),
        )

    def build(self) -> Sequence[Candidate]:
        """Makes the counts; gives the candidates."""
        device = self.place.device
        generator = torch.Generator(device).manual_seed(0)
        share = self.n_expressed / self.n_genes
        columns, lengths = [], []
        step = max(1, (1 << 28) // self.n_genes)
        for start in range(0, self.n_cells, step):
            n = min(step, self.n_cells - start)
            # Cells differ in depth by a factor of three.
            depth = torch.rand(n, 1, device=device, generator=generator) + 0.5
            is_expressed = torch.rand(n, self.n_genes, device=device, generator=generator) < share * depth
            columns.append(is_expressed.nonzero()[:, 1].to(torch.int32))
            lengths.append(is_expressed.sum(1))
        self.indices = torch.cat(columns)
        self.indptr = torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0))
        counts = torch.empty(len(self.indices), device=device).exponential_(0.4, generator=generator).floor() + 1
        self.counts = counts
        sums = torch.nn.functional.pad(counts.double().cumsum(0), (1, 0))  # exact: whole numbers
        self.totals = sums[self.indptr[1:]] - sums[self.indptr[:-1]]
        self.token_ids = torch.arange(self.n_genes, device=device) + FIRST_TOKEN
        self.medians = torch.rand(self.n_genes, device=device, generator=generator, dtype=torch.float64) * 5 + 0.1
        self.columns = torch.arange(self.n_genes, device=device)
        ours = Candidate("ours", "this project, CSR on the device to packed tokens", self._ours, is_ours=True)
        return [
            *with_impls(ours, self.question, device),
            Candidate(
                "ours-prepared", "the same, genes prepared once, waiting for nothing", self._prepared, is_ours=True
            ),
            Candidate("sort", "scores in float64, padded, torch.sort, cut", lambda: self._sort(torch.float64)),
            Candidate(
                "sort-float32",
                "the same in float32: another order in some cells",
                lambda: self._sort(torch.float32),
                is_same=False,
            ),
        ]

    def truth(self) -> Mapping[str, torch.Tensor]:
        """What the float64 sort gives for the first cells, by itself on the CPU."""
        n = min(64, self.n_cells)
        bounds = self.indptr[: n + 1].cpu()
        kept, lengths = [], []
        for i in range(n):
            at = slice(int(bounds[i]), int(bounds[i + 1]))
            genes = self.indices[at].cpu().long()
            score = (
                self.counts[at].cpu().double()
                * (1.0 / self.totals[i].cpu())
                * 10000
                * (1.0 / self.medians.cpu()[genes])
            )
            order = torch.argsort(score, descending=True, stable=True)[: self.keep]
            kept.append(self.token_ids.cpu()[genes[order]])
            lengths.append(len(kept[-1]))
        device = self.place.device
        return {
            "tokens": torch.cat(kept).to(device),
            "cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0),
        }

    def _ours(self) -> Prepared:
        function = operation("rank_genes")

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return function(
                self.indptr, self.indices, self.counts, self.totals,
                column_to_gene=self.columns, token_ids=self.token_ids, medians=self.medians, keep=self.keep,
            )  # fmt: skip

        return Prepared(run, lambda: self._first(*run()))

    def _prepared(self) -> Prepared:
        if self.place.device.type != "cuda":
            raise Unavailable("needs CUDA")
        try:
            from geneformer_kernels.ops.rank_genes import device
        except ImportError:
            raise Unavailable("this version has no device path") from None
        columns = device.prepare_columns(self.columns, self.token_ids, self.medians, is_division=False, waits=True)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            ranked = device.rank_cells(self.indptr, self.indices, self.counts, self.totals, columns, keep=self.keep)
            return ranked.values, ranked.cu_seqlens

        return Prepared(run, lambda: self._first(*run()))

    def _first(self, tokens: torch.Tensor, bounds: torch.Tensor) -> Mapping[str, torch.Tensor]:
        bounds = bounds[: min(64, self.n_cells) + 1]
        return {"tokens": tokens[: int(bounds[-1])], "cu_seqlens": bounds}

    def _sort(self, dtype: torch.dtype) -> Prepared:
        """Columns are in order of token id, so a stable sort breaks ties as ours does."""
        widest = int(self.indptr.diff().max())
        factors = (1.0 / self.medians).to(dtype)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            lengths = self.indptr.diff()
            place = torch.arange(widest, device=self.indices.device) < lengths[:, None]
            scores = torch.full(place.shape, -1.0, dtype=dtype, device=self.indices.device)
            tokens = torch.zeros(place.shape, dtype=torch.int64, device=self.indices.device)
            per_entry = torch.repeat_interleave(1.0 / self.totals, lengths, output_size=len(self.indices)).to(dtype)
            scores[place] = self.counts.to(dtype) * per_entry * 10000 * factors[self.indices]
            tokens[place] = self.token_ids[self.indices]
            order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : self.keep]
            return tokens.gather(1, order), lengths.clamp_max(self.keep)

        def result() -> Mapping[str, torch.Tensor]:
            ranked, lengths = run()
            n = min(64, self.n_cells)
            kept = torch.arange(ranked.shape[1], device=ranked.device) < lengths[:n, None]
            return {"tokens": ranked[:n][kept], "cu_seqlens": torch.nn.functional.pad(lengths[:n].cumsum(0), (1, 0))}

        return Prepared(run, result)
