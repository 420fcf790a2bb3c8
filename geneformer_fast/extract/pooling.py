"""Rules by which hidden states of a cell become one embedding: which positions count, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.ragged import Ragged


@dataclass(frozen=True)
class Place:
    """Where hidden states stand: what a rule decides by.

    Attributes
    ----------
    tokens
        What the model was given.
    special_ids
        Ids of special tokens.
    n_behind
        Positions behind a cell's genes that stand for none (:attr:`~geneformer_fast.families.Reading.n_behind`).
    measured
        [T] booleans, positions that are not of genes which the file of the cell lacks; None: all.
    """

    tokens: Ragged
    special_ids: Sequence[int] = ()
    n_behind: int = 0
    measured: torch.Tensor | None = None

    def is_read(self) -> torch.Tensor:
        """[T] booleans: positions that the file of a cell says something of."""
        if self.measured is not None:
            return self.measured
        return torch.ones(self.tokens.n_tokens, dtype=torch.bool, device=self.tokens.values.device)

    def is_gene(self) -> torch.Tensor:
        """[T] booleans: positions of genes."""
        return self._is_among_genes() & self.is_read()

    def _is_among_genes(self) -> torch.Tensor:
        tokens = self.tokens
        if self.n_behind:
            behind = tokens.lengths.long().repeat_interleave(tokens.lengths.long(), output_size=tokens.n_tokens)
            return tokens.positions() < behind - self.n_behind
        is_paired = tokens.values.ndim == 2  # a gene and its value
        if not self.special_ids or (tokens.values.is_floating_point() and not is_paired):
            return torch.ones(tokens.n_tokens, dtype=torch.bool, device=tokens.values.device)
        ids = tokens.values[:, 0].long() if is_paired else tokens.values
        return ~torch.isin(ids, torch.tensor(self.special_ids, device=ids.device))


def _is_inside(tokens: Ragged) -> torch.Tensor:
    """[T] booleans: positions but the first and the last of each cell."""
    positions, lengths = tokens.positions(), tokens.lengths.long()
    ends = lengths.repeat_interleave(lengths, output_size=tokens.n_tokens)
    return (positions > 0) & (positions < ends - 1)


#: Means: name to which positions count [T], booleans. A family names those that are its authors' (``Reading.pools``).
MEANS: dict[str, Callable[[Place], torch.Tensor]] = {
    "mean": Place.is_gene,
    "mean-all": Place.is_read,
    "bionemo1": lambda place: place.tokens.positions() > 0,
    "bionemo2": lambda place: _is_inside(place.tokens),
}


_COMMON = ("cls", "mean", "gene")


def pools_of(config: EncoderConfig) -> tuple[str, ...]:
    """Names that ``pool`` may have for a model."""
    own = (name for name in families.family_reading(config).pools if name not in _COMMON)
    return *_COMMON, *own


def choose_pool(pool: str | None, config: EncoderConfig, cls_id: int | None, vocabulary: object = None) -> str:
    """The rule that is asked for, or that of the model's family; without one CLS where there is such a token.

    Raises
    ------
    UnsupportedError
        There is no such rule for the model, or no CLS token.
    """
    reading = families.family_reading(config)
    if pool is None:
        return reading.pool or ("mean" if cls_id is None else "cls")
    if pool not in pools_of(config):
        raise UnsupportedError(f"pool must be one of {', '.join(pools_of(config))}, not {pool!r}")
    if pool == "cls" and cls_id is None and reading.pool != "cls":
        whose = vocabulary or "this model"
        found = families.family_of(config)
        is_ranked = found is None or found.preparation is None
        first = ": its first token is the top-ranked gene" if is_ranked else ""
        raise UnsupportedError(f"{whose} has no CLS token{first}. Use pool 'mean'")
    return pool


def pooled(hidden: Ragged, pool: str, place: Place, *, is_normalised: bool = False) -> torch.Tensor:
    """[B, C] float32 embeddings of cells; ``is_normalised``: divided by their length."""
    if pool == "cls":
        rows = hidden.values[hidden.starts.long()]
    else:
        weights = MEANS[pool](place).to(hidden.values.dtype)
        lengths = hidden.lengths.long()
        sums = torch.segment_reduce(hidden.values * weights[:, None], "sum", lengths=lengths)
        rows = sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]
    rows = rows.float()
    return torch.nn.functional.normalize(rows, dim=1) if is_normalised else rows
