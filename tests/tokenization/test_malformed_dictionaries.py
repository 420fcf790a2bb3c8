"""Dictionaries of any content give a vocabulary or one error, and execute nothing."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import VocabularyError
from geneformer_fast.tokenization.vocabulary import Vocabulary

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["token_dictionary.json", "gene_median_dictionary.json", "ensembl_mapping_dict.json"]),
)
def test_dictionaries_of_any_content(tmp_path, content, name):
    good = {
        "token_dictionary.json": {"<pad>": 0, "<mask>": 1, "G1": 2, "G2": 3},
        "gene_median_dictionary.json": {"G1": 1.0, "G2": 2.0},
        "ensembl_mapping_dict.json": {"A": "G1"},
    }
    for file, value in {**good, name: content}.items():
        (tmp_path / file).write_text(json.dumps(value))
    with suppress(VocabularyError):
        Vocabulary.from_folder(tmp_path)


def test_a_dictionary_that_executes_something(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "token_dictionary.pkl").write_bytes(pickle.dumps({"<pad>": 0, "<mask>": 1, "G1": Runs()}))
    (tmp_path / "gene_median_dictionary.pkl").write_bytes(pickle.dumps({"G1": 1.0}))
    with pytest.raises(VocabularyError, match=r"token_dictionary\.pkl: refused.*could execute code"):
        Vocabulary.from_folder(tmp_path)
    assert not (tmp_path / "executed").exists()
