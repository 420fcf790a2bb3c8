"""What a user asks to be profiled. An option that would do nothing is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from geneformer_fast.errors import UnsupportedError

EMBED, TRAIN, TOKENIZE = "embed", "train", "tokenize"
MODES = (EMBED, TRAIN, TOKENIZE)
STOCK = "stock"
#: Seconds that are measured, where nobody says how long.
SECONDS = 10.0
_MOST = 10**9


@dataclass(frozen=True)
class Request:
    """What ``geneformer-fast profile`` is asked for; None (or False) is not asked for.

    Attributes
    ----------
    mode
        One of :data:`MODES`.
    model
        A checkpoint folder, or the name of a preset, which gets random weights.
    tokens, lengths, cells
        A token folder, or what made-up cells are like; how many cells to take.
    dtype, device, threads
        Precision of products, where, and with how many threads.
    token_budget
        Most tokens that are computed at once; in training about so many make a step, as ``batch_tokens`` of
        ``pretrain`` has it, and are computed at once.
    layer
        Embedding stops there.
    recompute
        Training computes blocks twice, to keep less in memory.
    counts, dictionary, preset
        What is tokenized, and with which dictionaries.
    compare
        ``"stock"``: the same cells by transformers.
    sweep
        Whether token budgets are tried.
    steps, seconds
        How long to measure.
    predict, card
        Whether to predict from measurements of a card or machine instead of measuring.
    out, overwrite
        A folder to write; whether it may be there.
    """

    mode: str = EMBED
    model: str | None = None
    tokens: str | None = None
    lengths: str | None = None
    cells: int | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    token_budget: int | None = None
    layer: str | None = None
    recompute: bool = False
    counts: str | None = None
    dictionary: str | None = None
    preset: str | None = None
    compare: str | None = None
    sweep: bool = False
    steps: int | None = None
    seconds: float | None = None
    predict: bool = False
    card: str | None = None
    out: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Refuse what cannot be followed, before anything is loaded.

        Raises
        ------
        UnsupportedError
            Names the option.
        """
        if self.mode not in MODES:
            raise UnsupportedError(f"mode (--mode) must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.compare not in (None, STOCK):
            raise UnsupportedError(f"compare (--compare) must be {STOCK}, not {self.compare!r}")
        for name, is_idle, why in _IDLE:
            if self.has(name) and is_idle(self):
                raise UnsupportedError(f"{flag(name)} {why}")
        for name in ("cells", "threads", "token_budget", "steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MOST:
                raise UnsupportedError(f"{flag(name)} must be from 1 to {_MOST:,}, not {value}")
        if self.seconds is not None and not 0 < self.seconds <= 86_400:
            raise UnsupportedError(f"--seconds must be above 0 and at most 86400, not {self.seconds}")
        for name, is_needed, why in _NEEDED:
            if not self.has(name) and is_needed(self):
                raise UnsupportedError(f"{flag(name)} is missing: {why}")

    def has(self, name: str) -> bool:
        """Whether an option was given."""
        return getattr(self, name) not in (None, False)

    def given(self) -> dict[str, object]:
        """The options that were given, for the report."""
        return {each.name: getattr(self, each.name) for each in fields(self) if self.has(each.name)}


def flag(name: str) -> str:
    """The option on the command line."""
    return f"--{name.replace('_', '-')}"


# Option, when it would do nothing, and what is said then.
Rule = tuple[str, Callable[[Request], bool], str]
_OF_TOKENIZING = "is about --mode tokenize, which turns counts into tokens"
_PREDICTED = "is about measuring, and --predict measures nothing"
_NO_MODEL = "is about a model, and --mode tokenize has none"
_IDLE: tuple[Rule, ...] = (
    *((name, lambda r: r.mode != TOKENIZE, _OF_TOKENIZING) for name in ("counts", "dictionary", "preset")),
    *(
        (name, lambda r: r.predict, _PREDICTED)
        for name in ("device", "compare", "sweep", "steps", "seconds", "counts", "dictionary")
    ),
    ("recompute", lambda r: r.predict, "has not been measured on any card, so that nothing can be predicted of it"),
    ("out", lambda r: r.predict, "would stay empty: --predict says its answer (--json for machines)"),
    ("card", lambda r: not r.predict, "names measurements to predict from: pass --predict too"),
    *(
        (name, lambda r: r.mode == TOKENIZE, _NO_MODEL)
        for name in ("model", "dtype", "device", "token_budget", "layer", "recompute", "compare", "sweep")
    ),
    ("tokens", lambda r: r.mode == TOKENIZE, "is what --mode tokenize makes; name counts with --counts FILE"),
    ("lengths", lambda r: r.counts is not None, "is about made-up counts, and --counts names a file"),
    ("cells", lambda r: r.counts is not None, "is about made-up counts; all cells of --counts are tokenized"),
    ("layer", lambda r: r.mode == TRAIN, "is where embedding stops; training computes all layers"),
    ("recompute", lambda r: r.mode == EMBED, "is about --mode train: embedding keeps nothing to compute again"),
    ("token_budget", lambda r: r.sweep, "is what --sweep finds; leave one of them out"),
    ("steps", lambda r: r.seconds is not None, "and --seconds both say how long to measure; leave one of them out"),
    ("lengths", lambda r: r.tokens is not None, "is about made-up cells, and --tokens names a folder of real ones"),
    ("overwrite", lambda r: r.out is None, "needs a folder to write, and none is named: pass --out"),
    (
        "dictionary",
        lambda r: r.counts is None,
        "belongs to counts of yours: pass --counts too, or leave it out for made-up ones",
    ),
    (
        "preset",
        lambda r: r.counts is None and not r.predict,
        "chooses among the dictionaries of --dictionary, and there is none",
    ),
)
# Option, when it cannot be done without, and why.
_NEEDED: tuple[Rule, ...] = (
    (
        "model",
        lambda r: r.mode != TOKENIZE and not r.predict,
        "name a checkpoint folder or a preset, such as geneformer-v1-10m",
    ),
    ("dictionary", lambda r: r.counts is not None, "counts need the folder of gene dictionaries to become tokens"),
    ("card", lambda r: r.predict, "name the card or machine to predict for, such as 'NVIDIA H200'"),
    ("cells", lambda r: r.predict, "say of how many cells"),
    (
        "tokens",
        lambda r: r.mode != TOKENIZE and r.lengths is None and not r.predict,
        "say which cells: --lengths real, uniform:300-2048 or a number of tokens for made-up ones, or --tokens FOLDER, "
        "which geneformer-fast tokenize makes",
    ),
)
