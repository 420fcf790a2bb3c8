"""Embeddings of states as the official extractor pickles them, read without executing anything."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.states import read_states


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_vectors_come_back_by_name(tmp_path, protocol):
    whole = torch.randn(3, 8)
    vectors = {"NK": whole[1], "B cell": torch.randn(8, dtype=torch.float64), "wide": whole.T[:, 2], "one": whole[:1]}
    path = tmp_path / "states.pkl"
    path.write_bytes(pickle.dumps(vectors, protocol=protocol))
    states = read_states(path)
    assert states.names == tuple(vectors)
    wanted = np.stack([vector.float().reshape(-1).numpy() for vector in vectors.values()])
    np.testing.assert_array_equal(states.embeddings, wanted)


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "content",
    [{"NK": Evil()}, {"NK": torch.zeros(2, 3)}, {"NK": torch.zeros(2), "B": torch.zeros(3)}, {"NK": torch.arange(4)},
     {3: torch.zeros(2)}, [torch.zeros(2)], {}, {"NK": [1.0]}],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "states.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"states\.pickle"):
        read_states(path)
    assert not (tmp_path / "harmed").exists()


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path):
    class Long:
        def __reduce__(self):
            storage = torch.zeros(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (8,), (1,), False, {})

    path = tmp_path / "states.pkl"
    path.write_bytes(pickle.dumps({"NK": Long()}))
    with pytest.raises(InputError, match="beyond"):
        read_states(path)
