"""What can be said before the tour begins: where it may go, and whether what it needs is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from geneformer_fast.arguments import check_seed
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.schema import read_json

REPORT = "report.json"
MADE_BY = "geneformer-fast quickstart"
#: Where versions before this one said what they had made.
EARLIER_REPORT = "summary.json"
#: Of the example's cells, the fewest and the most.
LEAST_CELLS, MOST_CELLS = 50, 500
_NEEDED = {"matplotlib": "plot", "umap": "plot", "transformers": "hf"}


def check_ready(n_cells: int, seed: int) -> None:
    """Libraries are installed, there are as many cells, and the seed is one.

    Raises
    ------
    UnsupportedError
        Something is missing, there are too few or too many cells, or nothing can be drawn by the seed.
    """
    check_seed(seed)
    missing = {name: extra for name, extra in _NEEDED.items() if find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        raise UnsupportedError(
            f"quickstart needs {' and '.join(missing)}, not installed here: pip install 'geneformer-fast[{extras}]'"
        )
    if not LEAST_CELLS <= n_cells <= MOST_CELLS:
        raise UnsupportedError(
            f"--cells {n_cells}: the example has {MOST_CELLS} cells of ten types; take {LEAST_CELLS} to {MOST_CELLS} "
            "of them"
        )


def check_folder(out: Path) -> None:
    """A folder is free, or holds an earlier tour, which the next one replaces. Hidden files are no content of it.

    Raises
    ------
    OutputError
        It is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder with --out")
    has_content = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if has_content and not any(_made_here(out / name) for name in (REPORT, EARLIER_REPORT)):
        raise OutputError(f"{out} holds files that quickstart did not make; name another folder with --out")


def _made_here(path: Path) -> bool:
    try:
        return bool(read_json(path, OutputError).get("made_by") == MADE_BY)
    except OutputError:
        return False
