"""The whole transformer: one block for every family, packed from end to end, with a float32 residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from geneformer_kernels import (
    attention_cells,
    attention_scores,
    feed_forward,
    feed_forward_layernorm,
    linear,
    residual_layernorm,
    varlen_attention_qkv,
)
from geneformer_kernels.arguments import FLOATS, check_ids, check_tensor
from geneformer_kernels.dispatch import as_chosen_now
from geneformer_kernels.ops.feed_forward.op import has_layernorm_inside
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from torch import nn
from torch.utils.checkpoint import checkpoint

from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.embeddings import RankTokens, input_layer
from geneformer_fast.heads import CellClassifier, MLMHead, Pooler, make_head
from geneformer_fast.ragged import Ragged


class Linear(nn.Linear):
    """A linear layer by ``geneformer_kernels.linear``, which multiplies bfloat16 faster on a CPU in inference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, N]."""
        return linear(x, self.weight, self.bias)


class Block(nn.Module):
    """Attention and feed-forward with their residual additions, post- or pre-norm.

    The stream [T, C] is float32 and carries the residual; ``x`` [T, C] is what the next matrix product reads. In
    post-norm both are the last LayerNorm's output; in pre-norm ``x`` is the normalised stream, made by the LayerNorm
    that belongs to the sublayer about to run.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ff_width * (2 if config.activation == "swiglu" else 1))
        self.down = nn.Linear(config.ff_width, config.width)
        self.ff_norm = nn.LayerNorm(config.width, eps=config.eps)

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> queries, keys and values [T, 3, H, D]."""
        return self.qkv(x).view(len(x), 3, self.config.n_heads, self.config.head_dim)

    def attend(self, x: torch.Tensor, cells: AttentionCells) -> torch.Tensor:
        """Self-attention of [T, C] within each cell, projected back to [T, C]."""
        config = self.config
        qkv = self.projected(x)
        dropout_p = config.attention_dropout if self.training else 0.0
        context = varlen_attention_qkv(qkv, cu_seqlens=cells, dropout_p=dropout_p)
        return self.out(context.reshape(len(x), config.width))

    def forward(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        cells: AttentionCells,
        next_norm: nn.LayerNorm | None,
        is_final: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, x) -> (stream, x).

        ``cells`` are those of this forward pass, the same for every block. ``next_norm`` is the pre-norm LayerNorm of
        whatever comes after this block; ``is_final``: it is the encoder's last one, whose result is the stream.
        """
        dropout_p = self.config.dropout if self.training else 0.0
        first_norm, second_norm = (
            (self.attention_norm, self.ff_norm) if self.config.norm == "post" else (self.ff_norm, next_norm)
        )
        second_kind = "post" if is_final else self.config.norm
        stream, x = add_norm(self.attend(x, cells), stream, first_norm, self.config.norm, x.dtype, dropout_p)
        weights = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        activation = self.config.activation
        if second_norm is not None and has_layernorm_inside(x, self.config.ff_width, activation=activation):
            return feed_forward_layernorm(
                x, stream, *weights, second_norm.weight, second_norm.bias, activation=activation, eps=second_norm.eps,
                norm=second_kind, out_dtype=x.dtype, dropout_p=dropout_p,
            )  # fmt: skip
        out = feed_forward(x, *weights, activation=activation)
        if second_norm is None:
            out = F.dropout(out, dropout_p)
            return stream + out, out
        return add_norm(out, stream, second_norm, second_kind, x.dtype, dropout_p)


class Encoder(nn.Module):
    """A transformer encoder over packed cells, with an optional head.

    Parameters
    ----------
    config
        Geometry and variants; :meth:`EncoderConfig.preset` holds the published models.
    head
        ``"mlm"``, ``"cells"``, ``"genes"``, ``"pooler"`` or None.
    n_classes
        Classes of a ``"cells"`` or ``"genes"`` head.

    Notes
    -----
    Call it with a :class:`Ragged` of tokens; it returns a :class:`Ragged` of float32 hidden states. Matrix products run
    in the dtype of the blocks' weights (:meth:`cast`) or under ``torch.autocast``; LayerNorm, the residual stream and
    the embedding tables stay float32.

    References
    ----------
    Theodoris et al., "Transfer learning enables predictions in network biology", Nature 618 (2023); Devlin et al.,
    "BERT", arXiv:1810.04805.
    """

    def __init__(self, config: EncoderConfig, head: str | None = None, *, n_classes: int = 2) -> None:
        super().__init__()
        self.config = config
        self.embeddings = input_layer(config)
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.eps) if config.final_norm else None
        self.head = make_head(head, config, n_classes)
        #: Whether training keeps a block's input only and computes the block again in the backward pass.
        self.is_recomputing = False
        # What a checkpoint held besides the parameters (checkpoints.hf.Source); saving gives it back.
        self.source: Any = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: normal with ``config.init_std``, biases 0, LayerNorm 1 and 0, the padding token's row 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.config.inputs == "tokens" and 0 <= self.config.pad_id < self.config.vocab_size:
            self.token_table[self.config.pad_id].zero_()

    @property
    def token_table(self) -> torch.Tensor:
        """[V, C], the token embeddings."""
        if not isinstance(self.embeddings, RankTokens):
            raise AttributeError("an encoder over values has no token table")
        return self.embeddings.token.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._block(0).qkv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self._block(0).qkv.weight.dtype

    def cast(self, dtype: str | torch.dtype | None) -> Encoder:
        """Set the dtype of matrix products in place (see :func:`geneformer_fast.config.matmul_dtype`).

        Weights of blocks and head are converted; LayerNorm and embedding tables stay float32, or become float64 when
        the products do.
        """
        dtype = matmul_dtype(dtype, self.device)
        if dtype is None:
            return self
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = {id(module) for part in (self.blocks, self.head) if part is not None for module in part.modules()}
        # One module after another, each at once into its dtype: there is never a second copy of all weights.
        for module in self.modules():
            is_product = isinstance(module, nn.Linear) and id(module) in narrow
            _cast_own(module, dtype if is_product else wide)
        return self

    def forward(self, tokens: Ragged, *, layer: str | int = "last") -> Ragged:
        """Hidden states after a layer; blocks beyond it are not computed.

        Parameters
        ----------
        tokens
            Packed tokens (or values, for ``inputs="values"``), [T].
        layer
            ``"last"``, ``"penultimate"``, ``"embeddings"`` or an int from 0 (:meth:`EncoderConfig.layer_index`).

        Returns
        -------
        Ragged
            [T, C] float32 (float64 in a float64 model).

        Raises
        ------
        VocabularyError
            A token id or a cell's length is outside the model's tables.
        """
        stream, x = self._embed(tokens)
        cells = self._cells(tokens, x)
        for index in range(self.config.layer_index(layer)):
            stream, x = self._step(index, stream, x, cells)
        return tokens.with_values(stream)

    def hidden_states(self, tokens: Ragged) -> list[Ragged]:
        """The input of block 0 and the output of every block, n_layers + 1 in all, as transformers lists them.

        The last one has passed the final norm where there is one; those before it have not.
        """
        stream, x = self._embed(tokens)
        states, cells = [tokens.with_values(stream)], self._cells(tokens, x)
        for index in range(self.config.n_layers):
            stream, x = self._step(index, stream, x, cells)
            states.append(tokens.with_values(stream))
        return states

    def attention_weights(self, tokens: Ragged, *, layer: str | int = "last") -> list[torch.Tensor]:
        """The attention weights within one layer, for looking at a few cells.

        Parameters
        ----------
        tokens
            Packed tokens (or values), [T].
        layer
            As in :meth:`forward`; ``"embeddings"`` have no attention.

        Returns
        -------
        list of torch.Tensor
            Per cell [H, L, L], rows that add up to 1; without dropout. Memory grows with the square of the length: 4
            heads of 2,048 tokens take 67 MB per cell in float32.

        Raises
        ------
        ValueError
            ``layer`` is ``"embeddings"``.
        """
        index = self.config.layer_index(layer)
        if index == 0:
            raise ValueError("the embeddings have no attention: name a layer")
        stream, x = self._embed(tokens)
        cells = self._cells(tokens, x)
        for before in range(index - 1):
            stream, x = self._step(before, stream, x, cells)
        q, k, _ = self._block(index - 1).projected(x).unbind(1)
        return attention_scores(q, k, cu_seqlens=cells)

    def logits(self, hidden: Ragged, rows: torch.Tensor | None = None) -> torch.Tensor:
        """What the head says about hidden states.

        Parameters
        ----------
        hidden
            Output of the last layer.
        rows
            [R] indices or [T] booleans: the rows wanted. None means all of them for ``"mlm"`` and ``"genes"``; the
            heads that read one token per cell (``"cells"``, ``"pooler"``) take the first of each and no ``rows``.

        Returns
        -------
        torch.Tensor
            [R, V], [R, n_classes], [B, n_classes] or [B, C].
        """
        self._check_hidden(hidden)
        if self.head is None:
            raise ValueError('this encoder has no head; make it with head="mlm", "cells", "genes" or "pooler"')
        if isinstance(self.head, CellClassifier | Pooler):
            if rows is not None:
                raise ValueError("this head reads the first token of each cell; rows cannot be chosen")
            return self.head(hidden.values[hidden.starts.long()])
        wanted = hidden.values if rows is None else _rows_of(hidden, rows)
        if isinstance(self.head, MLMHead):
            return self.head(wanted, self.token_table if self.config.tied_decoder else None)
        return self.head(wanted)

    def mlm_loss(
        self, hidden: Ragged, rows: torch.Tensor, targets: torch.Tensor, *, reduction: str = "mean"
    ) -> torch.Tensor:
        """Cross entropy of the masked genes; the logits are never written.

        Parameters
        ----------
        hidden
            Output of the last layer.
        rows
            [R] indices of the masked positions in the packed batch.
        targets
            [R] token ids that stood there; -100 leaves a row out.
        reduction
            ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``.

        Returns
        -------
        torch.Tensor
            Float32 scalar, or [R].
        """
        if not isinstance(self.head, MLMHead):
            raise ValueError('this encoder predicts no masked genes; make it with head="mlm"')
        self._check_hidden(hidden)
        table = self.token_table if self.config.tied_decoder else None
        return self.head.loss(_rows_of(hidden, rows), targets, table, reduction=reduction)

    def _check_hidden(self, hidden: Ragged) -> None:
        if not isinstance(hidden, Ragged):
            raise TypeError(f"hidden must be the Ragged that the encoder returned, not {type(hidden).__name__}")
        check_tensor("hidden", hidden.values, FLOATS, n_axes=2)
        if hidden.values.shape[1] != self.config.width:
            raise ValueError(f"hidden {[*hidden.values.shape]} must be [T, {self.config.width}]")

    def _embed(self, tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, x) before the first block."""
        config, work_dtype = self.config, self._work_dtype()
        dropout_p = config.dropout if self.training else 0.0
        stream, x = self.embeddings(tokens, self.embedding_norm, dropout_p, work_dtype)
        if config.norm == "pre":
            _, x = add_norm(stream, None, self._block(0).attention_norm, "pre", work_dtype)
        return stream, x

    def _cells(self, tokens: Ragged, x: torch.Tensor) -> AttentionCells:
        """What attention needs to know of the cells: made once per forward pass, so that no change is missed."""
        config = self.config
        dropout_p = config.attention_dropout if self.training else 0.0
        return attention_cells(
            tokens.cu_seqlens, x, head_dim=config.head_dim, longest=tokens.max_len, dropout_p=dropout_p
        )

    def _step(
        self, index: int, stream: torch.Tensor, x: torch.Tensor, cells: AttentionCells
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, x) after block ``index``; after the last block the stream has passed the final norm, if any."""
        is_final = self.config.norm == "pre" and index + 1 == self.config.n_layers and self.final_norm is not None
        inputs = (stream, x, cells, self.final_norm if is_final else self._norm_after(index), is_final)
        if self.is_recomputing and self.training and torch.is_grad_enabled():
            block: Callable[..., Any] = self._block(index)
            if not torch.compiler.is_compiling():  # a compiled model's choices are made already
                block = as_chosen_now(block)
            stream, x = checkpoint(block, *inputs, use_reentrant=False)
        else:
            stream, x = self.blocks[index](*inputs)
        if index + 1 == self.config.n_layers and self.final_norm is not None and not is_final:
            stream, x = add_norm(stream, None, self.final_norm, "post", x.dtype)
        return stream, x

    def _norm_after(self, index: int) -> nn.LayerNorm | None:
        """The pre-norm LayerNorm that reads the stream after block ``index``, fused into that block's addition."""
        if self.config.norm == "post" or index + 1 == self.config.n_layers:
            return None
        return self._block(index + 1).attention_norm

    def _block(self, index: int) -> Block:
        return cast(Block, self.blocks[index])

    def _work_dtype(self) -> torch.dtype:
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.dtype


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert what a module itself holds, and not what its children do."""
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)


def _rows_of(hidden: Ragged, rows: torch.Tensor) -> torch.Tensor:
    """[R, C], the rows that indices [R] or booleans [T] name."""
    check_tensor("rows", rows, (torch.int32, torch.int64, torch.bool), n_axes=1, device=hidden.values.device)
    if rows.dtype == torch.bool:
        if len(rows) != hidden.n_tokens:
            raise ValueError(f"rows [{len(rows)}] must name {hidden.n_tokens} tokens, or be indices of them")
    else:  # negative ones would count from the end
        check_ids("rows", rows, hidden.n_tokens, "the tokens")
    return hidden.values[rows]


def add_norm(
    x: torch.Tensor,
    stream: torch.Tensor | None,
    norm: nn.LayerNorm,
    kind: str,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the stream and normalise with a module's parameters; see ``geneformer_kernels.residual_layernorm``."""
    return residual_layernorm(
        x, stream, norm.weight, norm.bias, eps=norm.eps, norm=kind, out_dtype=out_dtype, dropout_p=dropout_p
    )
