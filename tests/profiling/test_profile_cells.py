"""Where the cells of a profiled run come from: lengths that are asked for, made-up cells, cells of a token folder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toys import cells as toy_counts
from toys import vocabulary

from geneformer_fast import EncoderConfig, tokenize
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.profiling.lengths import BLOOD, Lengths
from geneformer_fast.profiling.scenarios.cells import (
    MADE_UP_CELLS,
    MadeUpCells,
    check_readable,
    evenly,
    open_profile_cells,
    to_embed,
)

V1, V2 = (EncoderConfig.preset(name) for name in ("geneformer-v1-10m", "geneformer-v2-104m"))


def test_lengths_are_real_uniform_or_alike():
    real = Lengths.parsed("real").of(480, 4096)
    assert sorted(set(real)) == sorted(BLOOD)
    assert abs(real.mean() - 744) < 1
    uniform = Lengths.parsed("uniform:300-2048").of(500, 2048)
    assert (uniform.min(), uniform.max()) == (300, 2048)
    assert abs(uniform.mean() - 1174) < 1
    assert Lengths.parsed("7").of(5, 2048).tolist() == [7] * 5


def test_the_order_of_lengths_is_by_chance_and_always_the_same():
    first, again = (Lengths.parsed("uniform:1-1000").of(1000, 2048) for _ in range(2))
    assert first.tolist() == again.tolist() != sorted(first)


def test_real_cells_are_cut_as_a_tokenizer_does_and_others_are_refused():
    assert Lengths.parsed("real").of(480, 500).max() == 500
    with pytest.raises(UnsupportedError, match="2,049 are more than the 2,048 positions of the model"):
        Lengths.parsed("uniform:300-2049").of(10, 2048)


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "3.5", "uniform", "uniform:9-3", "uniform:0-9", "uniform:3-", "real:3", "١٢", "9" * 30]
)
def test_nonsense_for_lengths_is_refused_with_what_there_is(text):
    with pytest.raises(UnsupportedError, match=r"must be real, uniform:LOW-HIGH .* or a number of tokens above 0"):
        Lengths.parsed(text)


def test_made_up_cells_have_their_lengths_and_special_tokens_where_the_family_puts_them():
    lengths = np.array([1, 2, 9, 300])
    for config, special in ((V2, {"cls": 2, "eos": 3}), (V1, {})):
        values, bounds = MadeUpCells(lengths, config, "").read(np.arange(4))
        assert np.diff(bounds).tolist() == lengths.tolist()
        rows = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
        genes = np.concatenate(rows)
        if special:
            assert all(row[0] == special["cls"] for row in rows)
            assert all(row[-1] == special["eos"] for row in rows[1:])
            genes = np.concatenate([row[1:-1] for row in rows])
        assert genes.min() > max(special.values(), default=1)
        assert genes.max() < config.vocab_size


def test_a_made_up_cell_is_the_same_whatever_is_read_with_it():
    cells = MadeUpCells(np.array([5, 8, 13]), V1, "")
    values, bounds = cells.read(np.array([2, 0]))
    assert values[: bounds[1]].tolist() == cells.read(np.array([2]))[0].tolist()
    assert values[bounds[1] :].tolist() == cells.read(np.array([0]))[0].tolist()
    assert len(set(values.tolist())) > 10


def test_a_vocabulary_without_genes_is_refused():
    config = EncoderConfig(n_layers=1, width=8, n_heads=1, ff_width=8, vocab_size=2, max_len=9)
    with pytest.raises(UnsupportedError, match="no genes"):
        MadeUpCells(np.array([3]), config, "")


def test_cells_at_even_steps_are_as_long_and_short_as_all():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 1001))
    chosen = evenly(lengths, 10)
    assert sorted(lengths[chosen]) == [51, 151, 251, 351, 451, 551, 651, 751, 851, 951]
    assert (np.diff(chosen) > 0).all()
    assert evenly(lengths, 5000).tolist() == list(range(1000))
    assert len(evenly(lengths, 1)) == 1


@pytest.fixture
def folder(tmp_path):
    tokenize(toy_counts(23), tmp_path / "tokens", dictionary=vocabulary(), progress=False)
    return tmp_path / "tokens"


def config_of(words, **changes):
    identity = dict(vocabulary=words.name, vocabulary_fingerprint=words.fingerprint)
    values = dict(n_layers=1, width=8, n_heads=1, ff_width=8, vocab_size=words.n_tokens, max_len=words.max_len)
    return EncoderConfig(**{**values, **identity, **changes})


def opened(config, **options):
    return open_profile_cells(config, **{"tokens": None, "lengths": None, "n_cells": None, **options})


def test_cells_of_a_folder_are_read_as_they_are(folder):
    with opened(config_of(vocabulary()), tokens=folder) as cells:
        assert cells.n_cells == 23
        assert "23 cells" in cells.what
        chosen = np.array([3, 17, 20])
        for_embedding = to_embed(cells, chosen)
        values, bounds = for_embedding.read(np.array([1]))
        assert values.tolist() == cells.read(np.array([17]))[0].tolist()
        assert np.diff(bounds).tolist() == [for_embedding.lengths[1]] == [cells.lengths()[17]]
        assert for_embedding.special_ids == [0, 1, 2, 3]


def test_made_up_cells_are_as_many_as_asked_for():
    with opened(V1, lengths="12", n_cells=7) as cells:
        assert cells.lengths().tolist() == [12] * 7
        assert cells.what == "7 made-up cells, 12 tokens each"
    with opened(V1, lengths="real") as cells:
        assert cells.n_cells == MADE_UP_CELLS


def test_cells_of_another_vocabulary_are_refused(folder):
    with pytest.raises(VocabularyError, match="toy"), opened(V1, tokens=folder):
        pass


def test_cells_that_are_longer_than_the_model_are_refused_by_folder(folder):
    with pytest.raises(InputError, match=r"tokens: 23 cells are longer than the model's 3 positions"):
        opened(config_of(vocabulary(), max_len=3), tokens=folder).__enter__()


def test_an_empty_folder_is_refused():
    with pytest.raises(InputError, match="made-up cells: holds no cells"):
        check_readable(MadeUpCells(np.zeros(0, dtype=np.int64), V1, ""), V1)


def test_no_values_are_made_up():
    with pytest.raises(UnsupportedError, match="reads values: give a folder of them"):
        opened(EncoderConfig.preset("aido-cell-3m"), lengths="100").__enter__()
