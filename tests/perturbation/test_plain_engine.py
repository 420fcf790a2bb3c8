"""Values of every kind of edit in every mode, beside plain Python: one variant, one gene, one cosine at a time."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from plain_edits import plain_variants

import geneformer_fast as gf
from geneformer_fast.perturbation.compare import MODES, Comparison, Framing
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.engine import PerturbationRun

MAX_LEN = 10
# The last ones fill the model, or have one gene, or two.
LENGTHS = (7, MAX_LEN, MAX_LEN - 1, 1, 2)
EDITS = {
    "delete": dict(kind="delete"),
    "overexpress": dict(kind="overexpress"),
    "inhibit": dict(kind="inhibit", doses=(0.1, 0.7)),
    "activate": dict(kind="activate", doses=(0.3,)),
    "pairs": dict(kind="delete", pairs=True),
    "swap": dict(kind="swap", pairs=True),
    "list together": dict(kind="overexpress", genes=(50, 11, 51), together=True),
    "list": dict(kind="overexpress", genes=(50, 11, 12)),
    "deleted list": dict(kind="delete", genes=(11, 12), together=True),
    "anchor": dict(kind="overexpress", anchor=11),
    "anchor and list": dict(kind="delete", anchor=11, genes=(12, 13)),
    "sets": dict(kind="delete", sets=((11, 12, 55), (13,))),
}


@pytest.fixture(scope="module")
def encoder() -> gf.Encoder:
    torch.manual_seed(4)
    config = gf.EncoderConfig(3, 16, 2, 32, vocab_size=60, max_len=MAX_LEN, init_std=0.3)
    return gf.Encoder(config).eval()


def cells(framing: Framing) -> list[list[int]]:
    """Genes 10 to 49, of which most cells have the first ones; between CLS 2 and EOS 3 where there are these."""
    generator, found = np.random.default_rng(5), []
    for length in LENGTHS:
        n = max(1, length - framing.n_front - framing.n_back)
        genes = generator.permutation([11, 12, 13, *generator.permutation(np.arange(14, 50))][:n]).tolist()
        found.append([2] * framing.n_front + genes + [3] * framing.n_back)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def plain_values(encoder, edits, cell, mode, states):
    """{(number, state or None, affected or None): value} of one cell's variants."""
    front, back = edits.front, edits.back

    @functools.cache
    def alone(tokens):
        with torch.inference_mode():
            return encoder(gf.Ragged.from_cells([list(tokens)]), layer="penultimate").values.double().numpy()

    def hidden(tokens):
        return alone(tuple(tokens))

    def embedding(tokens, rows):
        return rows[0] if mode.startswith("cls") else rows[front : len(tokens) - back].mean(0)

    found = {}
    for number, variant in enumerate(plain_variants(edits, cell)):
        if not variant.tokens:
            found |= {(number, state, None): np.nan for state in (range(len(states)) if states is not None else [None])}
            continue
        after, before = hidden(variant.tokens), hidden(variant.original)
        of_genes = {
            gene: cosine(after[variant.tokens.index(gene)], before[variant.original.index(gene)])
            for gene in variant.common(front, back)
        }
        if states is not None:
            for state, vector in enumerate(states):
                is_there = mode.startswith("cls") or len(variant.tokens) > front + back
                shift = np.nan
                if is_there:
                    now, then = embedding(variant.tokens, after), embedding(variant.original, before)
                    shift = cosine(now, vector) - cosine(then, vector)
                found[number, state, None] = shift
        elif mode.startswith("cls"):
            found[number, None, None] = cosine(after[0], before[0])
        else:
            found[number, None, None] = np.mean([*of_genes.values()]) if of_genes else np.nan
        if mode.endswith("gene"):
            found |= {(number, None, gene): value for gene, value in of_genes.items()}
    return found


def engine_values(run: PerturbationRun, has_states: bool):
    """The same from the engine, by rank."""
    found = {rank: {} for rank in range(len(run.lengths))}
    for piece in run.values():
        effects, of_cell = piece.effects, found[piece.rank]
        first = len({number for number, *_ in of_cell})
        for number, row in enumerate(effects.cell.tolist()):
            for state, value in enumerate(row):
                of_cell[first + number, state if has_states else None, None] = value
        if effects.genes is not None:
            for number, gene, value in zip(effects.variant, effects.affected, effects.genes, strict=True):
                of_cell[first + int(number), None, int(gene)] = float(value)
    return found


@pytest.mark.parametrize("has_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EDITS)
def test_values_are_those_of_plain_python(encoder, name, mode, has_states):
    framing = Framing(1, 1) if mode.startswith("cls") or name in ("pairs", "list", "inhibit") else Framing()
    asked = {**EDITS[name], "front": framing.n_front, "back": framing.n_back, "max_len": MAX_LEN}
    edits, lists = Edits(**asked), cells(framing)
    states = torch.randn(2, 16, generator=torch.Generator().manual_seed(6)) if has_states else None
    packed = gf.Ragged.from_cells(lists)

    def read(ranks):
        some = [np.array(lists[rank]) for rank in ranks]
        return np.concatenate(some), np.concatenate([[0], np.cumsum([len(cell) for cell in some])])

    run = PerturbationRun(
        encoder, edits, Comparison(mode, framing, states), "penultimate", packed.lengths.long().numpy(), read,
        token_budget=50,
    )  # fmt: skip
    found = engine_values(run, has_states)
    n_values = 0
    for rank, cell in enumerate(lists):
        wanted = plain_values(encoder, edits, cell, mode, None if states is None else states.double().numpy())
        assert found[rank].keys() == wanted.keys()
        keys = list(wanted)
        np.testing.assert_allclose(
            [found[rank][key] for key in keys], [wanted[key] for key in keys], atol=1e-6, rtol=0, equal_nan=True
        )
        n_values += len(keys)
    assert n_values > 2
