"""Gene lists as they come with models."""

from __future__ import annotations

import pytest
from value_files import gene_files, know_families

from geneformer_fast import families


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Family -> the file with its genes."""
    added = know_families()
    yield gene_files(tmp_path_factory.mktemp("lists"))
    for name in added:
        families._registered.pop(name)
