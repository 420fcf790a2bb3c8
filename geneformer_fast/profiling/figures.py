"""What a report consists of: figures, each a number or the reason why there is none, in records that are JSON.

Units are in the names: ``_s`` seconds, ``_ms`` milliseconds, ``_bytes`` bytes, ``_watts``, ``_joules``. Rates are per
second of wall time within the measured window, which leaves warm-up out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Missing:
    """Stands where a figure would, and says why there is none. In JSON ``{"not_available": reason}``, never 0."""

    not_available: str

    def __str__(self) -> str:
        return f"not available ({self.not_available})"


#: A number, or why there is none.
Figure = float | Missing


def divided(numerator: Figure, denominator: Figure, what: str = "it") -> Figure:
    """The quotient of two figures; the first that is missing where one is, and missing where nothing is divided by."""
    for each in (numerator, denominator):
        if isinstance(each, Missing):
            return each
    assert not isinstance(numerator, Missing)
    assert not isinstance(denominator, Missing)
    return numerator / denominator if denominator else Missing(f"{what} is 0")


def times(*factors: Figure) -> Figure:
    """The product of figures; the first that is missing where one is."""
    product = 1.0
    for each in factors:
        if isinstance(each, Missing):
            return each
        product *= each
    return product


@dataclass(frozen=True)
class Spread:
    """10th, 50th and 90th percentile."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Of an array or list that is not empty."""
        return cls(*(float(value) for value in np.percentile(values, (10, 50, 90))))


@dataclass(frozen=True)
class Subject:
    """What was profiled.

    Attributes
    ----------
    mode
        ``"embed"``, ``"train"``, ``"tokenize"`` (commands), or ``"loop"``: somebody's own.
    model
        Folder, preset or class.
    engine
        Who computes: ``"geneformer_fast"``, ``"transformers"`` or ``"torch"``.
    n_parameters
        Of the model.
    geometry
        Its :class:`geneformer_fast.EncoderConfig` as a dict, where it has one.
    dtype
        Of matrix products: a name as torch has it, or ``"int8"`` and ``"fp8"`` for quantized products.
    device
        ``"cpu"``, ``"cuda:0"``.
    cells
        Where the cells came from, in words.
    settings
        Everything else that was chosen: token budget, threads, workers, layer ...
    """

    mode: str
    model: str
    engine: str
    n_parameters: int | None
    geometry: dict[str, Any] | None
    dtype: str | None
    device: str
    cells: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Datasheet:
    """What the maker of a card promises: T operations/s of dense products by dtype, GB/s of its memory, and where."""

    name: str
    products: dict[str, float]
    memory_gbps: float
    document: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this very run.

    Attributes
    ----------
    products
        10**12 operations/s of large matrix products by dtype (``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"``,
        ``"fp8"``).
    copy_gbps
        10**9 bytes/s, read and written, of a large copy.
    datasheet
        None where the card is not known, and on CPUs.
    """

    products: dict[str, Figure]
    copy_gbps: Figure
    datasheet: Datasheet | None = None

    def product(self, dtype: str | None) -> Figure:
        """T operations/s of one dtype."""
        absent = f"no ceiling of products{f' in {dtype}' if dtype else ''} was measured"
        return self.products.get(dtype or "", Missing(absent))

    def promised(self, dtype: str | None) -> Figure:
        """The same by the datasheet."""
        if self.datasheet is None:
            return Missing("no datasheet of this device is known")
        found = self.datasheet.products.get(dtype or "")
        return Missing(f"the datasheet of {self.datasheet.name} says nothing of {dtype}") if found is None else found


#: Into what the time of a step is divided. ``data``: waiting for the next batch; ``copies``: between host and device;
#: ``host_gaps``: the device had nothing to do while a step went on; ``other``: the rest.
PARTS = ("data", "copies", "forward", "backward", "optimizer", "communication", "host_gaps", "other")


@dataclass(frozen=True)
class Timing:
    """The measured window.

    Attributes
    ----------
    n_steps, n_warmup
        Steps measured; steps before, which were left out.
    wall_s
        Of all measured steps together.
    cpu_s
        Processor time of this process and its workers in that window.
    first_step_s
        The very first step, with what is compiled and allocated in it.
    step_ms
        Of the steps; where several are computed at once, the forward pass of each, in its own thread.
    parts
        Seconds of the window by :data:`PARTS`; they add up to ``wall_s`` where none is missing.
    n_at_once
        Steps that were computed at the same time.
    """

    n_steps: int
    n_warmup: int
    wall_s: float
    cpu_s: Figure
    first_step_s: Figure
    step_ms: Spread
    parts: dict[str, Figure]
    n_at_once: int = 1


@dataclass(frozen=True)
class Cells:
    """Cells of the measured window; ``per_s`` and ``tokens_per_s`` count real cells and real tokens only.

    ``read_gbps``: 10**9 bytes of the input files, as they lie on the disk, per second.
    """

    n: int
    per_s: Figure
    tokens_per_s: Figure
    lengths: Spread | None
    read_gbps: Figure = Missing("no files of counts were read")


@dataclass(frozen=True)
class Tokens:
    """Real tokens, and positions that were computed: a padded batch computes its rectangle.

    Attributes
    ----------
    useful_share
        ``n_real / n_positions``.
    batches
        [cells, real tokens, positions] of the batches; of very many, a regular selection.
    n_real_squares, n_position_squares
        Sums of the squared lengths of cells, and of what they were padded to: what attention costs. 0 where unknown.
    """

    n_real: int
    n_positions: int
    useful_share: Figure
    batches: list[list[int]]
    n_real_squares: int = 0
    n_position_squares: int = 0


@dataclass(frozen=True)
class Flops:
    """Operations (a multiplication and an addition are two) of the measured window.

    Attributes
    ----------
    model
        What the result needs: real tokens, attention by each cell's own length, rows of the head that were asked for;
        in training three times the forward pass (Chowdhery et al., arXiv:2204.02311).
    hardware
        What was computed: padding and recomputation counted.
    per_cell
        ``model`` per cell.
    mfu, hfu
        ``model`` and ``hardware`` per second over the measured ceiling of ``ceiling_dtype``.
    mfu_of_datasheet, hfu_of_datasheet
        Over the datasheet's.
    basis
        ``"formula"``, ``"counted"`` (torch's FlopCounterMode) or ``"unknown"``.
    note
        How it was counted, or why it was not.
    """

    model: Figure
    hardware: Figure
    per_cell: Figure
    mfu: Figure
    hfu: Figure
    mfu_of_datasheet: Figure
    hfu_of_datasheet: Figure
    ceiling_dtype: str | None
    basis: str
    note: str


#: Into what memory is divided.
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "other")


@dataclass(frozen=True)
class Alive:
    """Something that was in memory at the peak."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes; of the card where there is one, else of the process.

    Attributes
    ----------
    parts
        At the peak, by :data:`KINDS`. ``other`` on a CPU: Python, libraries, and what they map.
    peak_bytes
        The most that was in use: the allocator's figure on a card, the operating system's (VmHWM) on a CPU.
    reserved_bytes
        What the allocator held at the peak.
    fragmentation
        Share of ``reserved_bytes`` that was not in use then.
    process_bytes
        The most resident memory of this process.
    at_peak
        What was alive at the peak, largest first.
    """

    parts: dict[str, Figure]
    peak_bytes: Figure
    reserved_bytes: Figure
    fragmentation: Figure
    process_bytes: Figure
    at_peak: list[Alive]


@dataclass(frozen=True)
class Energy:
    """Of the card, or of the processor's packages, over a window of at least two seconds.

    Attributes
    ----------
    counter
        Where it comes from: ``"NVML energy counter"``, ``"NVML power, integrated"``, ``"zeus"``, ``"RAPL"``; ``""``
        where there is none.
    window_s
        Seconds it was read over.
    joules, watts
        In that window, idle power included.
    idle_watts
        Before the work began.
    joules_per_cell, cells_per_kwh, kwh_per_million_cells
        Idle power included.
    state
        Clocks, temperature, throttle reasons, utilisation, as read at the end of the window or averaged over it: name
        with unit to a number, text, or a reason.
    """

    counter: str
    window_s: Figure
    joules: Figure
    watts: Figure
    idle_watts: Figure
    joules_per_cell: Figure
    cells_per_kwh: Figure
    kwh_per_million_cells: Figure
    state: dict[str, float | str | Missing]


@dataclass(frozen=True)
class Operation:
    """One operation, over the steps that torch's profiler watched.

    Attributes
    ----------
    name
        As ``geneformer_kernels`` calls it (``"varlen_attention"``), with ``" backward"`` behind it in a backward pass;
        a name of torch for everything else.
    calls
        How often.
    time_ms
        Without what other operations of the table did within it; on the device where there is one.
    share
        Of the time of all watched steps.
    flops, n_bytes
        What it needs at least, over those calls.
    roof_share
        The time its roofline allows (the larger of flops over the ceiling of products and bytes over that of copies)
        over the time it took.
    """

    name: str
    calls: int
    time_ms: float
    share: float
    flops: Figure
    n_bytes: Figure
    roof_share: Figure


@dataclass(frozen=True)
class Series:
    """Values over time.

    Attributes
    ----------
    time_s
        Seconds since the window began.
    values
        Per name (``"power_watts"``, ``"memory_bytes"``) a value for each moment, None where none was read.
    """

    time_s: list[float] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What to change.

    Attributes
    ----------
    name
        Which rule found it: ``"padding"``.
    text
        For the reader, with the numbers in it.
    numbers
        What it rests on.
    gain
        Expected times as fast, where that can be told.
    """

    name: str
    text: str
    numbers: dict[str, float]
    gain: float | None = None


@dataclass(frozen=True)
class Setting:
    """One setting that was tried: the token budget, what it reached, its peak memory and how much that leaves free."""

    token_budget: int
    cells_per_s: Figure
    peak_bytes: Figure
    free_bytes: Figure
    note: str = ""
