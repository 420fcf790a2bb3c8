"""Long batches on a CPU: what is computed of every row by itself is computed for some thousand rows at a time.

A cell of 19,266 values has 520 MB of hidden units in a block of AIDO.Cell-100M, and a piece of it 110 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from geneformer_fast.layers import Rows

#: Rows of a piece. Batches of up to twice as many, as all of Geneformer's are by default, are computed at once.
PIECE_ROWS = 4096


def is_nothing_learning() -> bool:
    """Whether results may be written in place: no gradient is wanted, and no compiler looks."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def is_long(rows: torch.Tensor) -> bool:
    """Whether rows are computed in pieces."""
    return is_long_batch(len(rows)) and rows.device.type == "cpu" and is_nothing_learning()


def is_long_batch(n_rows: int) -> bool:
    """Whether so many rows are more than are computed at once on a CPU."""
    return n_rows > 2 * PIECE_ROWS


def in_pieces(
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor | Rows]], *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | Rows]:
    """What ``compute`` makes of rows, a piece after the other; two results that are one tensor stay one."""
    n_rows = len(inputs[0])
    whole: tuple[Any, Any] | None = None
    for start in range(0, n_rows, PIECE_ROWS):
        piece = slice(start, start + PIECE_ROWS)
        first, second = compute(*(rows[piece] for rows in inputs))
        if whole is None:
            room = _room(first, n_rows)
            whole = room, room if second is first else _room(second, n_rows)
        _put(whole[0], first, piece)
        if second is not first:
            _put(whole[1], second, piece)
    assert whole is not None
    return whole


def _room(part: Any, n_rows: int) -> Any:
    if isinstance(part, Rows):
        return Rows(*(_room(each, n_rows) for each in part))
    return part.new_empty(n_rows, *part.shape[1:])


def _put(whole: Any, part: Any, piece: slice) -> None:
    if isinstance(whole, Rows):
        whole.q[piece], whole.scale[piece] = part.q, part.scale
    else:
        whole[piece] = part
