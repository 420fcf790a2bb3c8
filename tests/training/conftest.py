"""The cells that tests of training train on."""

from __future__ import annotations

import pytest
import toys
from ground import Ground

import geneformer_fast as gf
from geneformer_fast.tokenization.arrow import TokenFolder


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground") / "tokens"
    tokens = gf.tokenize(
        toys.cells(80, seed=3), folder, dictionary=toys.vocabulary(), obs=["kind", "score"], progress=False
    )
    assert isinstance(tokens, TokenFolder)
    return Ground(tokens)
