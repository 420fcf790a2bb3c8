"""Input layers: what turns a packed batch of tokens or values into the first hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from geneformer_kernels import embed_tokens, residual_layernorm
from geneformer_kernels.arguments import is_looked_into
from geneformer_kernels.dispatch import is_forced
from geneformer_kernels.on_device import is_plain, needs_gradient
from torch import nn

from geneformer_fast import families, pieces
from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.layers import QuantizedEmbedding, QuantizedLinear
from geneformer_fast.ragged import Ragged

#: What scGPT takes every larger value for.
LARGEST_VALUE = 512.0


class RankTokens(nn.Module):
    """Ranked gene tokens: token, type and position tables (Theodoris et al., Nature 2023; Devlin et al., 1810.04805).

    Positions count from each cell's own start. Tables stay float32, whatever the matrix products use; those of tokens
    and positions may be :class:`~geneformer_fast.layers.QuantizedEmbedding`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token: nn.Embedding | QuantizedEmbedding = nn.Embedding(config.vocab_size, config.width)
        self.position: nn.Embedding | QuantizedEmbedding = nn.Embedding(config.max_len, config.width)
        self.token_type = nn.Embedding(config.n_token_types, config.width) if config.n_token_types else None

    def forward(
        self,
        tokens: Ragged,
        norm: nn.LayerNorm | None,
        dropout_p: float,
        out_dtype: torch.dtype,
        reader: nn.Module | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] token ids -> the stream [T, C], normalised where there is a norm, and the same in ``out_dtype``.

        ``reader`` is the layer that multiplies what comes out, if that is known. ``positions`` [T] stand for those
        within the cells.
        """
        self.check(tokens)
        is_quantized = isinstance(self.token, QuantizedEmbedding) or isinstance(self.position, QuantizedEmbedding)
        if is_quantized or positions is not None:
            if positions is None and _is_made_by_loops(reader) and self._is_by_rows(tokens, norm, dropout_p):
                return self._by_rows(tokens, norm, out_dtype)
            # Order of addition as in BertEmbeddings: token + type, then + position.
            hidden = self.token(tokens.values)  # new, so that it may be added to in place
            if self.token_type is not None:
                hidden.add_(self.token_type.weight[0])
            places = tokens.positions() if positions is None else positions
            return _finished(hidden.add_(self.position(places)), norm, dropout_p, out_dtype)
        assert isinstance(self.token, nn.Embedding)
        assert isinstance(self.position, nn.Embedding)
        return embed_tokens(
            tokens.values,
            tokens.cu_seqlens,
            self.token.weight,
            self.position.weight,
            None if self.token_type is None else self.token_type.weight[0],
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            eps=self.config.eps if norm is None else norm.eps,
            dropout_p=dropout_p,
            out_dtype=out_dtype,
        )

    def _is_by_rows(self, tokens: Ragged, norm: nn.LayerNorm | None, dropout_p: float) -> bool:
        """Whether one loop computes it, each row while it is near: both tables of int8, on a CPU, nothing learning.

        What looks at a table by hooks sees it.
        """
        token, position = self.token, self.position
        if dropout_p or tokens.values.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if not isinstance(token, QuantizedEmbedding) or not isinstance(position, QuantizedEmbedding):
            return False
        if not token.compute_dtype == position.compute_dtype == torch.float32:
            return False
        # The loop reads memory by the numbers that were checked against the configuration.
        if len(token.weight_q) < self.config.vocab_size or len(position.weight_q) < self.config.max_len:
            return False
        hooked = any(table._forward_hooks or table._forward_pre_hooks for table in (token, position))
        parameters = [p for part in (self.token_type, norm) if part is not None for p in part.parameters()]
        if hooked or needs_gradient(*parameters) or is_forced("residual_layernorm"):
            return False
        from geneformer_kernels.cpu.embed_rows import is_for_loops

        read = (token.weight_q, token.row_scale, position.weight_q, position.row_scale, *(p.data for p in parameters))
        return is_plain(tokens.values, tokens.cu_seqlens, *read) and is_for_loops(*read)

    def _by_rows(
        self, tokens: Ragged, norm: nn.LayerNorm | None, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, by the loop."""
        from geneformer_kernels.cpu.embed_rows import Table, embed_rows

        assert isinstance(self.token, QuantizedEmbedding)
        assert isinstance(self.position, QuantizedEmbedding)
        return embed_rows(
            tokens.values,
            tokens.cu_seqlens,
            Table(self.token.weight_q, self.token.row_scale),
            Table(self.position.weight_q, self.position.row_scale),
            None if self.token_type is None else self.token_type.weight[0],
            None if norm is None else (norm.weight, norm.bias),
            self.config.eps if norm is None else norm.eps,
            out_dtype,
        )

    def check(self, tokens: Ragged) -> None:
        """Refuse what a table lookup would only answer with an index error, or on a GPU with a dead process."""
        _check_length(tokens, self.config)
        if tokens.values.dtype not in (torch.int32, torch.int64) or tokens.values.ndim != 1:
            kind = f"{tokens.values.dtype} values of the shape {[*tokens.values.shape]}"
            raise InputError(f"this model reads token ids, [T] int32 or int64, not {kind}")
        # Looking at values would make a card wait, and break a compiled graph.
        if tokens.values.device.type != "cpu" or not tokens.n_tokens or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in tokens.values.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            name = self.config.vocabulary or "its vocabulary"
            raise VocabularyError(
                f"token id {low if low < 0 else high} is outside the model's {self.config.vocab_size:,} tokens "
                f"({name}); these tokens were made with another dictionary"
            )


class SoftBins(nn.Module):
    """One continuous value per gene, embedded by soft binning (AIDO.Cell; Gong et al., xTrimoGene, arXiv:2311.15156).

    The value -1 stands for a masked and -2 for a padded gene; a value's position is its gene's index in a fixed list.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(1, config.n_bins)
        self.linear2 = nn.Linear(config.n_bins, config.n_bins)
        self.lookup_table = nn.Embedding(config.n_bins, config.width)
        self.mask_embedding = nn.Embedding(1, config.width)
        self.pad_embedding = nn.Embedding(1, config.width)
        self.position: nn.Embedding | QuantizedEmbedding = nn.Embedding(config.max_len, config.width)

    def forward(
        self,
        tokens: Ragged,
        norm: nn.LayerNorm | None,
        dropout_p: float,
        out_dtype: torch.dtype,
        reader: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] values -> the stream [T, C], normalised where there is a norm, and the same in ``out_dtype``.

        ``reader`` is the layer that multiplies what comes out, for which nothing is different here.
        """
        self.check(tokens)
        values = tokens.values.to(self.linear1.weight.dtype)
        if values.device.type == "cpu" and pieces.is_nothing_learning():
            hidden = self._embedded_once(values).add_(self.position(tokens.positions()))
        else:
            hidden = self._embedded(values) + self.position(tokens.positions())
        return _finished(hidden, norm, dropout_p, out_dtype)

    def _embedded(self, values: torch.Tensor) -> torch.Tensor:
        """[T] values -> [T, C], without their positions."""
        values = values[:, None]
        scores = F.leaky_relu(self.linear1(values), 0.1)
        weights = torch.softmax(self.linear2(scores) + self.config.bin_alpha * scores, dim=-1)
        hidden = weights @ self.lookup_table.weight
        hidden = torch.where(values == -1, self.mask_embedding.weight, hidden)
        return torch.where(values == -2, self.pad_embedding.weight, hidden)

    def _embedded_once(self, values: torch.Tensor) -> torch.Tensor:
        """As :meth:`_embedded`, each value that is there several times once, and some thousand values at a time.

        Most genes of a cell are 0, and its other counts are few and small: 19,266 values are some hundred different
        ones.
        """
        kinds, index = torch.unique(values, return_inverse=True)
        if len(kinds) > len(values) // 2:
            kinds, index = values, None
        made = torch.cat([self._embedded(piece) for piece in kinds.split(pieces.PIECE_ROWS)])
        return made if index is None else made.index_select(0, index)

    def check(self, tokens: Ragged) -> None:
        """Refuse what is no value, and on the CPU values that are not finite."""
        _check_length(tokens, self.config)
        if not tokens.values.is_floating_point() or tokens.values.ndim != 1:
            kind = f"{tokens.values.dtype} of the shape {[*tokens.values.shape]}"
            raise InputError(f"this model reads values, [T] floating point, not {kind}")
        if is_looked_into(tokens.values) and not tokens.values.isfinite().all():
            raise InputError("a value is NaN or infinite; this model reads finite values")


class GenesAndValues(nn.Module):
    """A gene's id and its value, each embedded and normalised by itself, then added (scGPT, Cui et al., 2024).

    There are no positions: a cell's genes may come in any order, and no number of them is too large for a table. Values
    pass two linear layers, where nothing above :data:`LARGEST_VALUE` counts as more than that; with
    ``config.inputs == "pairs-category"`` they are bins, looked up in a table of ``config.n_bins`` rows. All of it stays
    float32, whatever the matrix products of the blocks use. The gene table may be a
    :class:`~geneformer_fast.layers.QuantizedEmbedding`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token: nn.Embedding | QuantizedEmbedding = nn.Embedding(config.vocab_size, config.width)
        self.token_norm = nn.LayerNorm(config.width, eps=config.eps)
        is_table = config.inputs == "pairs-category"
        self.value_table = nn.Embedding(config.n_bins, config.width) if is_table else None
        self.value1 = None if is_table else nn.Linear(1, config.width)
        self.value2 = None if is_table else nn.Linear(config.width, config.width)
        self.value_norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(
        self,
        tokens: Ragged,
        norm: nn.LayerNorm | None,
        dropout_p: float,
        out_dtype: torch.dtype,
        reader: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, 2] ids and values -> the stream [T, C], normalised where there is a norm, and the same in ``out_dtype``.

        Dropout is of the values alone, as scGPT has it. ``reader`` is the layer that multiplies what comes out, for
        which nothing is different here.
        """
        self.check(tokens)
        values = self.of_values(tokens.values[:, 1])
        if self.value_table is None:
            values = F.dropout(values, dropout_p)
        return _finished(self.of_genes(tokens.values[:, 0].long()) + values, norm, 0.0, out_dtype)

    def of_genes(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] ids of genes -> their embeddings [n, C], normalised: what scGPT calls gene embeddings."""
        rows = self.token(ids)
        return _normed(rows.to(self.token_norm.weight.dtype), self.token_norm)

    def of_values(self, values: torch.Tensor) -> torch.Tensor:
        """[n] values -> [n, C], normalised.

        Values are few different bins, so that on a CPU each is computed once; a card would have to wait to count them.
        """
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            distinct, index = torch.unique(values, return_inverse=True)
            if len(distinct) <= len(values) // 2:
                return self._of_values(distinct).index_select(0, index)
        return self._of_values(values)

    def _of_values(self, values: torch.Tensor) -> torch.Tensor:
        if self.value_table is not None:
            return _normed(self.value_table(values.long()), self.value_norm)
        assert self.value1 is not None
        assert self.value2 is not None
        clipped = values.to(self.value1.weight.dtype).clamp(max=LARGEST_VALUE)[:, None]
        return _normed(self.value2(F.relu(self.value1(clipped))).to(self.value_norm.weight.dtype), self.value_norm)

    def check(self, tokens: Ragged) -> None:
        """Refuse what are no pairs of a gene and a value, and on the CPU ids that no gene has."""
        _check_ragged(tokens)
        if not tokens.values.is_floating_point() or tokens.values.ndim != 2 or tokens.values.shape[1] != 2:
            kind = f"{tokens.values.dtype} of the shape {[*tokens.values.shape]}"
            raise InputError(
                f"this model reads genes and their values, [T, 2] floating point (id, value), not {kind}; prepare the "
                "counts with geneformer-fast tokenize --family scgpt"
            )
        if not is_looked_into(tokens.values) or not tokens.n_tokens:
            return
        ids, values = tokens.values.unbind(1)
        low, high = (float(value) for value in ids.aminmax())
        if not (low >= 0 and high < self.config.vocab_size):  # NaN is neither
            raise VocabularyError(
                f"gene id {low if not low >= 0 else high:g} is outside the model's {self.config.vocab_size:,} tokens "
                f"({self.config.vocabulary or 'its vocabulary'}); these cells were prepared with another vocabulary"
            )
        if (ids != ids.trunc()).any():
            raise InputError("a gene id is no whole number; ids are column 0, values column 1")
        if not values.isfinite().all():
            raise InputError("a value is NaN or infinite; this model reads finite values")
        if self.value_table is not None and not (values.min() >= 0 and values.max() < self.config.n_bins):
            raise InputError(
                f"a value is outside the model's {self.config.n_bins} bins; prepare the counts with as many bins"
            )


def _is_made_by_loops(reader: nn.Module | None) -> bool:
    """Whether loops multiply or widen the weight of a layer: where numba, of 110 MB, is there anyway.

    Float8 has none, and a millisecond or two of a batch is all that the loop for tables saves.
    """
    return isinstance(reader, QuantizedLinear) and reader.weight_q.dtype == torch.int8


def _normed(hidden: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """[n, C] normalised, in its dtype."""
    normed, _ = residual_layernorm(
        hidden, None, norm.weight, norm.bias, eps=norm.eps, norm="post", out_dtype=hidden.dtype
    )
    return normed


def _finished(
    hidden: torch.Tensor, norm: nn.LayerNorm | None, dropout_p: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream, normalised where there is a norm and after dropout, and the same in ``out_dtype``."""
    stream = F.dropout(hidden if norm is None else _normed(hidden, norm), dropout_p)
    return stream, stream.to(out_dtype)


def _check_ragged(tokens: Ragged) -> None:
    if not isinstance(tokens, Ragged):
        raise TypeError(f"tokens must be a Ragged (Ragged.from_cells packs cells), not {type(tokens).__name__}")
    tokens.check()


def _check_length(tokens: Ragged, config: EncoderConfig) -> None:
    _check_ragged(tokens)
    if tokens.max_len > config.max_len:
        name = config.vocabulary or "this model"
        raise VocabularyError(
            f"a cell has {tokens.max_len:,} tokens but the model has {config.max_len:,} positions ({name}); "
            f"shorten it with tokenize --max-len {config.max_len} (max_len={config.max_len})"
        )


def input_layer(config: EncoderConfig) -> nn.Module:
    """The input layer a configuration asks for: its family's, or one of those here.

    Raises
    ------
    UnsupportedError
        Nothing here makes a model's input of what the configuration names.
    """
    found = families.family_of(config)
    if found is not None and found.input_layer is not None:
        return found.input_layer(config)
    makers = {"tokens": RankTokens, "values": SoftBins, "pairs": GenesAndValues, "pairs-category": GenesAndValues}
    if config.inputs not in makers:
        whose = "no family" if found is None else f"the family {found.name!r}, which has no input layer of its own"
        raise UnsupportedError(f"inputs={config.inputs!r} is not known here (the configuration is of {whose})")
    return makers[config.inputs](config)
