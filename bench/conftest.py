"""Measurements take as long as they take: the limit of a test (``pyproject.toml``) is none of theirs."""

from __future__ import annotations

import faulthandler

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The clock that pytest has just started is stopped."""
    faulthandler.cancel_dump_traceback_later()
