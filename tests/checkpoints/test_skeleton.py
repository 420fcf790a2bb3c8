"""Models of shapes without numbers, and casts that copy what they have to."""

from __future__ import annotations

import pytest
import torch
import toys

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.checkpoints.skeleton import skeleton


@pytest.mark.parametrize("head", [None, "mlm", "cells", "genes", "pooler"])
def test_shapes_are_there_and_nothing_is_drawn(head: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("numbers were drawn")

    config = EncoderConfig(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=90, max_len=64)
    expected = {name: tensor.shape for name, tensor in Encoder(config, head, n_classes=3).state_dict().items()}
    monkeypatch.setattr(torch._refs, "normal_", draw)
    model = skeleton(config, head, n_classes=3)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_cast_copies_no_tensor_that_has_its_dtype() -> None:
    model = toys.encoder()
    narrow = {name for name, _ in model.named_parameters() if name.split(".")[-2] in ("qkv", "out", "up", "down")}
    model.cast("bfloat16")
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == narrow
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.cast("bfloat16")
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
