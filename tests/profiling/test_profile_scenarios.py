"""What is measured when embedding, training and tokenizing are profiled, against independent counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import cells as toy_counts
from toys import encoder as toy_encoder
from toys import vocabulary

from geneformer_fast import Encoder, EncoderConfig, open_tokens, quantize, save, tokenize
from geneformer_fast.data.batches import BatchPlan
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.extract.encoding import EncodingRun, token_batches
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.scenarios import Request, opened, threads
from geneformer_fast.profiling.scenarios.cells import MadeUpCells, evenly, to_embed
from geneformer_fast.profiling.scenarios.counts import N_GENES, made_up_vocabulary, write_made_up_counts
from geneformer_fast.profiling.scenarios.models import is_folder, model_to_embed, model_to_train
from geneformer_fast.profiling.scenarios.passes import chosen_cells
from geneformer_fast.profiling.text import table
from geneformer_fast.profiling.units import written


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tokens of toy cells, their counts, and toy models with and without a head for masked genes."""
    folder = tmp_path_factory.mktemp("profiled")
    words, counts = vocabulary(), toy_counts(40)
    counts.write_h5ad(folder / "counts.h5ad")
    tokenize(counts, folder / "tokens", dictionary=words, progress=False)
    words.save(folder / "vocabulary")
    model = toy_encoder(words)
    save(model, folder / "model")
    torch.manual_seed(0)
    save(Encoder(model.config, head="mlm"), folder / "learning")
    save(quantize(toy_encoder(words), scheme="int8"), folder / "small")
    return folder


def request(place, **options):
    return Request(**{"model": str(place / "model"), "tokens": str(place / "tokens"), "dtype": "float32", **options})


def reported(asked):
    with opened(asked) as scenario:
        return scenario, scenario.report()


def test_batches_are_those_of_the_stream_in_worker_threads_and_without():
    config = EncoderConfig(n_layers=2, width=16, n_heads=2, ff_width=16, vocab_size=90, max_len=64, vocabulary="v")
    torch.manual_seed(0)
    cells = MadeUpCells(np.random.default_rng(0).integers(1, 60, size=33), config, "")
    run = EncodingRun(Encoder(config).eval(), to_embed(cells, np.arange(33)), "mean", "last", 100, False)
    expected = run.to_memory()
    for workers in (0, 1, 3):
        run.workers = workers
        found = np.full_like(expected, np.nan)
        for numbers, rows in run.batches():
            assert run.cells.lengths[numbers].sum() <= 100
            found[numbers] = rows
        assert np.array_equal(found, expected), workers


def test_embedding_is_measured_on_whole_passes_and_counted_exactly(place):
    scenario, report = reported(request(place, seconds=0.3, token_budget=200))
    with open_tokens(place / "tokens") as folder:
        chosen = evenly(folder.lengths(), report.subject.settings["cells"])
        lengths = folder.lengths()[chosen]
    passes = report.cells.n / len(lengths)
    assert passes == int(passes) >= 1
    assert report.tokens.n_real == report.tokens.n_positions == passes * lengths.sum()
    assert report.tokens.useful_share == 1.0
    assert report.time.n_steps == passes * scenario.n_steps(chosen)
    flops = encoder_flops(scenario.encoder.config, int(lengths.sum()), int((lengths**2).sum()), n_layers=2)
    assert report.flops.model == pytest.approx(passes * flops, rel=1e-9)
    assert report.flops.hardware == pytest.approx(report.flops.model)
    assert report.cells.per_s == pytest.approx(report.cells.n / report.time.wall_s)
    assert report.time.first_step_s > 0
    subject = report.subject
    assert (subject.mode, subject.engine, subject.dtype) == ("embed", "geneformer_fast", "float32")
    assert subject.model == str(place / "model")
    assert subject.settings["token_budget"] == 200
    assert subject.settings["blocks_computed"] == 2


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_so_many_steps_are_a_whole_pass_so_that_short_cells_are_among_them(steps):
    class Batches:
        token_budget = 4096
        cells = SimpleNamespace(lengths=lambda: np.random.default_rng(0).integers(300, 2049, 500))

        def n_steps(self, chosen):
            return len(list(token_batches(self.cells.lengths()[chosen], self.token_budget)))

    passing = Batches()
    chosen, n_steps = chosen_cells(passing, None, 500, steps=steps, seconds=10.0)
    assert n_steps == steps == passing.n_steps(chosen)
    few, _ = chosen_cells(passing, None, 3, steps=steps, seconds=10.0)
    assert len(few) <= 3


def test_so_many_steps_are_measured_as_were_asked_for(place):
    _, report = reported(request(place, steps=3, token_budget=100, layer="last"))
    assert report.time.n_steps == 3
    assert report.subject.settings["layer"] == "last"
    assert {operation.name for operation in report.operations} >= {"varlen_attention"}
    assert len(report.blocks) == 3


def test_made_up_cells_of_a_preset_are_embedded():
    scenario, report = reported(
        Request(model="geneformer-v1-10m", lengths="uniform:3-30", cells=6, steps=2, token_budget=60, dtype="float32")
    )
    assert report.cells.n <= 6
    assert report.subject.n_parameters == sum(p.numel() for p in scenario.encoder.parameters())
    assert "6 made-up cells, 3 to 30 tokens" in report.subject.cells
    assert scenario.pool == "mean"


def test_training_is_counted_with_the_rows_of_its_head(place):
    asked = request(place, model=str(place / "learning"), mode="train", steps=4, token_budget=300)
    with opened(asked) as scenario:
        before = scenario.encoder.blocks[0].qkv.weight.detach().clone()
        report = scenario.report()
        assert not torch.equal(before, scenario.encoder.blocks[0].qkv.weight)
    config = scenario.encoder.config
    assert report.time.n_steps == 4
    assert report.subject.mode == "train"
    assert report.tokens.useful_share == 1.0
    # AdamW's two moments of every parameter, though nobody named the optimizer.
    n_parameters = sum(parameter.numel() for parameter in scenario.encoder.parameters())
    assert report.memory.parts["optimizer"] == pytest.approx(8 * n_parameters, rel=0.05)
    # Three forward passes and the head: with no more rows than 15 % of the tokens, give or take.
    least = 3 * encoder_flops(config, report.tokens.n_real, 0)
    most = (
        least
        + 3 * encoder_flops(config, 0, report.tokens.n_real_squares)
        + 3 * head_flops(config, 0.4 * report.tokens.n_real)
    )
    assert least < report.flops.model < most


@pytest.mark.parametrize("size", [100, 300, 10**6])
def test_training_takes_the_steps_that_pretrain_takes(place, size):
    """As many tokens as ``pretrain --batch-tokens`` makes a step of, each step computed in one piece."""
    asked = request(place, model=str(place / "learning"), mode="train", steps=3, token_budget=size)
    with opened(asked) as scenario:
        report, recipe = scenario.report(), scenario.chosen_recipe(3)
        lengths = scenario.cells.lengths()
        plan = BatchPlan(
            lengths, scenario.train_cells, batch_tokens=size, token_budget=recipe.token_budget, seed=recipe.seed
        )
        pieces = list(plan.pieces(2, 5))  # two steps of warm-up
    assert recipe.batch_tokens == size
    assert [piece.n_pieces for piece in pieces] == [1, 1, 1]
    assert [real for _, real, _ in report.tokens.batches] == [piece.n_step_tokens for piece in pieces]
    epoch = [piece.n_step_tokens for piece in plan.pieces(0, plan.n_steps())]
    assert report.subject.settings["token_budget"] == size
    assert report.subject.settings["step_tokens"] == pytest.approx(np.mean(epoch), abs=0.5)
    if size < lengths.sum():
        assert np.mean(epoch) == pytest.approx(size, rel=0.25)


def test_tokenizing_is_measured_on_made_up_counts():
    scenario, report = reported(Request(mode="tokenize", cells=30, lengths="uniform:5-50", steps=2, threads=1))
    assert report.cells.n == 60
    assert report.time.n_steps == 2
    assert report.tokens.n_real > 60
    assert isinstance(report.tokens.useful_share, Missing)
    assert report.cells.read_gbps == pytest.approx(2e-9 * scenario.n_bytes / report.time.wall_s)
    assert f"read from files       {written(report.cells.read_gbps, 'GB/s')}\n" in table(report)
    assert isinstance(report.flops.mfu, Missing)
    assert report.subject.settings["workers"] == 1


def test_counts_of_ones_own_are_tokenized(place):
    asked = Request(mode="tokenize", counts=str(place / "counts.h5ad"), dictionary=str(place / "vocabulary"), steps=1)
    scenario, report = reported(asked)
    assert report.cells.n == 40
    assert scenario.n_bytes == (place / "counts.h5ad").stat().st_size
    with open_tokens(place / "tokens") as folder:
        assert report.tokens.n_real == folder.n_tokens


def test_made_up_counts_have_as_many_genes_as_lengths_say(tmp_path):
    write_made_up_counts(tmp_path / "cells.h5ad", 12, Lengths.parsed("uniform:5-60"))
    found = tokenize(tmp_path / "cells.h5ad", tmp_path / "tokens", dictionary=made_up_vocabulary(), progress=False)
    with found as folder:
        lengths = Lengths.parsed("uniform:5-60").of(12, N_GENES)
        assert (folder.lengths() - 2).tolist() == lengths.tolist()  # CLS and EOS
        values, _ = folder.read(np.arange(12))
        assert len(np.unique(values)) > 100


def test_threads_are_those_asked_for_and_then_as_before():
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    with threads(1):
        assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def test_what_is_neither_a_folder_nor_a_preset_is_refused():
    with pytest.raises(UnsupportedError, match=r"--model geneformer-v9 is neither .* presets are geneformer-v1-10m"):
        is_folder("geneformer-v9")


def test_a_preset_has_the_same_random_weights_every_time_and_the_callers_numbers_stay():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (model_to_embed("geneformer-v1-10m", dtype="float32", device=torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.blocks[2].up.weight, second.blocks[2].up.weight)


def test_what_does_not_learn_is_refused(place):
    with pytest.raises(UnsupportedError, match=r"small is quantized \(int8\), and eight bits do not learn"):
        model_to_train(str(place / "small"), device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="no head for masked genes"):
        model_to_train(str(place / "model"), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"device": "cuda:77"}, UnsupportedError, "cannot be used here"),
        ({"device": "tpu"}, UnsupportedError, "tpu"),
        ({"dtype": "float7"}, UnsupportedError, "float7"),
        ({"layer": "9"}, UnsupportedError, "no layer '9'|no layer 9"),
        ({"model": "nothing"}, UnsupportedError, "neither"),
        ({"tokens": None, "lengths": "9999"}, UnsupportedError, "9,999 are more than the"),
        ({"model": "aido-cell-3m"}, VocabularyError, "are ranks of toy, but the model reads cells of aido-cell"),
    ],
)
def test_what_cannot_be_followed_is_said(place, changes, kind, said):
    with pytest.raises(kind, match=said):
        opened(request(place, **changes)).__enter__()


def test_cells_longer_than_the_model_are_refused(place, tmp_path):
    save(toy_encoder(vocabulary(), max_len=8), tmp_path / "short")
    with pytest.raises(InputError, match="longer than the model's 8 positions"):
        opened(request(place, model=str(tmp_path / "short"))).__enter__()


def test_several_processes_are_sent_to_pretrain(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="pretrain --profile"):
        opened(request(place)).__enter__()
