"""What was measured on which card or machine: ``measured.json``, distilled from ``bench/results``.

``python -m bench.distil`` writes it; a test notices when it is stale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.files.schema import build, read_json

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measurement:
    """One measured run.

    Attributes
    ----------
    mode
        ``"embed"`` or ``"train"``.
    model
        A preset.
    dtype
        Of products.
    problem
        Model and cells: measurements of one problem differ in what was computed of it.
    blocks
        How many were computed.
    n_cells, n_tokens, sum_of_squares
        Cells, their tokens, and their squared lengths added up.
    head_rows
        Rows that the head computed, in training.
    seconds
        The median.
    peak_bytes
        Of the card's allocator, or of the process; None where it is of something else.
    batch_tokens
        Most tokens computed at once, by each worker.
    threads
        On a CPU.
    n_batches
        Batches, or steps.
    is_device_alone
        Whether a CUDA graph was replayed, so that the host had nothing to do.
    host_seconds
        Of a card's host, until it had handed everything over; None where nobody looked.
    joules
        None where no energy was measured.
    source, commit, date
        File below ``bench/results``, and what it says of itself.
    """

    mode: str
    model: str
    dtype: str
    problem: str
    blocks: int
    n_cells: int
    n_tokens: int
    sum_of_squares: int
    seconds: float
    batch_tokens: int
    n_batches: int
    source: str
    commit: str
    date: str
    head_rows: float = 0.0
    peak_bytes: int | None = None
    threads: int | None = None
    is_device_alone: bool = False
    joules: float | None = None
    host_seconds: float | None = None


@dataclass(frozen=True)
class Timed:
    """One operation by itself on a card, forward and backward in 16 bits, as training runs it.

    Attributes
    ----------
    operation
        As ``geneformer_kernels`` calls it.
    amounts
        What its time may depend on: of attention ``pairs`` (squared lengths, added up, times heads) and ``rows``
        (tokens times heads), of LayerNorm ``numbers`` (rows times width), of the masked loss ``flops`` and ``logits``.
    seconds
        The median.
    head_dim
        Of attention.
    has_dropout
        Whether attention dropped weights.
    source, commit, date
        As of :class:`Measurement`.
    """

    operation: str
    amounts: dict[str, float]
    seconds: float
    source: str
    commit: str
    date: str
    head_dim: int | None = None
    has_dropout: bool = False


@dataclass(frozen=True)
class Tokenized:
    """One measured pass from a file of counts to a folder of tokens.

    Attributes
    ----------
    preset
        Whose dictionaries.
    problem
        Which cells.
    n_cells, n_tokens
        Of them.
    seconds
        Of the pass; of the whole process where that was measured.
    is_whole_process
        Whether Python's start and imports are in it.
    threads
        Workers.
    peak_bytes
        Of the process.
    source, commit, date
        As of :class:`Measurement`.
    """

    preset: str
    problem: str
    n_cells: int
    n_tokens: int
    seconds: float
    is_whole_process: bool
    threads: int
    source: str
    commit: str
    date: str
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """A card, or a machine with its cores.

    Attributes
    ----------
    name
        As it calls itself: ``"NVIDIA H200"``, ``"AMD EPYC, 2 cores"``.
    kind
        ``"cuda"`` or ``"cpu"``.
    measurements
        Of whole encoders.
    operations
        Of operations by themselves.
    tokenized
        Of tokenizing.
    product_tflops
        10**12 operations/s of large matrix products in 16 bits, of a card; None where nobody looked.
    power_limit_w
        What a card may draw; None where nobody looked.
    """

    name: str
    kind: str
    measurements: list[Measurement] = field(default_factory=list)
    operations: list[Timed] = field(default_factory=list)
    tokenized: list[Tokenized] = field(default_factory=list)
    product_tflops: float | None = None
    power_limit_w: float | None = None


@dataclass(frozen=True)
class Measured:
    """All of it.

    Attributes
    ----------
    machines
        Each once.
    sums_of_squares
        Squared lengths of real cells added up, which the results do not say: family and number of cells to the sum.
    """

    machines: list[Machine]
    sums_of_squares: dict[str, int]


@cache
def measured() -> Measured:
    """What this version knows."""
    found: Measured = build(Measured, read_json(FILE, CheckpointError), FILE.name, CheckpointError)
    return found


def machine_named(name: str) -> Machine:
    """The card or machine of a name, in any spelling; a part of it that only one has will do.

    Raises
    ------
    UnsupportedError
        Nothing was measured there, or several have such a name.
    """
    machines = measured().machines
    wanted = _plain(name)
    exact = [machine for machine in machines if _plain(machine.name) == wanted]
    found = exact or [machine for machine in machines if wanted and wanted in _plain(machine.name)]
    if len(found) == 1:
        return found[0]
    there = "; ".join(machine.name for machine in machines)
    why = "fits several" if found else "is not among those that were measured"
    raise UnsupportedError(
        f"card (--card) {name!r} {why}, and nothing is guessed of others. There are: {there}. Run geneformer-fast "
        "profile on the one you have"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
