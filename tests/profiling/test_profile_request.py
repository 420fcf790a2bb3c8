"""Options of ``geneformer-fast profile`` that would do nothing, or that are missing, are refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.request import MODES, Request

EMBED = {"mode": "embed", "model": "geneformer-v1-10m", "lengths": "real"}
TRAIN = {**EMBED, "mode": "train"}
TOKENIZE = {"mode": "tokenize"}
PREDICT = {"predict": True, "card": "NVIDIA H200", "cells": 10}
COUNTS = {"mode": "tokenize", "counts": "cells.h5ad", "dictionary": "vocabulary"}

VALUES = {
    "tokens": "tokens", "lengths": "100", "cells": 5, "dtype": "float32", "device": "cpu", "threads": 1,
    "token_budget": 64, "layer": "last", "recompute": True, "counts": "cells.h5ad", "dictionary": "vocabulary",
    "preset": "v1", "compare": "stock", "sweep": True, "steps": 3, "seconds": 1.0, "card": "NVIDIA H200",
    "out": "here", "overwrite": True, "model": "geneformer-v1-10m", "predict": True,
}  # fmt: skip

# What each kind of request follows, besides what it needs itself.
FOLLOWS = {
    "embed": (EMBED, {"tokens", "lengths", "cells", "dtype", "device", "threads", "token_budget", "layer", "compare",
                      "sweep", "steps", "seconds", "out", "model"}),
    "train": (TRAIN, {"tokens", "lengths", "cells", "dtype", "device", "threads", "token_budget", "recompute",
                      "compare", "sweep", "steps", "seconds", "out", "model"}),
    "made-up counts": (TOKENIZE, {"lengths", "cells", "threads", "steps", "seconds", "out"}),
    "counts": (COUNTS, {"counts", "dictionary", "preset", "threads", "steps", "seconds", "out"}),
    "predict": (PREDICT, {"model", "tokens", "lengths", "cells", "dtype", "threads", "token_budget", "layer", "card",
                          "predict"}),
    "predict tokenizing": ({**PREDICT, "mode": "tokenize"}, {"lengths", "cells", "threads", "preset", "card",
                                                             "predict"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLLOWS)
@pytest.mark.parametrize("option", VALUES)
def test_every_option_is_followed_or_refused_by_name(kind, option):
    asked, follows = FOLLOWS[kind]
    without = {"lengths": None} if option == "tokens" else {}  # one or the other
    request = Request(**{**asked, **without, option: VALUES[option]})
    if option in follows or asked.get(option) == VALUES[option]:
        request.check()
    else:
        with pytest.raises(UnsupportedError) as error:
            request.check()
        # Of what cannot stand alone, what is missing beside it is named.
        beside = {"predict": ("--card", "--cells", "--counts"), "counts": ("--dictionary",)}.get(option, ())
        assert str(error.value).startswith((f"--{option.replace('_', '-')} ", *beside)), str(error.value)


def test_every_option_is_looked_at_here():
    assert {field.name for field in dataclasses.fields(Request)} == {*VALUES, "mode"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({**EMBED, "mode": "sing"}, "must be one of embed, train, tokenize"),
        ({**EMBED, "compare": "flash"}, "must be stock"),
        ({**EMBED, "model": None}, "--model is missing: name a checkpoint folder or a preset"),
        ({**EMBED, "lengths": None}, "--tokens is missing: say which cells"),
        ({**EMBED, "tokens": "t"}, "--lengths is about made-up cells"),
        ({**EMBED, "steps": 0}, "--steps must be from 1"),
        ({**EMBED, "cells": -1}, "--cells must be from 1"),
        ({**EMBED, "threads": 10**10}, "--threads must be from 1"),
        ({**EMBED, "token_budget": 0}, "--token-budget must be from 1"),
        ({**EMBED, "seconds": 0.0}, "--seconds must be above 0"),
        ({**EMBED, "seconds": float("nan")}, "--seconds must be above 0"),
        ({**EMBED, "seconds": float("inf")}, "--seconds must be above 0"),
        ({**EMBED, "seconds": 1.0, "steps": 3}, "--steps and --seconds both"),
        ({**EMBED, "sweep": True, "token_budget": 5}, "--token-budget is what --sweep finds"),
        ({**EMBED, "overwrite": True}, "--overwrite needs a folder"),
        ({"mode": "tokenize", "counts": "x.h5ad"}, "--dictionary is missing"),
        ({"predict": True, "cells": 10}, "--card is missing"),
        ({"predict": True, "card": "H200"}, "--cells is missing"),
        ({**PREDICT, "preset": "v1"}, "--preset is about --mode tokenize"),
    ],
)
def test_what_contradicts_itself_or_is_missing(asked, said):
    with pytest.raises(UnsupportedError) as error:
        Request(**asked).check()
    assert str(error.value).startswith(said) or said in str(error.value)


def test_modes_are_those_of_the_command():
    import argparse

    from geneformer_fast.cli import profile

    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    known = {action.dest: action for action in parser._actions}
    assert tuple(known["mode"].choices) == MODES
    assert {field.name for field in dataclasses.fields(Request)} <= set(known)
    assert set(known) - {field.name for field in dataclasses.fields(Request)} == {"help"}
