"""Tokenizing, as ``geneformer-fast tokenize`` does it: counts on the disk to a folder of tokens, pass after pass."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geneformer_fast.counts import expand_inputs
from geneformer_fast.profiling.figures import Missing, divided
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.request import SECONDS, TOKENIZE, Request
from geneformer_fast.profiling.run import profile
from geneformer_fast.profiling.scenarios.counts import made_up_vocabulary, write_made_up_counts
from geneformer_fast.tokenization.arguments import resolve_vocabulary
from geneformer_fast.tokenization.pipeline import default_workers
from geneformer_fast.tokenization.run import tokenize
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: Made-up cells, where nobody says how many.
MADE_UP_CELLS = 8192
_NO_POSITIONS = Missing("tokenizing has no padding: a cell's tokens are as many as its genes")


class Tokenizing:
    """Passes over files of counts.

    Parameters
    ----------
    request
        What was asked for.
    inputs
        Files or folders of counts.
    vocabulary
        Whose tokens.
    what
        Where the counts come from, in words.
    scratch
        A folder for tokens, which are thrown away.
    """

    mode = TOKENIZE

    def __init__(self, request: Request, inputs: list[str], vocabulary: Vocabulary, what: str, scratch: Path) -> None:
        self.request, self.inputs, self.vocabulary = request, inputs, vocabulary
        self.what, self.scratch = what, scratch
        self.workers = request.threads or default_workers()
        self.n_bytes = sum(_size(Path(entry)) for entry in inputs)

    def once(self) -> dict[str, Any]:
        """One pass; what ``Run.step`` is to be told of it."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            found = tokenize(
                self.inputs, Path(place) / "tokens", dictionary=self.vocabulary, workers=self.workers, progress=False
            )
            assert not isinstance(found, tuple)
            with contextlib.closing(found) as tokens:
                return {"lengths": tokens.lengths()}

    def settings(self) -> dict[str, Any]:
        """What was chosen, for the report."""
        return {"workers": self.workers, "vocabulary": self.vocabulary.name, "input_bytes": self.n_bytes}

    def report(self, trace: Path | None = None) -> Report:
        """Measure it; a step is a pass over all counts."""
        begin = time.perf_counter()
        self.once()
        first_s, begin = time.perf_counter() - begin, time.perf_counter()
        self.once()
        pass_s, seconds = time.perf_counter() - begin, self.request.seconds or SECONDS
        n_steps = self.request.steps or max(1, round(seconds / pass_s))
        with profile(
            name="counts to tokens", mode=self.mode, engine="geneformer_fast", n_warmup=0, n_steps=n_steps, n_active=0,
            trace=trace, tokens=self.what, settings=self.settings(), ceilings=False,
        ) as run:  # fmt: skip
            while not run.is_complete:
                run.step(**self.once())
        report = run.report
        return dataclasses.replace(
            report,
            time=dataclasses.replace(report.time, first_step_s=first_s),
            tokens=dataclasses.replace(report.tokens, n_positions=report.tokens.n_real, useful_share=_NO_POSITIONS),
            cells=dataclasses.replace(
                report.cells, read_gbps=divided(self.n_bytes * n_steps / 1e9, report.time.wall_s, "the window")
            ),
        )


@contextlib.contextmanager
def opened_counts(request: Request) -> Iterator[Tokenizing]:
    """The counts of a request, made up where it names none.

    Raises
    ------
    InputError, VocabularyError
        As ``tokenize`` raises them.
    """
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as place:
        scratch = Path(place)
        if request.counts is not None:
            vocabulary = resolve_vocabulary(request.dictionary, request.preset)
            inputs = [os.fspath(entry) for entry in expand_inputs(request.counts)]
            yield Tokenizing(request, inputs, vocabulary, Path(request.counts).name, scratch)
            return
        lengths, n_cells = Lengths.parsed(request.lengths or "real"), request.cells or MADE_UP_CELLS
        path = scratch / "cells.h5ad"
        write_made_up_counts(path, n_cells, lengths)
        words = str(lengths).replace("tokens", "genes")
        yield Tokenizing(request, [str(path)], made_up_vocabulary(), f"{n_cells:,} made-up cells, {words}", scratch)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
