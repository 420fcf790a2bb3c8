"""What a run reports of models other than a plain encoder: heads, eight bits, networks of torch, BERTs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from profiled_loops import CONFIG, N_STEPS, QUICK, figure, packed
from torch import nn

import geneformer_fast
from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.flops.work import encoder_flops
from geneformer_fast.profiling.run import profile


def test_rows_of_a_head_that_nobody_told_leave_its_work_unknown() -> None:
    model = Encoder(CONFIG, "mlm").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with profile(model, n_warmup=0, n_steps=1, n_active=0, **QUICK) as run:
        tokens = packed([5, 6])
        model.mlm_loss(model(tokens), torch.tensor([1]), torch.tensor([3])).backward()
        optimizer.step()
        run.step()
    assert "head_rows" in str(run.report.flops.model)
    assert run.report.flops.basis == "unknown"


def test_blocks_that_are_not_computed_are_not_counted() -> None:
    encoder = Encoder(CONFIG).eval()
    with profile(encoder, n_warmup=0, n_steps=1, n_active=0, n_layers=1, **QUICK) as run, torch.inference_mode():
        encoder(packed([7, 9]), layer="penultimate")
        run.step()
    assert run.report.flops.model == encoder_flops(CONFIG, 16, 49 + 81, 1)


def test_a_linear_network_of_torch_is_counted_as_torch_counts_it() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    with profile(model, **QUICK) as run:
        for _ in range(N_STEPS + 1):
            with torch.no_grad():
                model(torch.ones(7, 20))
            run.step(n_cells=7)
    flops = run.report.flops
    assert (flops.basis, run.report.subject.engine) == ("counted", "torch")
    assert flops.model == flops.hardware == run.report.time.n_steps * 2 * 7 * (20 * 30 + 30 * 5)
    assert "nobody said how long" in str(run.report.tokens.useful_share)


def test_batches_of_several_shapes_of_a_foreign_model_are_not_guessed() -> None:
    model = nn.Linear(20, 30)
    with profile(model, **QUICK) as run:
        for index in range(N_STEPS + 1):
            model(torch.ones(7 + index % 2, 20))
            run.step(n_cells=7)
    assert "several shapes" in str(run.report.flops.model)
    assert run.report.flops.basis == "unknown"


def test_every_operation_of_eight_bits_has_its_need() -> None:
    """All after attention is one loop where a CPU multiplies int8."""
    config = EncoderConfig(n_layers=2, width=64, n_heads=2, ff_width=128, vocab_size=97, max_len=64)
    encoder = geneformer_fast.quantize(Encoder(config).eval())
    with profile(encoder, **QUICK) as run:
        for lengths in [[20, 30]] * N_STEPS:
            with torch.inference_mode():
                encoder(packed(lengths))
            run.step()
    rows = {row.name: row for row in run.report.operations}
    known = [figure(row.flops) for row in rows.values() if not isinstance(row.flops, Missing)]
    n_active = 2
    assert sum(known) == n_active * encoder_flops(config, 50, 20**2 + 30**2)
    for name in ("after_attention", "int8_linear", "int8_feed_forward", "linear", "feed_forward", "varlen_attention"):
        assert name not in rows or figure(rows[name].flops) > 0


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_an_accelerated_bert_stays_packed_while_it_is_measured() -> None:
    """Whichever module is the outermost: hooks of the profiler are no reason to pad again."""
    model = bert()
    geneformer_fast.accelerate(model)
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5]])).long()
    ids = torch.ones(3, 12, dtype=torch.int64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        expected = model(ids, attention_mask=mask).last_hidden_state
        with profile(model, n_warmup=0, n_steps=2, n_active=1, **QUICK) as run:
            for _ in range(5):
                found = model(ids, attention_mask=mask).last_hidden_state
                assert torch.equal(found, expected)
                run.step()
    assert "varlen_attention" in [each.name for each in run.report.operations]
    assert run.report.tokens.n_positions == run.report.tokens.n_real == 2 * 20
    assert run.report.flops.model == encoder_flops(
        EncoderConfig(2, 32, 2, 48, vocab_size=60, max_len=16), 2 * 20, 2 * (9 + 144 + 25)
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_products_of_a_stock_bert_are_those_that_torch_names(attention: str) -> None:
    model = bert()
    model.set_attn_implementation(attention)
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5]])).long()
    with profile(model, n_warmup=0, n_steps=1, n_active=1, **QUICK) as run, torch.no_grad():
        for _ in range(4):
            model(torch.ones(3, 12, dtype=torch.int64), attention_mask=mask)
            run.step()
    rows = {each.name: each.flops for each in run.report.operations}
    products = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert rows["aten::linear"] == 2 * 36 * products
    name = "aten::scaled_dot_product_attention" if attention == "sdpa" else "aten::matmul"
    assert rows[name] == 2 * 4 * 32 * 3 * 144
    assert run.report.flops.hardware == figure(rows["aten::linear"]) + figure(rows[name])


def test_an_accelerated_bert_that_pads_again_is_found_out() -> None:
    model = bert()
    geneformer_fast.accelerate(model)
    model.encoder.layer[0].register_forward_hook(lambda *_: None)  # which is shown nothing but padded batches
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5]])).long()
    with profile(model, n_warmup=0, n_steps=2, n_active=1, **QUICK) as run, torch.no_grad():
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(torch.ones(3, 12, dtype=torch.int64), attention_mask=mask)
            run.step()
    for value in (run.report.flops.hardware, run.report.tokens.useful_share):
        assert "ran its stock forward pass" in str(value)
    assert run.report.flops.model == encoder_flops(
        EncoderConfig(2, 32, 2, 48, vocab_size=60, max_len=16), 2 * 20, 2 * (9 + 144 + 25)
    )


def test_an_accelerated_bert_that_was_told_to_pad_computes_its_rectangles() -> None:
    model = bert()
    geneformer_fast.accelerate(model, padding="stock")
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5]])).long()
    with profile(model, n_warmup=0, n_steps=1, n_active=0, **QUICK) as run, torch.no_grad():
        model(torch.ones(3, 12, dtype=torch.int64), attention_mask=mask)
        run.step()
    assert run.report.tokens.useful_share == 20 / 36
