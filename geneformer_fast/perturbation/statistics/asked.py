"""What can be asked of statistics, and what of it is wrong whatever the values are: seen before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from geneformer_fast.arguments import check_seed
from geneformer_fast.errors import OutputError, UnsupportedError

#: Modes, and what each asks.
MODES = {
    "goal_state_shift": "how far each gene moves cells towards a state",
    "vs_null": "whether a gene moves cells more than it moves those of another run",
    "mixture_model": "which genes move a cell much, and which hardly",
    "aggregate_data": "all values of some genes",
    "aggregate_gene_shifts": "how far each gene moves each other one",
}
#: Faults of the official tool that can be mended, by what they are about.
FAULTS = {
    "components": "the component of the lower cosines is the one with impact",
    "pool": "a gene is compared with the values of the other genes, all of them",
    "ties": "the variance of rank sums is corrected for ties",
}
#: The modes whose tables have a fault.
_FAULTS_OF = {
    "components": ("mixture_model",),
    "pool": ("goal_state_shift",),
    "ties": ("goal_state_shift", "vs_null"),
}
CORRECTIONS = ("bh", "by")
#: The file that a folder of statistics is known by.
ABOUT = "statistics.json"
_OWN = (ABOUT, "about.md", "effects.csv", "agreement.csv", "interactions.csv", *(f"{mode}.csv" for mode in MODES))
#: Options that are about some modes only: option -> (modes, what it is).
_ABOUT_MODES: dict[str, tuple[tuple[str, ...], str]] = {
    "anchor": (("mixture_model", "aggregate_gene_shifts"), "a gene whose pairs are looked at"),
    "genes": (("aggregate_data", "aggregate_gene_shifts"), "the genes whose values are listed"),
}


def mended(mend: str | Sequence[str]) -> tuple[str, ...]:
    """Which faults are mended, of ``"all"``, a name or several.

    Raises
    ------
    UnsupportedError
        There is no such fault.
    """
    asked = (mend,) if isinstance(mend, str) else tuple(mend)
    if unknown := [name for name in asked if name not in (*FAULTS, "all")]:
        raise UnsupportedError(f"mend (--mend) takes all, {', '.join(FAULTS)}; there is no {unknown[0]!r}")
    return tuple(FAULTS) if "all" in asked else asked


def check_mended(mode: str | None, mend: str | Sequence[str]) -> None:
    """Refuse to mend a fault that the table does not have; ``"all"`` are those that it has.

    Raises
    ------
    UnsupportedError
        There is no such fault, or the table of ``mode`` does not have it. A mode of None has them all.
    """
    has_all = "all" in ((mend,) if isinstance(mend, str) else mend)
    for name in () if mode is None or has_all else mended(mend):
        if mode not in _FAULTS_OF[name]:
            raise UnsupportedError(
                f"mend (--mend) {name} is about {' and '.join(_FAULTS_OF[name])}; the table of {mode} does not have "
                "this fault: leave it out"
            )
    mended(mend)


def check_asked(
    *,
    mode: str | None,
    mend: str | Sequence[str] = (),
    has_null: bool = False,
    given: Mapping[str, Any] | None = None,
    min_cells: int = 1,
    draws: int = 1,
    confidence: float = 0.5,
    fdr: float = 0.5,
    correction: str = "bh",
    seed: int = 0,
) -> None:
    """Refuse what cannot be.

    Parameters
    ----------
    mode, mend, min_cells, draws, confidence, fdr, correction, seed
        As they were given.
    has_null
        Whether there is a run to compare with.
    given
        Further options and their values.

    Raises
    ------
    UnsupportedError
        A name or number is out of range, or options contradict each other.
    """
    if mode is not None and mode not in MODES:
        raise UnsupportedError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "vs_null" and not has_null:
        raise UnsupportedError("vs_null compares with another run: give its folder as null (--null)")
    check_seed(seed)
    check_mended(mode, mend)
    if correction not in CORRECTIONS:
        raise UnsupportedError(f"correction (--correction) is {' or '.join(CORRECTIONS)}, not {correction!r}")
    for name, value, least in (("min_cells", min_cells, 1), ("draws", draws, 1)):
        if value < least:
            raise UnsupportedError(f"{name} ({_option(name)}) must be at least {least}, not {value}")
    for name, share in (("confidence", confidence), ("fdr", fdr)):
        if not 0 < share < 1:
            raise UnsupportedError(f"{name} ({_option(name)}) is a share above 0 and below 1, not {share}")
    for name, (modes, what) in _ABOUT_MODES.items():
        if (given or {}).get(name) and mode not in modes:
            raise UnsupportedError(f"{name} ({_option(name)}) is {what}, in {' and '.join(modes)}; ask for one of them")


def check_others(runs: Any, *, null: Any, compare: Any) -> None:
    """Refuse to hold a run against itself, which says nothing of it.

    Raises
    ------
    UnsupportedError
        A folder is among the runs and among the others.
    """
    there = {path.resolve() for path in _paths(runs)}
    for name, others in (("null", null), ("compare", compare)):
        if twice := next((path for path in _paths(others) if path.resolve() in there), None):
            raise UnsupportedError(f"{name} ({_option(name)}) names {twice}, the run itself; name another run")


def _paths(runs: Any) -> list[Path]:
    """Folders of runs that are named by their folders."""
    some = runs if isinstance(runs, list | tuple) else (runs,)
    return [Path(each) for each in some if isinstance(each, str | PathLike)]


def check_pictures_asked(embeddings: Any, color: Any, *, has_pictures: bool, has_out: bool) -> None:
    """Refuse options of pictures that there will not be.

    Raises
    ------
    UnsupportedError
        There are none, or a colour without the picture that has it.
    """
    if color is not None and embeddings is None:
        raise UnsupportedError("color (--color) colours the cells of embeddings (--embeddings); give these too")
    if embeddings is not None and not (has_pictures and has_out):
        raise UnsupportedError(
            "embeddings (--embeddings) are for a picture; name a folder for it, and leave pictures in"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_run(folder: str) -> None:
    """Refuse what is no finished run.

    Raises
    ------
    OutputError
        There is none, or it is not finished.
    """
    path = Path(folder)
    from geneformer_fast.perturbation import folder as layout  # reads Parquet, which help does without

    state = layout.state_of(path)
    if state == "unfinished":
        raise OutputError(layout.unfinished_message(path))
    if state != "finished" and not layout.is_official(path):
        what = "there is no such folder" if state == "absent" else "it holds no perturbations"
        raise OutputError(f"{folder}: {what}; name one that perturb wrote")


def check_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that may not be written.

    Raises
    ------
    OutputError
        Something else is there, or statistics that may not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    foreign = [name for name in there if name not in _OWN and not (name.endswith(".png") and ABOUT in there)]
    if foreign:
        raise OutputError(f"{out} holds {foreign[0]}, which is no part of statistics; name a folder of its own")
    if there and not overwrite:
        raise OutputError(f"{out} holds statistics already; name another folder or pass overwrite (--overwrite)")
