"""What tests of accelerated models watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def nothing_told() -> None:
    """Reasons for the stock forward pass are told again."""
    from geneformer_fast.drop_in import reasons

    reasons._told.clear()


@pytest.fixture
def attending(monkeypatch: Any) -> list[int]:
    """Gets the number of tokens of each packed attention."""
    from geneformer_fast.drop_in import layers

    found: list[int] = []
    for name in ("varlen_attention", "varlen_attention_qkv"):
        real = getattr(layers, name)

        def counted(x: torch.Tensor, *args: Any, real: Any = real, **options: Any) -> torch.Tensor:
            found.append(len(x))
            return real(x, *args, **options)

        monkeypatch.setattr(layers, name, counted)
    return found
