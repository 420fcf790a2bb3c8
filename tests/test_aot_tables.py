"""The files that tools/aot_matrix.py generates: what a table says, and what is read of it again."""

from __future__ import annotations

from dataclasses import replace

import aot_tables
import pytest
from aot_tables import NO_CODE, Row, Table

ROW = Row("feed_forward", "a_kernel", "", "float16", 80, True, 4, 2, 100, 0, 1024, "HMMA", "00000000")


def kinds(*rows: Row) -> str:
    (kind,) = aot_tables.capability(rows).values()
    return kind


def test_capability_is_the_worst_of_what_may_be_launched():
    plain = replace(ROW, kernel="b_kernel", matrix="")
    scalar, refused = replace(ROW, matrix="FMA"), replace(ROW, matrix=NO_CODE)
    assert kinds(plain) == "plain"
    assert kinds(plain, ROW) == "tensor cores"
    assert kinds(plain, ROW, replace(ROW, problem="x", matrix="HMMA+FMA")) == "fma"
    assert kinds(plain, scalar) == "fma"
    assert kinds(scalar, refused) == "none"
    # Evidence: a product that is never launched decides where no other product runs, and only there.
    evidence = replace(refused, is_default=False)
    assert kinds(plain, evidence) == "none"
    assert kinds(plain, replace(scalar, is_default=False)) == "fma"
    assert kinds(plain, ROW, replace(evidence, kernel="c_kernel")) == "tensor cores"
    assert kinds(plain, replace(plain, problem="another plan", matrix=NO_CODE, is_default=False)) == "plain"
    assert list(aot_tables.capability([replace(ROW, sm=90), ROW, replace(ROW, op="rank_genes")])) == [
        ("rank_genes", 80, "float16"),
        ("feed_forward", 80, "float16"),
        ("feed_forward", 90, "float16"),
    ]


def test_a_table_is_read_as_it_was_written():
    sources = {"feed_forward": {"a_kernel": "1", "b_kernel": "2"}, "rank_genes": {"c_kernel": "3"}}
    lost = replace(ROW, op="rank_genes", kernel="c_kernel", registers=None, spill_bytes=None, smem_bytes=None)
    table = Table("3.7.1", sources, [replace(ROW, kernel="b_kernel", problem='D=64 "x"'), ROW, lost])
    text = aot_tables.table_text(table)
    again = aot_tables.read_table(text)
    assert again == replace(table, rows=[lost, *sorted(table.rows[:2])])
    assert aot_tables.table_text(again) == text
    assert max(map(len, text.splitlines())) < 200
    assert aot_tables.read_table(aot_tables.table_text(Table(""))) == Table("")
    assert "`feed_forward` |  |  | HMMA |" in aot_tables.readme_text(table)

    other = Table("3.7.1", {"rank_genes": {"d_kernel": "4"}}, [replace(lost, kernel="d_kernel")])
    merged = table.with_ops(other, ["rank_genes"])
    assert merged.sources == {"feed_forward": sources["feed_forward"], "rank_genes": {"d_kernel": "4"}}
    assert {row.kernel for row in merged.rows} == {"a_kernel", "b_kernel", "d_kernel"}


def test_a_section_of_a_document():
    text = f"before\n{aot_tables.BEGIN}\nold\n{aot_tables.END}\nafter\n"
    assert aot_tables.with_section(text, "new\n") == (f"before\n{aot_tables.BEGIN}\n\nnew\n\n{aot_tables.END}\nafter\n")
    for wrong in ("", aot_tables.BEGIN, aot_tables.END + aot_tables.BEGIN, text + text):
        with pytest.raises(ValueError, match="once each"):
            aot_tables.with_section(wrong, "new\n")
