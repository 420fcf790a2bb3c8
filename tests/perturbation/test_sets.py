"""Sets of genes from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from geneformer_fast.errors import InputError, VocabularyError
from geneformer_fast.perturbation.sets import read_sets, tokens_of_sets

SETS = {"heat shock": ("HSPA1A", "HSPB1"), "one": ("TP53",)}
FILES = {
    "sets.gmt": "heat shock\thttp://a b\tHSPA1A\tHSPB1\t\n\none\t\tTP53\r\n",
    "sets.json": '{"heat shock": ["HSPA1A", "HSPB1"], "one": ["TP53"]}',
}


@pytest.mark.parametrize("name", FILES)
def test_sets_are_read_in_their_order(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    found = read_sets(tmp_path / name)
    assert list(found.items()) == list(SETS.items())


def test_lines_with_tabs_commas_or_blanks(tmp_path: Path) -> None:
    path = tmp_path / "sets.txt"
    path.write_text("\ufeff# name, genes\nheat, HSPA1A,HSPB1\n\ntwo\tA B\n", encoding="utf-8")
    assert read_sets(path) == {"heat": ("HSPA1A", "HSPB1"), "two": ("A", "B")}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.gmt", "x\tabout\n", "line 1: the set 'x' has no genes"),
        ("a.gmt", "x\n", "line 1: the set 'x' has no genes"),
        ("a.gmt", "x\t\tA\nx\t\tB\n", "line 2: there are two sets 'x'"),
        ("a.gmt", "x\t\tA\tB\tA\n", "the set 'x' has the gene 'A' twice"),
        ("a.txt", "# nothing\n", "holds no set"),
        ("a.json", "[1, 2]", "an object of lists"),
        ("a.json", '{"x": "A"}', "an object of lists"),
        ("a.json", '{"x": [1]}', "an object of lists"),
        ("a.json", '{"x": ["A"], "x": ["B"]}', "two sets 'x'"),
        ("a.json", '{"x": ["A"]', "cannot be read as JSON"),
        ("a.json", "{}", "holds no set"),
    ],
)
def test_what_holds_no_sets_is_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        read_sets(tmp_path / name)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gmt cannot be read"):
        read_sets(tmp_path / "none.gmt")
    (tmp_path / "a.gmt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        read_sets(tmp_path / "a.gmt")


def test_genes_without_a_token_are_left_out_openly() -> None:
    tokens = {"A": 5, "B": 6, "ENSB": 6}
    with pytest.warns(UserWarning, match="2 of 5 genes have no token and are left out, such as 'X'"):
        assert tokens_of_sets({"x": ("B", "X", "A"), "y": ("A", "Z")}, tokens.get) == {"x": (6, 5), "y": (5,)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens_of_sets({"x": ("A",)}, tokens.get) == {"x": (5,)}
    with pytest.raises(VocabularyError, match="no gene of the set 'y', such as 'X'"):
        tokens_of_sets({"y": ("X", "Y")}, tokens.get)
    with pytest.raises(VocabularyError, match="'B' and 'ENSB' in the set 'y' are one gene"):
        tokens_of_sets({"y": ("B", "A", "ENSB")}, tokens.get)


def test_sets_by_name_are_as_those_of_a_file() -> None:
    with pytest.raises(InputError, match="the set 'y' has no genes"):
        tokens_of_sets({"x": ("A",), "y": ()}, {"A": 5}.get)
    with pytest.raises(InputError, match="the set 'y' has the gene 'A' twice"):
        tokens_of_sets({"y": ("A", "B", "A")}, {"A": 5, "B": 6}.get)
