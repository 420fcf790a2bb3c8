"""Tests of kernels that a card before Ampere cannot run: they skip there, and for no other reason."""

from __future__ import annotations

import re
from dataclasses import replace

from geneformer_kernels.dispatch import OLDEST_TRITON, ImplUnavailableError, candidates
from geneformer_kernels.target import Target

_REFUSED = re.compile(r"(\w+)(?:: (\w+) was asked for by .* but)? cannot run in (\w+) on ")


def refused_by_old_card(error: BaseException | None, target: Target) -> str:
    """Why, where Triton's kernels were asked for and the table of architectures says no, or the card lacks the dtype.

    "" for any other error, and for every card from Ampere on. A Triton that is absent or too old is a fault of the
    environment, so it counts as another error.
    """
    if type(error).__module__ == "torch._dynamo.exc":  # wraps what a function raises while it is compiled
        error = error.__cause__ or error.__context__
    if not isinstance(error, ImplUnavailableError) or target.kind != "cuda" or target.sm >= 80:
        return ""
    found = _REFUSED.match(str(error))
    if found is None:
        return ""
    op, asked, dtype = found.groups()
    if asked != "triton" and not (dtype == "bfloat16" and target.sm < 75):
        return ""
    options = [option for option in candidates(op, dtype, replace(target, triton=OLDEST_TRITON)) if not option.can_run]
    return next((option.reason for option in options if option.reason in str(error)), "")
