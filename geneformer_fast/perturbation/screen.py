"""First-order estimates of every deletion and overexpression from a few backward passes per cell.

A deletion is two small changes of what a cell's forward pass reads. The gene's key leaves every attention (and its row
every mean): that is its weight going from 1 to 0, whose derivative the gradient of a bias on the scores of that key
gives. And all genes behind it move up by one: that is the difference of two rows of the position table for each, whose
effect is a dot product with the gradient of that gene's input. A sum over the genes behind makes both one number per
gene. Overexpression moves a gene to the front, and those before it back by one.

With states the value is a shift of cosines, which has a gradient where the cell stands: one backward pass per state.
Without states it is a similarity with the cell itself, which has none there: it is at its largest. It is then estimated
from its curvature, by random directions: a backward pass each gives the length of the change in that direction.

How good that is depends on the model; the guide says what was measured. Use it to choose genes, not to report them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from geneformer_kernels.int8_rows import activate
from torch import nn

from geneformer_fast.block import Block, add_norm
from geneformer_fast.embeddings import RankTokens
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.compare import Framing

#: Random directions of a screen without states.
N_DIRECTIONS = 32
# Head sizes that attention on a card takes are multiples of 8.
_MULTIPLE = 8


@dataclass(frozen=True)
class CellEstimates:
    """Estimates for one cell.

    Attributes
    ----------
    tokens
        [n] int64, its genes by rank.
    values
        [n, S] float32: of perturbing each, a shift for every state; without states [n, 1], a similarity.
    """

    tokens: np.ndarray
    values: np.ndarray


class GradientScreen:
    """Estimates what becomes of cells when each of their genes is deleted or overexpressed.

    Parameters
    ----------
    encoder
        The model.
    kind
        ``"delete"`` or ``"overexpress"``.
    mode
        ``"cls"`` or ``"cell"``, as in :class:`~geneformer_fast.perturbation.compare.Comparison`.
    layer
        Whose hidden states are compared, as in :meth:`Encoder.forward`.
    framing
        Where special tokens are.
    states
        [S, C] embeddings of states; None compares with the cell itself.
    n_directions
        Backward passes per cell without states; with states there is one for each.
    seed
        Of the directions.

    Raises
    ------
    UnsupportedError
        There is no such estimate.
    """

    def __init__(
        self,
        encoder: Encoder,
        kind: str,
        mode: str,
        layer: str | int,
        framing: Framing,
        states: torch.Tensor | None = None,
        *,
        n_directions: int = N_DIRECTIONS,
        seed: int = 0,
    ) -> None:
        if kind not in ("delete", "overexpress"):
            raise UnsupportedError(f"a screen is of deletions or overexpressions (--kind), not of kind {kind!r}")
        if mode not in ("cls", "cell"):
            raise UnsupportedError(f"a screen looks at what becomes of cells: use mode cls or cell, not {mode!r}")
        self.encoder, self.kind, self.mode, self.framing = encoder, kind, mode, framing
        self.n_blocks = encoder.config.layer_index(layer)
        self._states = None if states is None else F.normalize(states.float(), dim=-1)
        self._n_directions, self._seed = n_directions, seed
        assert isinstance(encoder.embeddings, RankTokens)
        self._positions = encoder.embeddings.position.weight.detach()

    def cell(self, tokens: torch.Tensor) -> CellEstimates:
        """Estimates for one cell, of packed tokens [L] on the encoder's device."""
        genes, changes = self.changes(tokens)
        return CellEstimates(genes, self.values(changes))

    def values(self, changes: np.ndarray) -> np.ndarray:
        """[n, S] shifts, or [n, 1] similarities, of [n, S or directions] changes; those of several genes add up."""
        return changes if self.has_states else 1 - np.square(changes).mean(1, keepdims=True) / 2

    @property
    def has_states(self) -> bool:
        """Whether values are shifts towards states, and not similarities."""
        return self._states is not None

    def changes(self, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[n] int64 genes of one cell by rank, and [n, S or directions] float32 what each changes to first order."""
        with _frozen(self.encoder), torch.enable_grad():
            summed = self._summed(tokens).requires_grad_()
            gate = torch.zeros(len(tokens), device=tokens.device, requires_grad=True)
            hidden = hidden_states(self.encoder, summed, gate, self.n_blocks)
            objectives = self._objectives(hidden, gate)
            gradients = [
                torch.autograd.grad(each, (summed, gate), retain_graph=number + 1 < len(objectives))
                for number, each in enumerate(objectives)
            ]
        changes = torch.stack([self._changes(*each) for each in gradients], 1)  # [n, S]
        front, back = self.framing.n_front, self.framing.n_back
        return tokens[front : len(tokens) - back].cpu().numpy(), changes.float().cpu().numpy()

    @property
    def n_values(self) -> int:
        """Values per gene."""
        return 1 if self._states is None else len(self._states)

    @property
    def n_changes(self) -> int:
        """Numbers per gene that add up: a change for every state, or every direction."""
        return self._n_directions if self._states is None else len(self._states)

    def _summed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[L, C] what the first LayerNorm reads."""
        embeddings = self.encoder.embeddings
        assert isinstance(embeddings, RankTokens)
        summed = embeddings.token(tokens).float() + self._positions[: len(tokens)]
        return summed if embeddings.token_type is None else summed + embeddings.token_type.weight[0]

    def _objectives(self, hidden: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
        """Scalars, one for each backward pass."""
        front, stop = self.framing.n_front, len(hidden) - self.framing.n_back
        if self._states is not None:
            cell = hidden[0] if self.mode == "cls" else (hidden * gate.exp()[:, None])[front:stop].sum(0)
            return list(self._states.to(hidden) @ F.normalize(cell, dim=0))
        # [1, C], or [n, C]: every row that is compared, by itself.
        rows = hidden[:1] if self.mode == "cls" else hidden[front:stop]
        unit = F.normalize(rows, dim=-1)
        generator = torch.Generator().manual_seed(self._seed)
        found = []
        for _ in range(self._n_directions):
            direction = torch.randn(rows.shape, generator=generator).to(rows)
            # The gradient of a normalised row has no part along the row: only what turns it counts.
            found.append((direction * unit).sum() / len(rows) ** 0.5)
        return found

    def _changes(self, d_summed: torch.Tensor, d_gate: torch.Tensor) -> torch.Tensor:
        """[n] first-order change of an objective by each gene's perturbation."""
        front, stop, n = self.framing.n_front, len(d_gate) - self.framing.n_back, len(d_gate)
        positions = self._positions[:n].float()
        if self.kind == "delete":
            # One place up, for every token that stands behind.
            up = (d_summed[1:] * (positions[:-1] - positions[1:])).sum(1)
            behind = F.pad(up.flip(0).cumsum(0).flip(0), (0, 1))  # of tokens i + 1 and on
            return (behind - d_gate)[front:stop]
        # One place back, for every gene that stands before.
        down = (d_summed[front : stop - 1] * (positions[front + 1 : stop] - positions[front : stop - 1])).sum(1)
        before = F.pad(down.cumsum(0), (1, 0))
        to_front = (d_summed[front:stop] * (positions[front] - positions[front:stop])).sum(1)
        return before + to_front


def hidden_states(encoder: Encoder, summed: torch.Tensor, gate: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """[L, C] hidden states of one cell after some blocks, with ``gate`` [L] added to the scores of each key.

    ``summed`` [L, C] is what the embeddings' LayerNorm reads.
    """
    config = encoder.config
    norm = encoder.embedding_norm
    stream = summed if norm is None else F.layer_norm(summed, (config.width,), norm.weight, norm.bias, norm.eps)
    x = stream.to(encoder.dtype)
    if config.norm == "pre" and n_blocks:
        x = _as_tensor(add_norm(stream, None, _block(encoder, 0).attention_norm, "pre", encoder.dtype)[1])
    for index in range(n_blocks):
        block, is_last = _block(encoder, index), index + 1 == config.n_layers
        is_final = config.norm == "pre" and is_last and encoder.final_norm is not None
        next_norm = encoder.final_norm if is_final else None
        if config.norm == "pre" and not is_last:
            next_norm = _block(encoder, index + 1).attention_norm
        first_norm, second_norm = block.norms(next_norm)
        attended = block.out(_gated_attention(block.projected(x), gate))
        stream, x = _normed(attended, stream, first_norm, config.norm, encoder.dtype)
        out = block.down(activate(block.up(x), config.activation))
        if second_norm is None:
            stream, x = stream + out, out
        else:
            stream, x = _normed(out, stream, second_norm, "post" if is_final else config.norm, encoder.dtype)
        if is_last and encoder.final_norm is not None and not is_final:
            stream, x = _normed(stream, None, encoder.final_norm, "post", encoder.dtype)
    return stream


def _gated_attention(qkv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """[L, 3, H, D] -> [L, C]: attention within one cell, with a number added to the scores of each key.

    It rides along as one more dimension of queries and keys, so that scores are nowhere kept.
    """
    n, _, n_heads, head_dim = qkv.shape
    scale, n_more = head_dim**-0.5, -head_dim % _MULTIPLE or _MULTIPLE
    q, k, v = (F.pad(each, (0, n_more)) for each in qkv.permute(1, 2, 0, 3))  # [H, L, D + more]
    ones = torch.zeros(head_dim + n_more, device=q.device, dtype=q.dtype)
    ones[head_dim] = 1.0
    q = q + ones / scale
    k = k + gate.to(q.dtype)[None, :, None] * ones
    context = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0, :, :, :head_dim]
    return context.transpose(0, 1).reshape(n, n_heads * head_dim)


def _normed(
    x: torch.Tensor, stream: torch.Tensor | None, norm: nn.LayerNorm, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    stream, rows = add_norm(x, stream, norm, kind, dtype)
    return stream, _as_tensor(rows)


def _as_tensor(x: object) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)
    return x


def _block(encoder: Encoder, index: int) -> Block:
    block = encoder.blocks[index]
    assert isinstance(block, Block)
    return block


@contextlib.contextmanager
def _frozen(encoder: Encoder) -> Iterator[None]:
    """No gradients of weights meanwhile: they would cost as much as those that are wanted."""
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
