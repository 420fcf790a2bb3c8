"""How much is computed: operations of matrix products, and the least memory traffic, from the cells' lengths.

A multiplication and an addition are two operations; what is no product (LayerNorm, softmax, activations) counts as
none.

- Linear layers: ``2 * rows * k * n``. Attention: ``4 * C * sum(L**2)`` per layer, two products of every cell with
  itself. The head: only the rows it is given.
- The *model's* operations are those the result needs: real tokens, each cell's own length. In training three times the
  forward pass (Chowdhery et al., arXiv:2204.02311), less where something is frozen: the gradient of a layer's input is
  needed where anything before it learns, that of a weight where the weight does.
- The *hardware's* operations count what was computed: padding, whose attention is that of the padded rectangle, and one
  more forward pass of blocks that are recomputed. What a kernel computes again within one operation (scores in the
  backward pass of attention, logits in that of the loss) is not counted: it differs between kernels.

Weights of eight bits multiply as often as others; what they are held against is the ceiling of int8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.profiling.figures import Figure, Missing
from geneformer_fast.profiling.flops.anatomy import Anatomy, anatomy, anatomy_of
from geneformer_fast.profiling.flops.needs import SIZES, Need, needs
from geneformer_fast.profiling.flops.products import Rows, operations_of, products


@dataclass(frozen=True)
class Batch:
    """What one forward pass computed.

    Attributes
    ----------
    lengths
        [B] real tokens of each cell.
    positions
        Computed rows, padding among them. None: the padded rectangle where there is one, else the real tokens.
    padded_to
        Length all cells were padded to; None: each cell has its own, as in a packed batch.
    head_rows
        Rows the head computed.
    asked_rows
        Those among them that somebody wanted; None: as many as there are real tokens, at most.
    """

    lengths: np.ndarray
    positions: int | None = None
    padded_to: int | None = None
    head_rows: int = 0
    asked_rows: int | None = None

    def __post_init__(self) -> None:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        object.__setattr__(self, "lengths", lengths)
        if lengths.ndim != 1 or (lengths < 0).any():
            raise ValueError("lengths must be one number per cell, none below 0")
        if self.padded_to is not None and lengths.size and self.padded_to < lengths.max():
            raise ValueError(f"a cell of {lengths.max()} tokens cannot have been padded to {self.padded_to}")

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return int(self.lengths.sum())

    @property
    def n_positions(self) -> int:
        """Computed rows."""
        if self.positions is not None:
            return self.positions
        return self.n_tokens if self.padded_to is None else len(self.lengths) * self.padded_to

    @property
    def real(self) -> Rows:
        """What the result needs."""
        asked = min(self.head_rows, self.n_tokens) if self.asked_rows is None else self.asked_rows
        return Rows(self.n_tokens, int((self.lengths**2).sum()), asked)

    @property
    def computed(self) -> Rows:
        """What was computed."""
        squares = self.real.squares if self.padded_to is None else len(self.lengths) * self.padded_to**2
        return Rows(self.n_positions, squares, self.head_rows)


@dataclass(frozen=True)
class Count:
    """Operations of some batches.

    Attributes
    ----------
    model, hardware
        See :mod:`geneformer_fast.profiling.flops.work`.
    operations
        What each operation that was computed needs, by its name in ``geneformer_kernels`` (with ``" backward"`` behind
        it in a backward pass), ``"embeddings"`` and ``"head"``; none where nothing is known of the dtype.
    """

    model: Figure
    hardware: Figure
    operations: dict[str, Need]


def count(
    config: EncoderConfig,
    batches: Iterable[Batch],
    *,
    is_training: bool = False,
    is_recomputing: bool = False,
    n_layers: int | None = None,
    dtype: str | None = None,
    head: str | None = None,
    n_classes: int = 2,
    compute_dtype: str | None = None,
) -> Count:
    """Operations of some batches through an encoder in which everything learns; see :func:`count_of` for others.

    Parameters
    ----------
    config
        The geometry.
    batches
        One for every forward pass.
    is_training
        Whether each had its backward pass.
    is_recomputing
        Whether blocks were computed again there.
    n_layers
        Blocks that are computed; None for all. For the penultimate layer that is one less.
    dtype
        Of products: a name as torch has it, ``"int8"`` or ``"fp8"``; None is float32.
    head
        ``"mlm"``, ``"cells"``, ``"genes"``, ``"pooler"`` or None; its rows are those of the batches.
    n_classes
        Of a head of classes.
    compute_dtype
        Beside products of eight bits, what everything else is in; None is float32.
    """
    encoder = anatomy(config, n_layers=n_layers, head=head, n_classes=n_classes)
    return count_of(
        encoder,
        batches,
        is_training=is_training,
        is_recomputing=is_recomputing,
        dtype=dtype,
        compute_dtype=compute_dtype,
    )


def count_of(
    encoder: Anatomy,
    batches: Iterable[Batch],
    *,
    is_training: bool = False,
    is_recomputing: bool = False,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    joined: str | None = None,
) -> Count:
    """As :func:`count`, with what of the encoder learns.

    ``joined`` is the operation that did the work of several in the passes that were watched
    (:func:`geneformer_fast.profiling.flops.needs.joined_in`).
    """
    real, computed, n_passes = Rows(), Rows(), 0
    for batch in batches:
        real, computed, n_passes = real + batch.real, computed + batch.computed, n_passes + 1
    steps, width = list(products(encoder)), encoder.config.width
    is_again, dtype, compute_dtype = is_training and is_recomputing, dtype or "float32", compute_dtype or "float32"
    operations = {}
    if {dtype, compute_dtype} <= SIZES.keys():
        operations = needs(
            encoder, computed, n_passes, is_training=is_training, is_recomputing=is_again, dtype=dtype,
            compute_dtype=compute_dtype, joined=joined,
        )  # fmt: skip
    return Count(
        operations_of(steps, real, width, is_training=is_training),
        operations_of(steps, computed, width, is_training=is_training, is_recomputing=is_again),
        operations,
    )


def encoder_flops(config: EncoderConfig, n_tokens: float, sum_of_squares: float, n_layers: int | None = None) -> float:
    """Operations of one forward pass through input layer and blocks, without head.

    Parameters
    ----------
    config
        The geometry.
    n_tokens
        Tokens of all cells.
    sum_of_squares
        Sum of the squared lengths of all cells, which is what attention costs.
    n_layers
        Blocks that are computed; None for all.
    """
    steps = products(anatomy(config, n_layers=n_layers))
    return operations_of(steps, Rows(n_tokens, sum_of_squares), config.width)


def head_flops(config: EncoderConfig, n_rows: float, head: str = "mlm", n_classes: int = 2) -> float:
    """Operations of a head for so many rows: genes, or cells, as the head reads them."""
    steps = products(anatomy(config, n_layers=0, head=head, n_classes=n_classes))
    return operations_of((step for step in steps if step.part == "head"), Rows(head=n_rows), config.width)


def encoder_in(model: nn.Module) -> Encoder | Missing:
    """The encoder that does all of a model's products."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    if len(encoders) != 1:
        return Missing(f"{type(model).__qualname__} holds {len(encoders) or 'no'} encoders of geneformer_fast")
    own = {id(parameter) for parameter in encoders[0].parameters()}
    other = [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and id(parameter) not in own]
    if other:
        return Missing(f"{type(model).__qualname__} holds {other[0]} beside its encoder, whose work is not known")
    return encoders[0]


def anatomy_in(model: nn.Module, *, n_layers: int | None = None) -> Anatomy | Missing:
    """The anatomy of the encoder that does all of a model's products."""
    encoder = encoder_in(model)
    return encoder if isinstance(encoder, Missing) else anatomy_of(encoder, n_layers=n_layers)
