"""The whole transformer: one block for every family, packed from end to end, with a float32 residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from geneformer_kernels import attention_cells, attention_scores
from geneformer_kernels.arguments import FLOATS, check_ids, check_tensor
from geneformer_kernels.dispatch import as_chosen_now
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ranges import ranged, within
from torch import nn
from torch.utils.checkpoint import checkpoint

from geneformer_fast import random_features
from geneformer_fast.block import Block, FirstTokens, Projected, add_norm, products_dtype
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.embeddings import GenesAndValues, RankTokens, input_layer
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.heads import MLMHead, make_head, reads_of
from geneformer_fast.layers import (
    Quantization,
    QuantizedEmbedding,
    Rows,
    check_compute_dtype,
    compute_dtype,
    quantization_of,
    wants_rows,
)
from geneformer_fast.ragged import Ragged


class Encoder(nn.Module):
    """A transformer encoder over packed cells, with an optional head.

    Parameters
    ----------
    config
        Geometry and variants; :meth:`EncoderConfig.preset` holds the published models.
    head
        ``"mlm"``, ``"cells"``, ``"genes"``, ``"pooler"``, a name of the model's family, or None.
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
        if self.quantization is not None:
            raise UnsupportedError("a quantized encoder cannot be given fresh weights")
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, Block) and module.projection is not None:
                random_features.draw_(module.projection)
        if isinstance(self.embeddings, RankTokens) and 0 <= self.config.pad_id < self.config.vocab_size:
            self.token_table[self.config.pad_id].zero_()

    @property
    def token_table(self) -> torch.Tensor:
        """[V, C], the token embeddings; of a quantized encoder a wide copy."""
        if not isinstance(self.embeddings, RankTokens | GenesAndValues):
            raise AttributeError("an encoder over values has no token table")
        return self.embeddings.token.weight

    @property
    def quantization(self) -> Quantization | None:
        """How the weights are quantized (:func:`geneformer_fast.quantize`); None where they are not."""
        return quantization_of(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._block(0).attention_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return compute_dtype(self._block(0).qkv)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Encoder:
        """``.to``, ``.half`` and others; refused as a whole where layers of eight bits would refuse theirs."""
        if self.quantization is not None:
            check_compute_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype)
        return super()._apply(fn, recurse)

    def cast(self, dtype: str | torch.dtype | None) -> Encoder:
        """Set the dtype of matrix products in place (see :func:`geneformer_fast.config.matmul_dtype`).

        Weights of blocks and head are converted; LayerNorm and embedding tables stay float32, or become float64 when
        the products do. Weights of eight bits stay what they are.
        """
        dtype = matmul_dtype(dtype, self.device)
        if dtype is None:
            return self
        if self.quantization is not None:
            check_compute_dtype(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = {id(module) for part in (self.blocks, self.head) if part is not None for module in part.modules()}
        # One module after another, each at once into its dtype: there is never a second copy of all weights.
        for module in self.modules():
            is_product = isinstance(module, nn.Linear) and id(module) in narrow
            _cast_own(module, dtype if is_product else wide)
        return self

    def forward(self, tokens: Ragged, *, layer: str | int = "last", is_repetitive: bool = False) -> Ragged:
        """Hidden states after a layer; blocks beyond it are not computed.

        Parameters
        ----------
        tokens
            Packed tokens (or values, for ``inputs="values"``), [T].
        layer
            ``"last"``, ``"penultimate"``, ``"embeddings"`` or an int from 0 (:meth:`EncoderConfig.layer_index`).
        is_repetitive
            Whether many tokens stand in the same places of several cells: on a CPU, and in inference, what depends on
            token and place alone is then computed once for them (embeddings, and queries, keys and values of block 0).

        Returns
        -------
        Ragged
            [T, C] float32 (float64 in a float64 model).

        Raises
        ------
        VocabularyError
            A token id or a cell's length is outside the model's tables.
        """
        n_blocks = self.config.layer_index(layer)
        stream, x = self._embed_once(tokens) if is_repetitive and n_blocks else self._embed(tokens)
        cells = self._cells(tokens, stream, x)
        for index in range(n_blocks):
            stream, x = self._step(index, stream, x, cells)
        return tokens.with_values(stream)

    def first_tokens(self, tokens: Ragged, *, layer: str | int = "last", is_repetitive: bool = False) -> torch.Tensor:
        """Hidden states of each cell's first token after a layer, [B, C], for inference.

        As :meth:`forward` gives them, but the layer's block computes keys and values only for all other tokens. No cell
        may be empty.
        """
        n_blocks = self.config.layer_index(layer)
        stream, x = self._embed_once(tokens) if is_repetitive and n_blocks else self._embed(tokens)
        starts = tokens.starts.long()
        if not n_blocks:
            return stream[starts]
        cells = self._cells(tokens, stream, x)
        for index in range(n_blocks - 1):
            stream, x = self._step(index, stream, x, cells)
        readers = FirstTokens(starts, tokens.cell_index(), tokens.lengths.long())
        return self._step(n_blocks - 1, stream[starts], x, readers)[0]

    def hidden_states(self, tokens: Ragged) -> list[Ragged]:
        """The input of block 0 and the output of every block, n_layers + 1 in all, as transformers lists them.

        The last one has passed the final norm where there is one; those before it have not.
        """
        stream, x = self._embed(tokens)
        states, cells = [tokens.with_values(stream)], self._cells(tokens, stream, x)
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
        if self.config.attention == "favor":
            raise ValueError("linear attention never has the weights of pairs of tokens, so there are none to look at")
        stream, x = self._embed(tokens)
        cells = self._cells(tokens, stream, x)
        for before in range(index - 1):
            stream, x = self._step(before, stream, x, cells)
        q, k, _ = self._block(index - 1).projected(x).unbind(1)
        return attention_scores(q, k, cu_seqlens=cells)

    @ranged("head")
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
        reads = reads_of(self.head)
        if reads != "rows" and rows is not None:
            what = "the first token of each cell" if reads == "first" else "whole cells"
            raise ValueError(f"this head reads {what}; rows cannot be chosen")
        if reads == "cells":
            return self.head(hidden)
        if reads == "first":
            return self.head(hidden.values[hidden.starts.long()])
        wanted = hidden.values if rows is None else _rows_of(hidden, rows)
        if isinstance(self.head, MLMHead):
            return self.head(wanted, self._tied_table())
        return self.head(wanted)

    @ranged("head")
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
        return self.head.loss(_rows_of(hidden, rows), targets, self._tied_table(), reduction=reduction)

    def _tied_table(self) -> torch.Tensor | QuantizedEmbedding | None:
        """The token table, for a decoder that has no weights of its own."""
        if not self.config.tied_decoder or not isinstance(self.embeddings, RankTokens):
            return None
        token = self.embeddings.token
        return token if isinstance(token, QuantizedEmbedding) else token.weight

    def _check_hidden(self, hidden: Ragged) -> None:
        if not isinstance(hidden, Ragged):
            raise TypeError(f"hidden must be the Ragged that the encoder returned, not {type(hidden).__name__}")
        check_tensor("hidden", hidden.values, FLOATS, n_axes=2)
        if hidden.values.shape[1] != self.config.width:
            raise ValueError(f"hidden {[*hidden.values.shape]} must be [T, {self.config.width}]")

    def _embed_once(self, tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor | Rows | Projected]:
        """(stream, x) before the first block; each token in each place is computed once where that is less."""
        is_counted = isinstance(self.embeddings, RankTokens) and tokens.values.device.type == "cpu"
        if not is_counted or self.training or torch.is_grad_enabled():
            return self._embed(tokens)
        most = self.config.max_len
        keys, index = torch.unique(tokens.values * most + tokens.positions(), return_inverse=True)
        if len(keys) > tokens.n_tokens // 2:
            return self._embed(tokens)
        bounds = torch.arange(len(keys) + 1, dtype=torch.int32)
        stream, x = self._embed(Ragged(keys // most, bounds, 1), keys % most)
        first = self._block(0)
        qkv = first.projected(x)
        spread = qkv.flatten(1).index_select(0, index).view(-1, *qkv.shape[1:])
        return stream.index_select(0, index), Projected(spread, products_dtype(first.qkv, x))

    @ranged("embeddings")
    def _embed(self, tokens: Ragged, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) before the first block."""
        config, work_dtype, first = self.config, self._work_dtype(), self._block(0)
        dropout_p = config.dropout if self.training else 0.0
        is_float32 = config.norm == "post" and wants_rows(first.qkv)  # which the layer rounds itself
        x: torch.Tensor | Rows
        out_dtype = torch.float32 if is_float32 else work_dtype
        more = {} if positions is None else {"positions": positions}
        stream, x = self.embeddings(tokens, self.embedding_norm, dropout_p, out_dtype, first.qkv, **more)
        if config.norm == "pre":
            _, x = add_norm(stream, None, first.attention_norm, "pre", work_dtype, reader=first.qkv)
        return stream, x

    def _cells(self, tokens: Ragged, stream: torch.Tensor, x: torch.Tensor | Rows | Projected) -> AttentionCells:
        """What attention needs to know of the cells: made once per forward pass, so that no change is missed."""
        config = self.config
        if config.attention == "favor":
            return AttentionCells(tokens.cu_seqlens, len(stream), tokens.max_len).to(stream.device)
        dropout_p = config.attention_dropout if self.training else 0.0
        return attention_cells(
            tokens.cu_seqlens, stream, head_dim=config.head_dim, longest=tokens.max_len, dropout_p=dropout_p,
            dtype=products_dtype(self._block(0).qkv, x),
        )  # fmt: skip

    def _step(
        self,
        index: int,
        stream: torch.Tensor,
        x: torch.Tensor | Rows | Projected,
        cells: AttentionCells | FirstTokens,
    ) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) after block ``index``; after the last block the stream has passed the final norm, if any."""
        is_last = index + 1 == self.config.n_layers
        is_final = self.config.norm == "pre" and is_last and self.final_norm is not None
        next_norm = self.final_norm if is_final else self._norm_after(index)
        inputs = (stream, x, cells, next_norm, is_final, None if is_last else self._block(index + 1).qkv)
        name = f"block {index}"
        if self.is_recomputing and self.training and torch.is_grad_enabled():
            block: Callable[..., Any] = self._block(index)
            if not torch.compiler.is_compiling():  # a compiled model's choices are made already
                block = as_chosen_now(block)
            stream, x = within(name, checkpoint, block, *inputs, use_reentrant=False)
        else:
            stream, x = within(name, self.blocks[index], *inputs)
        if is_last and self.final_norm is not None and not is_final:
            assert isinstance(x, torch.Tensor)
            stream, x = add_norm(stream, None, self.final_norm, "post", x.dtype)
        assert not isinstance(x, Projected)
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
