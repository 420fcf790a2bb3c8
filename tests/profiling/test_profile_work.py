"""Operations are those of a hand count, and those torch counts of a padded model, exactly."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from geneformer_fast import Encoder, EncoderConfig, quantize
from geneformer_fast.finetuning.models import freeze
from geneformer_fast.profiling.figures import Ceilings, Missing, Operation
from geneformer_fast.profiling.flops.anatomy import anatomy, anatomy_of
from geneformer_fast.profiling.flops.needs import Need, joined_in
from geneformer_fast.profiling.flops.work import Batch, anatomy_in, count, count_of, encoder_flops, head_flops
from geneformer_fast.profiling.meters.operations import with_needs

N, C, H, F, V = 2, 32, 2, 48, 50
CONFIG = EncoderConfig(n_layers=N, width=C, n_heads=H, ff_width=F, vocab_size=V, max_len=16, tied_decoder=False)
LENGTHS = np.array([3, 7, 1])


def stock(kind: str = "BertForMaskedLM", **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=C, num_hidden_layers=N, num_attention_heads=H, intermediate_size=F,
        max_position_embeddings=16, attn_implementation="eager", tie_word_embeddings=False, **changes,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


def recompute(model: Any) -> None:
    """Without what transformers adds: that its embeddings give out a gradient though nothing of them learns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


def test_a_hand_count() -> None:
    """Two layers, cells of 3, 7 and 1 tokens, two rows of the head."""
    tokens, squares = 11, 9 + 49 + 1
    layer = 2 * tokens * (C * 3 * C + C * C + C * F + F * C) + 4 * C * squares
    head = 2 * 2 * (C * C + C * V)
    found = count(CONFIG, [Batch(LENGTHS, head_rows=2)], head="mlm")
    assert found.model == found.hardware == N * layer + head
    assert found.model == encoder_flops(CONFIG, tokens, squares) + head_flops(CONFIG, 2)
    assert count(CONFIG, [Batch(LENGTHS)] * 3, n_layers=1).model == 3 * layer
    assert encoder_flops(CONFIG, tokens, squares, n_layers=1) == layer
    trained = count(CONFIG, [Batch(LENGTHS, head_rows=2)], head="mlm", is_training=True, is_recomputing=True)
    assert trained.model == 3 * (N * layer + head)
    assert trained.hardware == 4 * N * layer + 3 * head
    assert count(CONFIG, []).model == 0


def test_padding_is_hardware_and_its_attention_is_the_rectangle() -> None:
    padded = Batch(LENGTHS, padded_to=8, head_rows=24)
    found = count(CONFIG, [padded], head="mlm")
    assert found.model == encoder_flops(CONFIG, 11, 59) + head_flops(CONFIG, 11)
    assert found.hardware == encoder_flops(CONFIG, 24, 3 * 64) + head_flops(CONFIG, 24)
    asked = count(CONFIG, [dataclasses.replace(padded, asked_rows=2)], head="mlm")
    assert asked.model == encoder_flops(CONFIG, 11, 59) + head_flops(CONFIG, 2)
    # Rows up to a multiple, of which attention knows nothing.
    assert count(CONFIG, [Batch(LENGTHS, positions=16)]).hardware == encoder_flops(CONFIG, 16, 59)


@pytest.mark.parametrize(
    ("lengths", "padded_to", "said"),
    [([3, -1], None, "below 0"), ([[3]], None, "per cell"), ([3, 9], 8, "padded to 8")],
)
def test_batches_that_cannot_be_are_refused(lengths: Any, padded_to: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Batch(lengths, padded_to=padded_to)


def test_a_padded_model_computes_what_torch_counts() -> None:
    model, ids = stock(), torch.randint(4, V, (3, 8))
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
    batch = Batch(LENGTHS, padded_to=8, head_rows=24)
    with torch.no_grad():
        assert counted(lambda: model(ids, attention_mask=mask)) == count(CONFIG, [batch], head="mlm").hardware
    both = counted(lambda: model(ids, attention_mask=mask, labels=ids).loss.backward())
    assert both == count(CONFIG, [batch], head="mlm", is_training=True).hardware
    recompute(model)
    again = counted(lambda: model.train()(ids, attention_mask=mask, labels=ids).loss.backward())
    assert again == count(CONFIG, [batch], head="mlm", is_training=True, is_recomputing=True).hardware


@pytest.mark.parametrize(
    ("head", "kind", "rows"),
    [("cells", "BertForSequenceClassification", 3), ("genes", "BertForTokenClassification", 24)],
)
def test_heads_of_classes(head: str, kind: str, rows: int) -> None:
    model, ids = stock(kind, num_labels=5), torch.randint(4, V, (3, 8))
    labels = torch.zeros(3 if head == "cells" else (3, 8), dtype=torch.long)
    found = count(CONFIG, [Batch([8] * 3, head_rows=rows)], head=head, n_classes=5, is_training=True)
    assert counted(lambda: model(ids, labels=labels).loss.backward()) == found.hardware


def ours(kind: str = "mlm", **changes: Any) -> Encoder:
    return Encoder(dataclasses.replace(CONFIG, **changes), head=kind, n_classes=5)


FROZEN: dict[str, Callable[[Any, Encoder], None]] = {
    "nothing": lambda stock, own: None,
    "embeddings": lambda stock, own: (freeze(own, 0, embeddings=True), stock.bert.embeddings.requires_grad_(False)),
    "first block": lambda stock, own: (freeze(own, 1), stock.bert.encoder.layer[0].requires_grad_(False)),
    "all below": lambda stock, own: (
        freeze(own, 1, embeddings=True),
        stock.bert.embeddings.requires_grad_(False),
        stock.bert.encoder.layer[0].requires_grad_(False),
    ),
    "all but the head": lambda stock, own: (
        freeze(own, N, embeddings=True),
        stock.bert.requires_grad_(False),
    ),
    "all but one norm": lambda stock, own: (
        own.requires_grad_(False).blocks[0].ff_norm.requires_grad_(True),
        stock.requires_grad_(False).bert.encoder.layer[0].output.LayerNorm.requires_grad_(True),
    ),
    "all but one bias": lambda stock, own: (
        own.requires_grad_(False).blocks[1].up.bias.requires_grad_(True),
        stock.requires_grad_(False).bert.encoder.layer[1].intermediate.dense.bias.requires_grad_(True),
    ),
}


@pytest.mark.parametrize("what", FROZEN)
def test_what_is_frozen_has_no_gradient(what: str) -> None:
    model, encoder, ids = stock(), ours(), torch.randint(4, V, (3, 8))
    FROZEN[what](model, encoder)
    step = counted(lambda: model(ids, labels=ids).loss.backward())
    found = anatomy_in(encoder)
    assert not isinstance(found, Missing)
    batches = [Batch([8] * 3, head_rows=24)]
    assert count_of(found, batches, is_training=True).model == step
    recompute(model)
    again = counted(lambda: model.train()(ids, labels=ids).loss.backward())
    assert count_of(found, batches, is_training=True, is_recomputing=True).hardware == again


class PreNorm(nn.Module):
    """A padded pre-norm block with SwiGLU over soft bins, in plain torch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, ff_width = config.width, config.ff_width
        self.first, self.second = nn.Linear(1, config.n_bins), nn.Linear(config.n_bins, config.n_bins)
        self.table = nn.Parameter(torch.randn(config.n_bins, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * ff_width), nn.Linear(ff_width, width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scores = self.first(values[..., None])
        stream = torch.softmax(self.second(scores) + scores, -1) @ self.table
        q, k, v = self.qkv(self.norms[0](stream)).unflatten(-1, (3, self.config.n_heads, -1)).permute(2, 0, 3, 1, 4)
        context = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        stream = stream + self.out(context.transpose(1, 2).flatten(-2))
        gate, up = self.up(self.norms[1](stream)).chunk(2, -1)
        return self.norms[2](stream + self.down(torch.nn.functional.silu(gate) * up))


PRE = EncoderConfig(
    n_layers=1, width=C, n_heads=H, ff_width=F, vocab_size=0, max_len=16, norm="pre", activation="swiglu",
    embedding_norm=False, final_norm=True, inputs="values", n_bins=10, tied_decoder=False,
)  # fmt: skip


@pytest.mark.parametrize("learning", ["all", "blocks", "second norm"])
def test_pre_norm_swiglu_and_soft_bins(learning: str) -> None:
    plain, encoder, values = PreNorm(PRE), Encoder(PRE), torch.randn(3, 8)
    if learning != "all":
        for part in (plain.first, plain.second, encoder.embeddings):
            part.requires_grad_(False)
        plain.table.requires_grad_(False)
    if learning == "second norm":
        plain.requires_grad_(False).norms[1].requires_grad_(True)
        encoder.requires_grad_(False).blocks[0].ff_norm.requires_grad_(True)
    with torch.no_grad():
        assert counted(lambda: plain(values)) == encoder_flops(PRE, 24, 3 * 64)
    step = counted(lambda: plain(values).sum().backward())
    found = anatomy_in(encoder)
    assert not isinstance(found, Missing)
    assert count_of(found, [Batch([8] * 3)], is_training=True).model == step
    if learning == "all":
        assert count(PRE, [Batch([8] * 3)], is_training=True).model == step
    assert head_flops(PRE, 7) == 2 * 7 * (C * C + C * 1)


def test_eight_bits_multiply_as_often() -> None:
    encoder = ours().eval()
    found = count(CONFIG, [Batch(LENGTHS)], dtype="int8", compute_dtype="bfloat16")
    plain = count(CONFIG, [Batch(LENGTHS)], dtype="bfloat16")
    assert found.model == plain.model == encoder_flops(CONFIG, 11, 59)
    assert {name: need.dtype for name, need in found.operations.items() if need.flops} == {
        "int8_linear": "int8", "int8_feed_forward": "int8", "varlen_attention": "bfloat16",
    }  # fmt: skip
    quantized = anatomy_of(quantize(encoder))
    assert not isinstance(quantized, Missing)
    assert count_of(quantized, [Batch(LENGTHS)]).model == count(CONFIG, [Batch(LENGTHS)], head="mlm").model
    assert not any(layer.learns for block in quantized.blocks for layer in (*block.qkv, block.up))


def test_what_is_not_known_is_not_said() -> None:
    assert isinstance(anatomy_in(nn.Linear(2, 2)), Missing)
    assert isinstance(anatomy_in(nn.ModuleList([ours(), ours()])), Missing)
    beside = nn.ModuleDict({"encoder": ours(), "more": nn.Linear(2, 2)})
    assert "more.weight" in str(anatomy_in(beside))
    within = nn.ModuleDict({"encoder": ours(), "norm": nn.LayerNorm(2)})
    assert anatomy_in(within) == anatomy_in(ours())
    strange = ours()
    strange.blocks[1].up = nn.Identity()  # type: ignore[assignment]
    assert "up of block 1 is a Identity" in str(anatomy_in(strange))
    strange = ours()
    strange.head = nn.Sequential()
    assert "Sequential" in str(anatomy_in(strange))


def test_needs_add_up_and_are_the_least_traffic() -> None:
    """One packed pass in bfloat16 by hand: every operation reads its inputs and weights and writes its results once."""
    found = count(CONFIG, [Batch(LENGTHS, head_rows=2)], head="mlm", dtype="bfloat16").operations
    t, attention = 11, 4 * C * 59
    assert found == {
        "embed_tokens": Need(0.0, t * C * 4 + t * C * (4 + 2) + 4 * t),
        "linear": Need(N * 2 * t * 4 * C * C, N * 2 * (t * (C + 3 * C) + 3 * C * C + 2 * t * C + C * C), "bfloat16"),
        "varlen_attention": Need(N * attention, N * 2 * 4 * t * C, "bfloat16"),
        "residual_layernorm": Need(0.0, 2 * N * t * C * (2 + 4 + 4 + 2) + 2 * 2 * C * 2),
        "feed_forward": Need(N * 2 * t * 2 * C * F, N * 2 * (2 * t * C + 2 * C * F), "bfloat16"),
        "head": Need(2 * 2 * (C * C + C * V), 2 * (2 * 2 * C + C * C + 2 * C + C * V + 2 * V), "bfloat16"),
    }


def test_an_operation_that_does_the_work_of_several_needs_what_they_need() -> None:
    """All after attention in one loop: context, stream and weights in, stream and rows out, of the last block float."""
    t, all_learns = 11, anatomy(CONFIG)
    apart = count_of(all_learns, [Batch(LENGTHS)], dtype="int8", compute_dtype="bfloat16")
    joined = count_of(
        all_learns, [Batch(LENGTHS)], dtype="int8", compute_dtype="bfloat16", joined="after_attention"
    ).operations
    assert sum(need.flops for need in joined.values()) == apart.hardware
    weights = C * C + 2 * C * F
    assert joined["after_attention"] == Need(
        N * 2 * t * weights, N * (t * C * (2 + 4) + weights) + t * C * (4 + 1) + t * C * (4 + 2), "int8"
    )
    assert joined["residual_layernorm"].n_bytes == t * C * (2 + 4 + 4 + 2)  # behind the last block
    assert joined["int8_linear"].flops == N * 2 * t * 3 * C * C
    assert "int8_feed_forward" not in joined
    half = count_of(all_learns, [Batch(LENGTHS)], dtype="bfloat16", joined="feed_forward").operations
    plain = count_of(all_learns, [Batch(LENGTHS)], dtype="bfloat16").operations
    assert half["residual_layernorm"].n_bytes == plain["residual_layernorm"].n_bytes / 2
    # What is added is neither written nor read.
    assert sum(need.n_bytes for need in half.values()) == sum(need.n_bytes for need in plain.values()) - N * t * C * 4


def test_which_operations_are_joined_is_seen_from_how_often_they_were_called() -> None:
    assert joined_in({"varlen_attention": 6, "after_attention": 6, "residual_layernorm": 1}) == "after_attention"
    assert joined_in({"feed_forward": 6, "residual_layernorm": 12}) is None
    assert joined_in({"feed_forward": 6, "residual_layernorm": 6}) == "feed_forward"
    assert joined_in({"feed_forward": 6, "residual_layernorm": 7}) == "feed_forward"  # with that of the head
    assert joined_in({"aten::mm": 3}) is None


def test_of_a_dtype_that_is_not_known_operations_have_no_needs() -> None:
    found = count(CONFIG, [Batch(LENGTHS)], dtype="float4")
    assert found.operations == {}
    assert found.model == encoder_flops(CONFIG, 11, 59)


def test_each_product_is_held_against_the_ceiling_of_its_own_dtype() -> None:
    needs = count(CONFIG, [Batch(LENGTHS)], dtype="int8", compute_dtype="bfloat16").operations
    rows = [
        Operation(name, N, 1.0, 0.5, *[Missing("not yet")] * 3) for name in ("varlen_attention", "int8_feed_forward")
    ]
    ceilings = Ceilings({"int8": 4e-6, "bfloat16": 1e-6}, 1e9)
    attention, half = with_needs(rows, needs, ceilings, "int8")
    assert attention.roof_share == pytest.approx(needs["varlen_attention"].flops / 1e6 * 1e3)
    assert half.roof_share == pytest.approx(needs["int8_feed_forward"].flops / 4e6 * 1e3)


@pytest.mark.parametrize("is_recomputing", [False, True])
def test_needs_of_training_add_up_to_the_hardware_count(is_recomputing: bool) -> None:
    batches = [Batch(LENGTHS, padded_to=8, head_rows=5), Batch([4, 4], head_rows=3)]
    for config, head in ((CONFIG, "mlm"), (CONFIG, "cells"), (PRE, None)):
        found = count(config, batches, head=head, is_training=True, is_recomputing=is_recomputing)
        assert sum(need.flops for need in found.operations.values()) == found.hardware
        assert all(need.n_bytes > 0 for need in found.operations.values())
    plain = count(CONFIG, batches, head="mlm", is_training=True).operations
    twice = count(CONFIG, batches, head="mlm", is_training=True, is_recomputing=True).operations
    assert twice["linear"].flops == 2 * plain["linear"].flops
    assert twice["linear backward"] == plain["linear backward"]
    assert twice["mlm_cross_entropy"] == plain["mlm_cross_entropy"]


def test_presets_have_an_anatomy() -> None:
    """One token of V1-10M: 2 * 6 * (4 * 256**2 + 2 * 256 * 512) and its attention."""
    config = EncoderConfig.preset("geneformer-v1-10m")
    assert encoder_flops(config, 1, 1) == 2 * 6 * (4 * 256**2 + 2 * 256 * 512) + 6 * 4 * 256
    assert len(anatomy(config, n_layers=config.layer_index("penultimate")).blocks) == 5
