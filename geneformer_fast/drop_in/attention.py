"""Attention over packed cells under a name of its own among transformers' attention implementations."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from geneformer_kernels import varlen_attention
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells

from geneformer_fast.arguments import checked
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.ragged import Padding

NAME = "geneformer_fast"
# Attribute of a mask that :func:`_mask` made: where its padding is.
_PADDING = "_geneformer_fast_padding"
_told: set[str] = set()


@checked
def register_attention(name: str = NAME) -> str:
    """Make packed attention available to every transformers model that chooses its attention by name.

    Parameters
    ----------
    name
        What to register it as.

    Returns
    -------
    str
        The name, to pass as ``attn_implementation=`` to ``from_pretrained`` or to ``model.set_attn_implementation``.

    Raises
    ------
    UnsupportedError
        This release of transformers has no AttentionInterface, or none that builds masks by name.

    Notes
    -----
    Attention alone is packed: everything else computes on padding too, and padding is removed in every layer.
    :func:`geneformer_fast.accelerate` does better for BERT, which takes attention by name from release 5 on. Masks
    [B, L] are packed; a mask of more axes is handed to torch's attention, with one warning. Causal and cross attention
    are refused.

    Examples
    --------
    >>> name = geneformer_fast.register_attention()  # doctest: +SKIP
    >>> model = BertModel.from_pretrained(folder, attn_implementation=name)  # doctest: +SKIP
    """
    functions = getattr(transformers, "AttentionInterface", None)
    masks = getattr(transformers, "AttentionMaskInterface", None)
    if functions is None or masks is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} chooses neither attention nor masks by name; update "
            "transformers, or use geneformer_fast.accelerate(model)"
        )
    functions.register(name, packed_attention)
    masks.register(name, _mask)
    return name


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """AttentionMaskInterface, called once per forward pass: the mask [B, L] as the user passed it.

    A copy, which every layer is handed and nobody else can change, so that the device is asked once where padding is.
    """
    return attention_mask if attention_mask is None or attention_mask.ndim != 2 else _prepared(attention_mask)


@torch.compiler.disable
def _prepared(mask: torch.Tensor) -> torch.Tensor:
    own = mask.clone()
    setattr(own, _PADDING, Padding.of(own, own.shape[0], own.shape[1], own.device))
    return own


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """AttentionInterface: query, key, value [B, H, L, D] -> context [B, L, H, D], zero at padding; no weights."""
    causal = kwargs.get("is_causal")
    if getattr(module, "is_causal", False) if causal is None else causal:
        raise UnsupportedError(f"{NAME} attention is for encoders; {type(module).__name__} asks for a causal mask")
    n_cells, _, length, _ = query.shape
    if key.shape[2] != length:
        raise UnsupportedError(f"{NAME} attention is self-attention; {type(module).__name__} attends to other tokens")
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attention_mask is not None and attention_mask.ndim != 2:
        _tell_once(f"an attention mask of {attention_mask.ndim} axes cannot be packed: torch's attention runs instead")
        context = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return context.transpose(1, 2), None
    padding = _padding_of(attention_mask, n_cells, length, query.device)
    q, k, v = (padding.pack(each.transpose(1, 2)) for each in (query, key, value))
    cells = AttentionCells(padding.cu_seqlens, len(q), length)
    context = varlen_attention(q, k, v, cu_seqlens=cells, scale=scaling, dropout_p=dropout)
    return padding.unpack(context), None


def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: Padding,
    keys: torch.Tensor | None,
    dropout_p: float,
    wants_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the stock model's shapes: packed q, k, v [T, H, D] -> context [T, H, D], and weights if wanted.

    ``keys`` [B, L] says who is attended to where padding is among the T rows. The weights [B, H, L, L] are what the
    context is made of, so that they get a gradient, and are zero from and to places that hold no row.
    """
    q, k, v = (padding.unpack(each).transpose(1, 2) for each in (q, k, v))
    if not wants_weights:
        mask = None if keys is None else keys[:, None, None, :]
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return padding.pack(context.transpose(1, 2)), None
    is_row = padding.unpack(torch.ones(len(padding.columns()), dtype=torch.bool, device=q.device))
    pairs = (is_row[:, :, None] & (is_row if keys is None else keys)[:, None, :])[:, None]
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~pairs, 0.0)
    if not torch.is_autocast_enabled(q.device.type):
        weights = weights.to(q.dtype)
    return padding.pack((weights @ v).transpose(1, 2)), weights


@torch.compiler.disable
def _padding_of(mask: torch.Tensor | None, n_cells: int, length: int, device: torch.device) -> Padding:
    known: Padding | None = getattr(mask, _PADDING, None)
    if known is not None and (known.n_cells, known.length, known.cu_seqlens.device) == (n_cells, length, device):
        return known
    return Padding.of(mask, n_cells, length, device)


@torch.compiler.disable
def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{NAME}: {reason}", UserWarning, stacklevel=3)
