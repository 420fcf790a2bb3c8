"""Quantized layers made to multiply as asked on any machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def multiplying(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``multiplying("dynamic")`` or ``("weight_only")``: what scheme int8 does, whatever is fastest here."""

    def asked(mode: str) -> None:
        monkeypatch.setattr("geneformer_fast.layers.int8_mode", lambda *_: mode)

    return asked


@pytest.fixture(params=["dynamic", "weight_only"])
def each_mode(request: pytest.FixtureRequest, multiplying: Callable[[str], None]) -> str:
    """Both ways to multiply."""
    multiplying(request.param)
    return request.param
