"""What is asked for and what is shown: shares, special tokens, and where randomness comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast import Ragged
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import MaskedBatch, Masking, mask_genes
from geneformer_fast.data.random import CellRandom
from geneformer_fast.errors import UnsupportedError

KINDS = TokenKinds(1, {"pad": 0, "mask": 1, "cls": 2, "eos": 3}, 1004)
BIONEMO = TokenKinds(1, {"cls": 0, "mask": 1, "pad": 2, "sep": 3, "unk": 4}, 1005)


def framed(n_cells: int, n_genes: int = 98, seed: int = 0) -> Ragged:
    """Cells of random genes between CLS and EOS."""
    rng = np.random.default_rng(seed)
    return Ragged.from_cells([[2, *rng.integers(4, 1004, n_genes).tolist(), 3] for _ in range(n_cells)])


def masked(tokens: Ragged, masking: Masking | None = None, *, seed: int = 0, epoch: int = 0) -> MaskedBatch:
    return mask_genes(tokens, KINDS, masking or Masking(), CellRandom(seed, epoch, np.arange(tokens.n_cells)))


@pytest.mark.parametrize("masking", [Masking(), Masking(random=0.02), Masking(share=0.3, mask=1.0, random=0.0)])
def test_shares(masking: Masking) -> None:
    tokens = framed(400)
    batch = masked(tokens, masking)
    n_genes, n_asked = 400 * 98, len(batch.rows)

    def close(count: float, n: int, share: float) -> None:
        assert abs(count / n - share) <= 5 * np.sqrt(share * (1 - share) / n), (count / n, share)

    shown = batch.tokens.values[batch.rows]
    close(n_asked, n_genes, masking.share)
    close(int((shown == 1).sum()), n_asked, masking.mask)
    # A random gene is the hidden one in one case of a thousand.
    is_other = (shown != 1) & (shown != batch.targets)
    close(int(is_other.sum()), n_asked, masking.random * 0.999)
    assert torch.equal(batch.targets, tokens.values[batch.rows])
    untouched = torch.ones(tokens.n_tokens, dtype=torch.bool)
    untouched[batch.rows] = False
    assert torch.equal(batch.tokens.values[untouched], tokens.values[untouched])
    assert (batch.rows.diff() > 0).all()


def test_random_genes_are_genes_and_all_of_them() -> None:
    batch = masked(framed(500), Masking(share=1.0, mask=0.0, random=1.0))
    drawn = batch.tokens.values[batch.rows].bincount(minlength=1004)
    assert drawn[:4].sum() == 0
    assert (drawn[4:] > 0).all()
    # 49,000 draws of 1,000 genes: chi-square has mean 999 and standard deviation 45.
    expected = len(batch.rows) / 1000
    assert ((drawn[4:] - expected) ** 2 / expected).sum() < 999 + 5 * 45


def test_special_tokens_are_never_asked_for() -> None:
    tokens = framed(50)
    batch = masked(tokens, Masking(share=1.0))
    assert len(batch.rows) == 50 * 98
    assert batch.targets.min() >= 4
    assert torch.equal(batch.tokens.values == 2, tokens.values == 2)


def test_as_the_public_v2_code_masks() -> None:
    """Its collator knows <pad> and <mask> as special only, and draws from the whole vocabulary."""
    tokens = framed(400)
    batch = masked(tokens, Masking(share=1.0, mask=0.0, random=1.0, masks_specials=True))
    assert len(batch.rows) == tokens.n_tokens
    assert set(range(4)) <= set(batch.tokens.values.tolist())
    padded = Ragged.from_cells([[0, 1, 2, 9, 3]])
    assert masked(padded, Masking(share=1.0, masks_specials=True)).rows.tolist() == [2, 3, 4]


def test_bionemo_ids() -> None:
    tokens = Ragged.from_cells([[0, *range(5, 1005)]])
    random = CellRandom(0, 0, np.arange(1))
    batch = mask_genes(tokens, BIONEMO, Masking(share=1.0, mask=0.5, random=0.5), random)
    assert batch.rows.tolist() == list(range(1, 1001))
    shown = batch.tokens.values[1:]
    assert ((shown == 1) | (shown >= 5)).all()
    assert BIONEMO.gene_ids.tolist() == list(range(5, 1005))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 3), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mask_belongs_to_seed_epoch_and_slot(sizes: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    """Whoever else is in the batch, and in whatever order."""
    rng = np.random.default_rng(0)
    cells = [rng.integers(4, 1004, n).tolist() for n in sizes]
    slots = np.arange(len(cells)) + 1000
    whole = mask_genes(Ragged.from_cells(cells), KINDS, Masking(share=0.5), CellRandom(seed, epoch, slots))
    order = data.draw(st.permutations(range(len(cells))))[: data.draw(st.integers(1, len(cells)))]
    part = mask_genes(
        Ragged.from_cells([cells[i] for i in order]), KINDS, Masking(share=0.5), CellRandom(seed, epoch, slots[order])
    )
    shown = whole.tokens.cells()
    for cell, i in zip(part.tokens.cells(), order, strict=True):
        assert torch.equal(cell, shown[i])


def test_seeds_epochs_slots_and_streams_are_independent() -> None:
    bounds = np.array([0, 20_000, 40_000])
    slots = np.array([5, 6])
    draws = {
        "plain": CellRandom(1, 2, slots).uniform(bounds),
        "seed": CellRandom(2, 2, slots).uniform(bounds),
        "epoch": CellRandom(1, 3, slots).uniform(bounds),
        "slots": CellRandom(1, 2, slots + 1).uniform(bounds),
        "stream": CellRandom(1, 2, slots).uniform(bounds, 1),
    }
    for name, drawn in draws.items():
        assert 0 <= drawn.min() <= drawn.max() < 1
        # The mean of 40,000 uniform numbers has a standard deviation of 0.00144; so has their decile's share 0.0015.
        assert abs(drawn.mean() - 0.5) < 0.0072, name
        assert abs((drawn < 0.1).mean() - 0.1) < 0.0075, name
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.025, name
        if name != "plain":
            assert abs(np.corrcoef(drawn, draws["plain"])[0, 1]) < 0.025, name
    # The second cell of one is the first of the other: the same slot has the same numbers.
    np.testing.assert_array_equal(draws["plain"][20_000:], draws["slots"][:20_000])


def test_generators_differ_by_batch() -> None:
    first = [CellRandom(1, 2, np.array([slot])).generator().random() for slot in (0, 1, 0)]
    assert first[0] == first[2] != first[1]


def test_empty_batches_ask_nothing() -> None:
    for tokens in (Ragged.from_cells([]), Ragged.from_cells([[], []]), Ragged.from_cells([[2, 3]])):
        batch = masked(tokens, Masking(share=1.0))
        assert (len(batch.rows), len(batch.targets), batch.n_tokens) == (0, 0, tokens.n_tokens)


@pytest.mark.parametrize("bad", [dict(share=0.0), dict(share=1.1), dict(mask=0.8, random=0.3), dict(mask=-0.1)])
def test_impossible_shares_are_refused(bad: dict) -> None:
    with pytest.raises(UnsupportedError, match="share"):
        Masking(**bad)
