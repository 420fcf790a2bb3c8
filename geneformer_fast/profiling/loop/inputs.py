"""How long the cells of a step are, and what they were padded to: told, or read from what a model was called with."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.subject import unwrapped
from geneformer_fast.ragged import Ragged

Lengths = np.ndarray | torch.Tensor
# Stands, in lengths that are still on a device, for a mask that held something else than 0 and 1.
_NO_MASK = -1
_IGNORED = -100  # a label that asks for nothing, as transformers has it


@dataclass(frozen=True)
class Seen:
    """The cells of one forward pass.

    Attributes
    ----------
    n_cells
        How many.
    lengths
        [n_cells] real tokens of each, on whichever device they were found; None where there are no tokens.
    padded_to
        Width of the rectangle that was computed; None where nothing was padded.
    is_rectangle_known
        Whether ``padded_to`` says what was computed; lengths alone do not tell.
    head_rows
        Rows that the head was asked for; None where nobody said.
    """

    n_cells: int
    lengths: Lengths | None = None
    padded_to: int | None = None
    is_rectangle_known: bool = True
    head_rows: int | torch.Tensor | None = None


def told_lengths(lengths: Any) -> Lengths:
    """Lengths as whole numbers [B].

    Raises
    ------
    ProfileError
        They are something else, negative, or NaN.
    """
    if isinstance(lengths, torch.Tensor) and lengths.device.type != "cpu":
        if lengths.ndim != 1 or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
            raise ProfileError(f"lengths must be whole numbers, one for each cell, not {_kind(lengths)}")
        return lengths.detach().long()
    try:
        found = np.asarray(lengths.detach() if isinstance(lengths, torch.Tensor) else lengths)
    except (TypeError, ValueError, RuntimeError):
        found = np.empty(0, dtype=object)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size) or not _is_list(lengths):
        raise ProfileError(f"lengths must be whole numbers, one for each cell{_odd_one(lengths, found)}")
    if found.size and found.min() < 0:
        raise ProfileError(f"lengths must not be negative: there is {found.min()} among them")
    return found.astype(np.int64)


def told_mask(mask: Any) -> tuple[Lengths, int]:
    """Lengths, and the width of the batch, of a mask that is 1 at real tokens and 0 at padding.

    Raises
    ------
    ProfileError
        It is something else, such as a mask for each head or one that is added to scores. Values on a card are looked
        at later (:func:`on_host`), so that nobody waits for it.
    """
    try:
        found = mask.detach() if isinstance(mask, torch.Tensor) else torch.as_tensor(np.asarray(mask))
    except (TypeError, ValueError, RuntimeError):
        raise ProfileError(f"attention_mask must be [cells, longest], 1 at tokens, not {_kind(mask)}") from None
    if found.ndim != 2 or found.is_complex():
        raise ProfileError(
            f"attention_mask must be [cells, longest], 1 at tokens and 0 at padding, not {_kind(mask)}; for other "
            "masks give lengths="
        )
    is_token = found == 1
    is_other = (found != 0) & ~is_token
    lengths = torch.where(is_other.any(), _NO_MASK, is_token.sum(1))
    width = found.shape[1]
    return (_checked(lengths.numpy()) if lengths.device.type == "cpu" else lengths), width


def on_host(seen: Seen) -> Seen:
    """The same with its lengths and rows on the host.

    Raises
    ------
    ProfileError
        A mask held something else than 0 and 1, or a length is negative.
    """
    lengths, rows = seen.lengths, seen.head_rows
    if isinstance(lengths, torch.Tensor):
        lengths = lengths.cpu().numpy()
    if lengths is not None:
        lengths = _checked(lengths)
    return dataclasses.replace(seen, lengths=lengths, head_rows=int(rows) if isinstance(rows, torch.Tensor) else rows)


def _checked(lengths: np.ndarray) -> np.ndarray:
    if lengths.size and lengths.min() < 0:
        raise ProfileError(
            "attention_mask must be 1 at tokens and 0 at padding, and holds something else (a mask that is added to "
            "scores, perhaps), or lengths are negative; give lengths= of the cells"
        )
    return lengths


class CallReader:
    """Reads the cells of a model's forward pass from its arguments.

    Parameters
    ----------
    model
        Whose ``forward`` is called; wrappers (DDP, ``torch.compile``) are looked through for the names of arguments.
    is_packed
        Whether padding is taken out before anything is computed.
    """

    def __init__(self, model: nn.Module, *, is_packed: bool) -> None:
        self._names = _names_of(model)
        self._is_packed = is_packed

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen | None:
        """The cells, or None where the arguments do not tell them."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for value in (*args, *kwargs.values()):
            if (tokens := _ragged_in(value)) is not None:
                return Seen(len(tokens.cu_seqlens) - 1, tokens.cu_seqlens.detach().diff().long())
        ids = next((named[name] for name in ("input_ids", "inputs_embeds") if _is_batch(named.get(name))), None)
        mask = named.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            lengths, width = told_mask(mask)
        elif ids is not None and mask is None:
            width = ids.shape[1]
            lengths = np.full(len(ids), width, dtype=np.int64)
        else:  # no mask, or one of another kind
            return None if ids is None else Seen(len(ids), None, ids.shape[1])
        padded_to = None if self._is_packed else width
        return Seen(len(lengths), lengths, padded_to, True, _rows_asked(named.get("labels")))


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes and dtypes of what a model is called with: calls that are alike compute the same."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((name, *_shape_in(value)) for name, value in named)


def passes_of_step(
    found: list[Seen],
    lengths: Any,
    mask: Any,
    n_cells: Any,
    head_rows: Any,
    *,
    is_packed: bool,
    unread: ProfileError | None = None,
) -> list[Seen]:
    """The forward passes of a step, as they were told or seen.

    Parameters
    ----------
    found
        Seen in the model's inputs.
    lengths, mask, n_cells, head_rows
        Told, or None (:meth:`geneformer_fast.profiling.run.Run.step`).
    is_packed
        Whether padding is taken out before anything is computed.
    unread
        Why some inputs could not be read.

    Raises
    ------
    ProfileError
        What was told is of another kind or contradicts itself; or nothing says how many cells there were.
    """
    for name, value in (("n_cells", n_cells), ("head_rows", head_rows)):
        if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0):
            raise ProfileError(f"{name} must be a whole number and not negative, not {value!r}")
    if lengths is not None and mask is not None:
        raise ProfileError("give lengths or attention_mask, not both")
    if mask is not None:
        told, width = told_mask(mask)
        rows = next((each.head_rows for each in found), None) if head_rows is None else int(head_rows)
        passes = [Seen(len(told), told, None if is_packed else width, True, rows)]
    elif lengths is not None:
        passes = _with_rectangles(told_lengths(lengths), found, is_packed)
    elif found:
        passes = found
    elif n_cells is not None:
        passes = [Seen(int(n_cells))]
    else:
        why = "" if unread is None else f" ({unread})"
        raise ProfileError(
            "nobody says what cells this step had: give step() lengths=, attention_mask= or n_cells= (a model's inputs "
            f"are read where they are a Ragged, or input_ids and attention_mask){why}"
        )
    n_found = sum(each.n_cells for each in passes)
    if n_cells is not None and n_cells != n_found:
        raise ProfileError(f"n_cells is {n_cells}, and there are lengths of {n_found} cells")
    if not n_found and passes is not found:
        raise ProfileError("a step of no cells was told: call step() after batches that have some")
    if head_rows is None:
        return passes
    rows_of = [int(head_rows)] + [0] * len(passes)
    return [dataclasses.replace(each, head_rows=rows) for each, rows in zip(passes, rows_of, strict=False)]


def _with_rectangles(lengths: Lengths, found: Sequence[Seen], is_packed: bool) -> list[Seen]:
    """Lengths that were told, divided among the forward passes that were seen, each with its rectangle."""
    if is_packed or not found or sum(each.n_cells for each in found) != len(lengths):
        rows = found[0].head_rows if len(found) == 1 else None
        return [Seen(len(lengths), lengths, None, is_packed, rows)]
    parts, start = [], 0
    for each in found:
        parts.append(dataclasses.replace(each, lengths=lengths[start : start + each.n_cells]))
        start += each.n_cells
    return parts


def _shape_in(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_shape_in(each) for each in value)
    if isinstance(value, dict):
        return tuple((str(name), *_shape_in(each)) for name, each in value.items())
    return (value,) if isinstance(value, str | int | float | None) else (type(value).__name__, id(value))


def _ragged_in(value: Any) -> Ragged | None:
    """Packed cells: the argument itself, or a field of a batch (``batch.tokens``)."""
    if isinstance(value, Ragged):
        return value
    tokens = getattr(value, "tokens", None) if dataclasses.is_dataclass(value) else None
    return tokens if isinstance(tokens, Ragged) else None


def _rows_asked(labels: Any) -> int | torch.Tensor | None:
    """How many tokens have a label; None where labels are of cells, or there are none."""
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.dtype.is_floating_point:
        return None
    rows = (labels != _IGNORED).sum()
    return int(rows) if rows.device.type == "cpu" else rows


def _names_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of ``forward``."""
    try:
        parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def _is_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 2


def _is_list(value: Any) -> bool:
    return not isinstance(value, str | bytes | Mapping)


def _odd_one(lengths: Any, found: np.ndarray) -> str:
    """What is wrong with lengths: ``: 2.5 is among them``, of the first that is no whole number."""
    values = lengths if isinstance(lengths, list | tuple) else found.tolist() if found.ndim == 1 else ()
    odd = [each for each in values if not isinstance(each, numbers.Integral) or isinstance(each, bool)]
    # Of an array of floats that are all whole its dtype says more.
    worst = next(
        (each for each in odd if not _is_whole_float(each)), odd[0] if odd and isinstance(lengths, list) else None
    )
    if worst is None or not _is_list(lengths):
        return f", not {_kind(lengths)}"
    shown = _kind(worst) if not isinstance(worst, numbers.Real) else "NaN" if worst != worst else str(worst)
    return f": {shown} is among them"


def _is_whole_float(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _kind(value: Any) -> str:
    """``a float32 tensor [2, 3]``, ``a str``."""
    if isinstance(value, torch.Tensor | np.ndarray):
        what = "tensor" if isinstance(value, torch.Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {what} {[*value.shape]}"
    return f"a {type(value).__name__}"
