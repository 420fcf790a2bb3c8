"""Whole encoders side by side: ours, transformers' BERT with the same weights, and torch's own pre-norm encoder."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.gpu.measure import Unavailable
from bench.gpu.workload import Packed, Padded
from bench.weights import tame
from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.checkpoints.mapping import bert_entries, to_ours, to_theirs

# transformers would look for flash-attention on the hub otherwise.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
#: Weights whose gradients are compared: the first block's projection reads the whole way back.
CHECKED_GRADIENTS = ("blocks.0.qkv.weight", "blocks.0.up.weight")
#: Standard deviation of the scores of attention, in random encoders.
SCORE_SPREAD = 4.0


def tiny_config(config: EncoderConfig) -> EncoderConfig:
    """The same kind of encoder, so small that a CPU runs it in no time."""
    changes: dict[str, Any] = {"n_layers": 2, "width": 32, "n_heads": 2, "ff_width": 48, "max_len": 32}
    return EncoderConfig.from_dict({**config.to_dict(), **changes, "vocab_size": 97 if config.vocab_size else 0})


def random_encoder(config: EncoderConfig, device: torch.device) -> Encoder:
    """Ours in float32 with random weights, away from the trivial start.

    Biases and norms are no zeros and ones, and attention matters as in a trained model: scores have a spread of 4, so
    that a token attends a few others (with fresh weights it averages all of them, and cells that see each other change
    next to nothing). What branches add to the stream is tame: were it as much as what it is added to, all tokens of a
    deep model would become one, and the little by which they differ would be what bfloat16 rounds away (13 % of
    V2-104M). Here it changes hidden states of the presets by 0.4 to 0.8 %, transformers' BERT by 1.6 to 2.9 %, and
    cells that see each other by 19 to 41 % (on a CPU, cells of up to 512 tokens).
    """
    torch.manual_seed(0)
    with torch.device(device):
        encoder = Encoder(config, "mlm")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif name.endswith(("qkv.weight", "out.weight")):
                parameter.normal_(0.0, config.width**-0.5)
                if name.endswith("qkv.weight"):
                    parameter[: 2 * config.width] *= SCORE_SPREAD**0.5
        branches = [linear for block in encoder.blocks for linear in (block.out, block.down)]
        tame(branches)
        if not config.embedding_norm:  # the stream begins with 0.02 of tokens and of positions, not with 1
            for linear in branches:
                for parameter in linear.parameters():
                    parameter *= 0.02 * 2**0.5
    return encoder.eval()


def in_half(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """A copy for inference."""
    return copy.deepcopy(encoder).cast(dtype).eval()


def ours_loss(encoder: Encoder, batch: Packed) -> torch.Tensor:
    """Mean loss over the masked rows of a batch."""
    if not hasattr(encoder, "mlm_loss"):
        raise Unavailable("this version has no Encoder.mlm_loss")
    return encoder.mlm_loss(encoder(batch.tokens), batch.rows, batch.targets)


class Stock(nn.Module):
    """A padded rival, in the form all of them are used here.

    ``forward(ids, mask)`` gives [B, L, C]; ``loss(batch)`` the mean over masked rows, with the head on these only, or
    with ``is_full`` on all rows as transformers does by itself.
    """

    is_full = False
    #: None for what is not the same function as ours.
    encoder: Encoder | None = None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L] ids and mask -> [B, L, C]."""
        raise NotImplementedError

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [R, V]."""
        raise NotImplementedError

    def loss(self, batch: Padded) -> torch.Tensor:
        """Mean cross entropy over the masked rows."""
        hidden = self(batch.ids, batch.mask).flatten(0, 1)
        if self.is_full:
            return F.cross_entropy(self.head(hidden).float(), batch.labels.flatten())
        return F.cross_entropy(self.head(hidden[batch.rows]).float(), batch.targets)

    def gradients(self) -> Mapping[str, torch.Tensor]:
        """Gradients under our names, for comparison."""
        raise NotImplementedError


class StockBert(Stock):
    """transformers' BertForMaskedLM.

    Parameters
    ----------
    encoder
        Gives shape and, where BERT can express it (post-norm), weights.
    attention
        ``"eager"``, ``"sdpa"`` or ``"flash_attention_2"``.
    is_full
        Whether the loss computes logits of all rows.
    """

    def __init__(self, encoder: Encoder, attention: str, *, is_full: bool = False) -> None:
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise Unavailable("transformers is not installed")
        if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise Unavailable("flash-attn is not installed")
        from transformers import BertForMaskedLM

        try:
            with torch.device(encoder.device):
                self.model = BertForMaskedLM(stock_config(encoder.config, attention))
        except ValueError as error:  # transformers 4.46 to 4.51 have no flash-attention for BERT
            raise Unavailable(str(error).splitlines()[0]) from error
        self.is_full = is_full
        self._config = encoder.config
        if encoder.config.norm == "post":
            theirs = to_theirs(encoder.state_dict(), bert_entries(encoder.config, "mlm"))
            missing, unexpected = self.model.load_state_dict(theirs, strict=False)
            if unexpected or any(".decoder." not in name for name in missing):
                raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        self.eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L] ids and mask -> [B, L, C]."""
        return self.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [R, V]."""
        return self.model.cls(rows)

    def gradients(self) -> Mapping[str, torch.Tensor]:
        """Theirs, put together as ours are."""
        theirs = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        table = [entry for entry in bert_entries(self._config, "mlm") if entry.ours in CHECKED_GRADIENTS]
        shapes = {entry.ours: torch.cat([theirs[name] for name in entry.theirs]).shape for entry in table}
        return to_ours(theirs, table, shapes, source="gradients")


class StockPreNorm(Stock):
    """torch.nn.TransformerEncoder, the only stock encoder that is pre-norm, around plain embeddings and head."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        config = encoder.config
        if config.norm != "pre" or config.inputs != "tokens" or config.activation == "swiglu":
            raise Unavailable("torch.nn.TransformerEncoder cannot express this encoder")
        # Weights of the embeddings and of the head are ours, used through plain torch functions.
        self.ours = copy.deepcopy(encoder)
        activation: Callable[[torch.Tensor], torch.Tensor] = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": partial(F.gelu, approximate="tanh"),
        }[config.activation]
        with torch.device(encoder.device):
            layer = nn.TransformerEncoderLayer(
                config.width, config.n_heads, config.ff_width, config.dropout, activation, config.eps,
                batch_first=True, norm_first=True,
            )  # fmt: skip
            self.body = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        for theirs, block in zip(self.body.layers, self.ours.blocks, strict=True):
            _take(theirs, block)
            theirs.self_attn.dropout = config.attention_dropout
            theirs.dropout.p = 0.0  # within the feed-forward, where ours has none
        del self.ours.blocks
        self.eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L] ids and mask -> [B, L, C]."""
        ours, config = self.ours, self.ours.config
        tables = ours.embeddings
        hidden = F.embedding(ids, tables.token.weight) + tables.position.weight[: ids.shape[1]]
        hidden = F.dropout(hidden, config.dropout, self.training).to(self.body.layers[0].linear1.weight.dtype)
        hidden = self.body(hidden, src_key_padding_mask=None if mask is None else mask == 0)
        return _norm(hidden, ours.final_norm) if ours.final_norm is not None else hidden

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [R, V]."""
        head = self.ours.head
        hidden = _norm(F.gelu(F.linear(rows, head.dense.weight, head.dense.bias)), head.norm)
        return F.linear(hidden, self.ours.embeddings.token.weight.to(hidden.dtype), head.bias.to(hidden.dtype))

    def gradients(self) -> Mapping[str, torch.Tensor]:
        """Under our names."""
        first = self.body.layers[0]
        named = {"blocks.0.qkv.weight": first.self_attn.in_proj_weight, "blocks.0.up.weight": first.linear1.weight}
        return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@torch.no_grad()
def _take(theirs: nn.TransformerEncoderLayer, block: Any) -> None:
    """Copy one block's weights."""
    pairs = [
        (theirs.self_attn.in_proj_weight, block.qkv.weight),
        (theirs.self_attn.in_proj_bias, block.qkv.bias),
    ]
    modules = (
        (theirs.self_attn.out_proj, block.out),
        (theirs.norm1, block.attention_norm),
        (theirs.linear1, block.up),
        (theirs.linear2, block.down),
        (theirs.norm2, block.ff_norm),
    )
    pairs += [pair for to, of in modules for pair in ((to.weight, of.weight), (to.bias, of.bias))]
    for to, of in pairs:
        to.copy_(of)


def _norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def stock_config(config: EncoderConfig, attention: str) -> Any:
    """A BertConfig of the same shape."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.ff_width,
        max_position_embeddings=config.max_len,
        hidden_act=ACTIVATIONS[config.activation],
        layer_norm_eps=config.eps,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        pad_token_id=0,
        type_vocab_size=max(config.n_token_types, 1),
        attn_implementation=attention,  # in every version; set_attn_implementation is newer than 4.51
    )


def packed_hidden(model: Stock, batches: list[Padded], n_cells: int) -> torch.Tensor:
    """[T, C] hidden states of all cells of padded batches, in the order of the cells."""
    found: list[torch.Tensor] = [torch.empty(0)] * n_cells
    with torch.inference_mode():
        for batch in batches:
            hidden = model(batch.ids, batch.mask)
            lengths = [batch.ids.shape[1]] * len(batch.ids) if batch.mask is None else batch.mask.sum(1).tolist()
            for i, row, length in zip(batch.chosen, hidden, lengths, strict=True):
                found[i] = row[:length].float()
    return torch.cat(found)


def encoder_flops(config: EncoderConfig, lengths: list[int], n_masked: int = 0) -> float:
    """Operations of one forward pass: matrix products, attention as 4 L² C per layer; lookups and norms left out.

    ``n_masked`` rows pass the MLM head besides.
    """
    width, inner = config.width, config.ff_width
    per_token = 2 * (4 * width**2 + (3 if config.activation == "swiglu" else 2) * width * inner)
    body = config.n_layers * sum(per_token * n + 4 * n**2 * width for n in lengths)
    return float(body + n_masked * 2 * (width**2 + width * config.vocab_size))


def distinct_shapes(batches: list[Padded]) -> int:
    """How many shapes a compiler would meet."""
    return len({(*batch.ids.shape, batch.mask is None) for batch in batches})
