"""The whole transformer: one block for every family, packed from end to end, with a float32 residual stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from geneformer_kernels import feed_forward, linear, residual_layernorm, varlen_attention
from torch import nn

from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.embeddings import RankTokens, input_layer
from geneformer_fast.heads import CellClassifier, MLMHead, Pooler, make_head
from geneformer_fast.ragged import Ragged


class Block(nn.Module):
    """Attention and feed-forward with their residual additions, post- or pre-norm.

    The stream [T, C] is float32 and carries the residual; ``x`` [T, C] is what the next matrix product reads. In
    post-norm both are the last LayerNorm's output; in pre-norm ``x`` is the normalised stream, made by the LayerNorm
    that belongs to the sublayer about to run.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ff_width * (2 if config.activation == "swiglu" else 1))
        self.down = nn.Linear(config.ff_width, config.width)
        self.ff_norm = nn.LayerNorm(config.width, eps=config.eps)

    def attend(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Self-attention of [T, C] within each cell, projected back to [T, C]."""
        config = self.config
        q, k, v = linear(x, self.qkv.weight, self.qkv.bias).view(len(x), 3, config.n_heads, config.head_dim).unbind(1)
        dropout_p = config.attention_dropout if self.training else 0.0
        context = varlen_attention(q, k, v, cu_seqlens=cu_seqlens, dropout_p=dropout_p)
        return self._drop(linear(context.reshape(len(x), config.width), self.out.weight, self.out.bias))

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Feed-forward of [T, C]."""
        out = feed_forward(
            x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, activation=self.config.activation
        )
        return self._drop(out)

    def forward(
        self, stream: torch.Tensor, x: torch.Tensor, cu_seqlens: torch.Tensor, next_norm: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, x) -> (stream, x); ``next_norm`` is the pre-norm LayerNorm of whatever comes after this block."""
        if self.config.norm == "post":
            stream, x = add_norm(self.attend(x, cu_seqlens), stream, self.attention_norm, "post", x.dtype)
            return add_norm(self.transform(x), stream, self.ff_norm, "post", x.dtype)
        stream, x = add_norm(self.attend(x, cu_seqlens), stream, self.ff_norm, "pre", x.dtype)
        out = self.transform(x)
        if next_norm is None:
            return stream + out, out
        return add_norm(out, stream, next_norm, "pre", x.dtype)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.training else x


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
        self.to(wide)
        for part in (self.blocks, self.head):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.Linear):
                    module.to(dtype)
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
        states = self._states(tokens, self.config.layer_index(layer))
        # A queue of one: earlier states are freed as the next one comes.
        return tokens.with_values(deque(states, maxlen=1).pop())

    def hidden_states(self, tokens: Ragged) -> list[Ragged]:
        """The input of block 0 and the output of every block, n_layers + 1 in all, as transformers lists them.

        The last one has passed the final norm where there is one; those before it have not.
        """
        return [tokens.with_values(hidden) for hidden in self._states(tokens, self.config.n_layers)]

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
        if self.head is None:
            raise ValueError('this encoder has no head; make it with head="mlm", "cells", "genes" or "pooler"')
        if isinstance(self.head, CellClassifier | Pooler):
            if rows is not None:
                raise ValueError("this head reads the first token of each cell; rows cannot be chosen")
            return self.head(hidden.values[hidden.starts.long()])
        wanted = hidden.values if rows is None else hidden.values[rows]
        if isinstance(self.head, MLMHead):
            return self.head(wanted, self.token_table if self.config.tied_decoder else None)
        return self.head(wanted)

    def _states(self, tokens: Ragged, n_blocks: int) -> Iterator[torch.Tensor]:
        config = self.config
        work_dtype = self._work_dtype()
        hidden = self.embeddings(tokens)
        if self.embedding_norm is not None:
            hidden, _ = add_norm(hidden, None, self.embedding_norm, "post", hidden.dtype)
        stream = F.dropout(hidden, config.dropout, self.training)
        yield stream
        if config.norm == "post":
            x = stream.to(work_dtype)
        else:
            _, x = add_norm(stream, None, self._block(0).attention_norm, "pre", work_dtype)
        for index, block in enumerate(self.blocks[:n_blocks]):
            is_last = index + 1 == config.n_layers
            stream, x = block(stream, x, tokens.cu_seqlens, self._norm_after(index))
            if is_last and self.final_norm is not None:
                stream, _ = add_norm(stream, None, self.final_norm, "post", work_dtype)
            yield stream

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


def add_norm(
    x: torch.Tensor, stream: torch.Tensor | None, norm: nn.LayerNorm, kind: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the stream and normalise with a module's parameters; see ``geneformer_kernels.residual_layernorm``."""
    return residual_layernorm(x, stream, norm.weight, norm.bias, eps=norm.eps, norm=kind, out_dtype=out_dtype)
