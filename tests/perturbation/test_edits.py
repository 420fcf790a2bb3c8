"""Edits against a plain Python reference, and against the keys that the official tool writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from plain_edits import plain_variants

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.ragged import Ragged

FIXTURES = Path(__file__).parents[2] / "shared/fixtures/isp"
SHARED = Path(__file__).parents[3] / "shared/fixtures/isp"
MAX_LEN = 24
# Lists, pairs and sets of genes 10 ... 49, of which cells below have some, and one that none has.
LISTED = (13, 41, 27, 30, 11)
ASKED = {
    "all": {},
    "together": {"genes": (13, 41), "together": True},
    "three together": {"genes": (30, 13, 41), "together": True},
    "one of a list": {"genes": LISTED},
    "together, many": {"genes": (*LISTED, 22, 45, 99), "together": True},
    "pairs of a list": {"genes": LISTED, "pairs": True},
    "all pairs": {"pairs": True},
    "anchor": {"anchor": 27},
    "anchor and list": {"anchor": 27, "genes": (13, 41, 99)},
    "sets": {"sets": ((13, 41, 27), (99,), (11,), (30, 22, 45, 13, 99))},
}
DOSES = {"inhibit": (0.05, 0.3, 1.0), "activate": (0.5, 0.01)}


def cells_of(front: int, back: int) -> list[list[int]]:
    """Cells from no gene but one to the limit, in some order of ranks."""
    rng = np.random.default_rng(3)
    lengths = [1, 2, 3, 7, 16, *range(MAX_LEN - 8, MAX_LEN - front - back + 1)]
    return [[2] * front + (rng.permutation(40)[:n] + 10).tolist() + [3] * back for n in lengths]


def edits_of(kind: str, asked: dict, front: int, back: int) -> Edits:
    return Edits(kind, **asked, doses=DOSES.get(kind, ()), front=front, back=back, max_len=MAX_LEN)


def cases() -> list[tuple[str, str]]:
    is_two = {"together", "pairs of a list", "all pairs", "anchor", "anchor and list"}
    kinds = ("delete", "overexpress", "inhibit", "activate", "swap")
    return [(kind, name) for kind, name in itertools.product(kinds, ASKED) if kind != "swap" or name in is_two]


@pytest.mark.parametrize(("front", "back"), [(0, 0), (1, 1), (1, 0)])
@pytest.mark.parametrize(("kind", "name"), cases())
def test_variants_are_those_of_the_plain_reference(kind: str, name: str, front: int, back: int) -> None:
    cells = cells_of(front, back)[: 5 if name == "all pairs" else None]
    edits = edits_of(kind, ASKED[name], front, back)
    wanted = [(number, each) for number, cell in enumerate(cells) for each in plain_variants(edits, cell)]
    on = edits.on(Ragged.from_cells(cells))
    assert len(on) == len(wanted)
    counts = np.bincount([number for number, _ in wanted], minlength=len(cells))
    assert on.n_variants.tolist() == counts.tolist()
    n_tokens = np.bincount([number for number, _ in wanted], [len(each.tokens) for _, each in wanted], len(cells))
    assert on.n_tokens.tolist() == n_tokens.astype(int).tolist()
    n_common = [len(each.common(front, back)) for _, each in wanted]
    assert on.n_common.tolist() == np.bincount([n for n, _ in wanted], n_common, len(cells)).astype(int).tolist()
    seen = 0
    for start, stop in on.slices(150):
        assert start == seen
        seen = stop
        made = on.variants(start, stop)
        assert made.tokens.n_tokens <= 150 or stop == start + 1
        made.tokens.check()
        _assert_same(made, cells, wanted[start:stop], edits)
    assert seen == len(on)


def _assert_same(made, cells, wanted, edits) -> None:
    originals = [*cells, *([] if made.shortened is None else [x.tolist() for x in made.shortened.cells()])]
    values = [token for cell in originals for token in cell]
    common = made.is_common.split(made.tokens.lengths.tolist())
    sources = made.source.split(made.tokens.lengths.tolist())
    for v, (tokens, (number, each)) in enumerate(zip(made.tokens.cells(), wanted, strict=True)):
        assert tokens.tolist() == each.tokens
        assert made.origin[v] == number
        assert originals[made.original[v]] == each.original
        assert [token for token in made.perturbed[v].tolist() if token >= 0] == each.perturbed
        assert made.dose[v] == each.dose
        assert tokens[common[v]].tolist() == each.common(edits.front, edits.back)
        begin = sum(map(len, originals[: made.original[v]]))
        for token, source in zip(tokens.tolist(), sources[v].tolist(), strict=True):
            if source < 0:
                assert token not in each.original
            else:
                assert values[source] == token
                assert begin <= source < begin + len(each.original)


def test_originals_are_shortened_once_for_variants_that_share_them() -> None:
    cell = list(range(10, 10 + MAX_LEN))
    made = Edits("overexpress", genes=tuple(range(50, 70)), max_len=MAX_LEN).on(Ragged.from_cells([cell, cell]))
    variants = made.variants(0, len(made))
    assert variants.shortened is not None
    assert [x.tolist() for x in variants.shortened.cells()] == [cell[:-1], cell[:-1]]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_keys_are_those_that_the_official_tool_writes(version: str, kind: str) -> None:
    folder = _fixtures()
    mode = "cell" if version == "v1" else "cls"
    name = f"{version}_{kind}_all_{mode}_layer-1"
    found = pq.read_table(folder / f"outputs/{name}.parquet").to_pydict()
    official = {}
    for rank, token in zip(found["rank"], found["perturbed"], strict=True):
        official.setdefault(rank, []).append(int(token))
    table = pq.read_table(folder / f"cells_{version}.parquet")
    cells = sorted(table["input_ids"].to_pylist(), key=len, reverse=True)
    front = back = int(version == "v2")
    on = Edits(kind, front=front, back=back, max_len=64).on(Ragged.from_cells(cells))
    variants = on.variants(0, len(on))
    assert {rank: sorted(tokens) for rank, tokens in official.items()} == {
        rank: sorted(variants.perturbed[variants.origin == rank, 0].tolist()) for rank in range(len(cells))
    }


def _fixtures() -> Path:
    for folder in (SHARED, FIXTURES):
        if folder.exists():
            assert json.loads((folder / "index.json").read_text())
            return folder
    pytest.skip("no folder shared/fixtures/isp beside the checkout")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"kind": "remove"}, "one of delete, overexpress"),
        ({"kind": "inhibit"}, "say which with doses"),
        ({"kind": "delete", "doses": (0.1,)}, "takes no doses"),
        ({"kind": "inhibit", "doses": (0.1, 1.5)}, "not 1.5"),
        ({"kind": "inhibit", "doses": (0.1, 0.1)}, "differ"),
        ({"kind": "inhibit", "doses": (float("nan"),)}, "not nan"),
        ({"kind": "swap"}, "ask for pairs"),
        ({"kind": "swap", "sets": ((4, 5),)}, "takes no sets"),
        ({"kind": "delete", "together": True}, "say which with genes"),
        ({"kind": "delete", "genes": ()}, "must name a gene"),
        ({"kind": "delete", "genes": (4,), "pairs": True}, "need two genes"),
        ({"kind": "delete", "genes": (4, 5, 4)}, "gene 4 is in a list twice"),
        ({"kind": "delete", "genes": (4, 5), "anchor": 4}, "must not be one of them"),
        ({"kind": "delete", "genes": (4, 5), "pairs": True, "together": True}, "exclude each other"),
        ({"kind": "delete", "genes": (4,), "sets": ((5,),)}, "leave genes .--genes. out"),
        ({"kind": "delete", "sets": ((5,), ())}, "hold a gene each"),
        ({"kind": "overexpress", "genes": (4, 5, 6), "together": True, "front": 1, "back": 1, "max_len": 4}, "reads 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        Edits(**asked)


def test_one_gene_of_one_leaves_an_empty_variant() -> None:
    on = Edits("delete").on(Ragged.from_cells([[5], [6, 7]]))
    assert [x.tolist() for x in on.variants(0, 3).tokens.cells()] == [[], [7], [6]]
    assert len(on.variants(1, 1)) == 0
    with pytest.raises(IndexError):
        on.variants(0, 4)


def test_pairs_of_many_genes_are_numbered_without_a_gap() -> None:
    from geneformer_fast.perturbation.edited_cells import _pair

    for n in (2, 3, 4096, 94906267):  # beyond 2**26, squares are no longer exact in double precision
        last = n * (n - 1) // 2 - 1
        first, second = _pair(torch.tensor([last, last - (n - 1) + 1]))
        assert (first.tolist(), second.tolist()) == ([n - 2, 0], [n - 1, n - 1])


@pytest.mark.parametrize("kind", ["delete", "overexpress", "activate"])
@pytest.mark.parametrize("name", ["pairs of a list", "sets", "one of a list"])
def test_tables_of_lists_and_cells_are_made_in_parts(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edits, cells = edits_of(kind, ASKED[name], 1, 1), Ragged.from_cells(cells_of(1, 1))
    whole = edits.on(cells)
    monkeypatch.setattr("geneformer_fast.perturbation.edited_cells._PLACES_AT_ONCE", 30)
    parts = edits.on(cells)
    for field in ("n_variants", "n_tokens", "longest", "n_common"):
        assert getattr(parts, field).tolist() == getattr(whole, field).tolist()
    assert torch.equal(parts.variants(0, len(parts)).tokens.values, whole.variants(0, len(whole)).tokens.values)


def test_genes_that_are_there_alone_are_put_in_front() -> None:
    cells = Ragged.from_cells([[5, 6, 7], [8, 6], [9]])
    on = Edits("overexpress", genes=(6, 7), is_present=True, max_len=3).on(cells)
    assert [x.tolist() for x in on.variants(0, len(on)).tokens.cells()] == [[6, 5, 7], [7, 5, 6], [6, 8]]
    assert on.n_variants.tolist() == [2, 1, 0]
