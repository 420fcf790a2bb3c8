"""Options that a call cannot follow are refused: none is ever ignored."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.tokenization.manifest import DATASET_DICT, STATE, UNFINISHED

#: What embeddings may be written to.
SUFFIXES = (".npy", ".arrow", ".parquet", ".csv", ".h5ad")
#: What predictions may be written to.
PREDICTED = (".parquet", ".csv", ".h5ad")


@dataclass(frozen=True)
class Request:
    """What a call reads and writes, as far as options depend on it.

    Attributes
    ----------
    is_anndata, is_tokens
        Whether the input is an AnnData, or a token folder; else it is files of counts.
    suffix
        Of the output file; None keeps the result in memory.
    is_genes
        Whether rows of the result are genes.
    has_plot
        Whether a picture is asked for.
    is_model
        Whether the model is an encoder that is loaded already.
    has_copy
        Whether an AnnData is to be copied.
    is_frame
        Whether a data frame is to be returned.
    """

    is_anndata: bool
    is_tokens: bool
    suffix: str | None
    is_genes: bool
    has_plot: bool = False
    is_model: bool = False
    has_copy: bool = False
    is_frame: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether the result goes into an AnnData."""
        return self.is_anndata and self.suffix is None and not self.is_frame


# Option, when it would do nothing, and what is said then.
Rule = tuple[str, Callable[[Request], bool], str]
_READING = ("counts_layer", "gene_column", "allow_float", "allow_duplicate_cells", "allow_few_genes", "n_counts")
_OF_COUNTS = "is about reading counts, and the input is a folder of tokens; it belongs to tokenize"
_OF_GENES = "has no meaning where rows are genes"
_SHARED: tuple[Rule, ...] = (
    *((name, lambda r: r.is_tokens, _OF_COUNTS) for name in _READING),
    ("obs", lambda r: r.is_genes, _OF_GENES),
    ("obs", lambda r: r.is_in_place, "has no effect on an AnnData, which keeps its own obs"),
    ("obs", lambda r: r.suffix == ".h5ad", "has no effect on an .h5ad output, which keeps all of obs"),
    ("copy", lambda r: not r.is_in_place, "returns a changed AnnData, so it needs an AnnData and no output file"),
    ("overwrite", lambda r: r.suffix is None and not r.has_plot, "needs an output file, and none is named"),
    (
        "memory_budget",
        lambda r: r.has_plot,
        "cannot be kept by pictures, which need all cells; draw in a run without it",
    ),
    ("memory_budget", lambda r: r.has_copy, "cannot be kept where all of an AnnData is copied; leave out copy=True"),
)
EMBED: tuple[Rule, ...] = (
    *_SHARED,
    (
        "obs",
        lambda r: r.suffix is None and not r.is_frame,
        "needs an output file, since an array in memory has no place for columns; or as_frame=True",
    ),
    ("as_frame", lambda r: r.suffix is not None, "returns a table, so it needs no output file"),
    (
        "key_added",
        lambda r: not r.is_in_place and r.suffix != ".h5ad",
        "names a place in obsm and uns, so it needs an AnnData or an .h5ad output",
    ),
    ("dtype", lambda r: r.is_model, "is about loading a checkpoint, and the model is loaded; use model.to(...)"),
    ("device", lambda r: r.is_model, "is about loading a checkpoint, and the model is loaded; use model.to(...)"),
    ("color", lambda r: not r.has_plot, "colours a picture, and none is asked for; name one with plot or heatmap"),
    *((name, lambda r: r.is_genes, "is a picture of cells, and rows are genes") for name in ("plot", "heatmap")),
)
PREDICT: tuple[Rule, ...] = (
    *_SHARED,
    ("copy", lambda r: r.is_genes, "needs classes of cells; those of genes are a table"),
)
_FLAGS = {"copy": "=True", "as_frame": "=True"}


def check_options(rules: Sequence[Rule], request: Request, options: Mapping[str, Any]) -> None:
    """Refuse the first option that would do nothing.

    Parameters
    ----------
    rules
        Of the function that is called.
    request
        What it is to do.
    options
        Its options; None, False, ``"auto"`` and what is empty are as good as not given.

    Raises
    ------
    UnsupportedError
        Names the option and says why.
    """
    given = {name for name, value in options.items() if value is not None and value != "auto" and is_given(value)}
    for name, is_idle, why in rules:
        if name in given and is_idle(request):
            raise UnsupportedError(name + _FLAGS.get(name, f" (--{name.replace('_', '-')})") + f" {why}")


def check_pictures_asked(
    plot: str | os.PathLike[str] | None, heatmap: str | os.PathLike[str] | None, color: str | None
) -> None:
    """Refuse a heatmap of cells in no order, and two pictures of one name."""
    if heatmap is not None and color is None:
        raise UnsupportedError("heatmap (--heatmap) shows cells by a column: name it with color (--color)")
    if plot is not None and heatmap is not None and Path(plot).absolute() == Path(heatmap).absolute():
        raise UnsupportedError(f"plot and heatmap are two pictures, and both are to be {plot}; name two files")


def is_given(value: Any) -> bool:
    """Whether a value of an option asks for anything."""
    return bool(value) if isinstance(value, bool | Mapping | list | tuple | str) else True


def check_h5ad(data: Any, is_genes: bool) -> None:
    """Refuse an .h5ad output that cannot be a copy of the input."""
    if not isinstance(data, str | os.PathLike) or Path(data).suffix != ".h5ad":
        raise UnsupportedError(
            "an .h5ad output is a copy of an .h5ad input; choose another kind of output for other inputs"
        )
    if is_genes:
        raise UnsupportedError("rows of genes go into a table (.parquet, .csv), not into an .h5ad output")


def is_anndata(data: Any) -> bool:
    """Whether this is an AnnData; does not import anndata to find out."""
    module = sys.modules.get("anndata")
    return module is not None and isinstance(data, module.AnnData)


def is_token_folder(data: Any) -> bool:
    """Whether this is a folder of tokens, finished or not."""
    if not isinstance(data, str | os.PathLike):
        return False
    return Path(data).is_dir() and any((Path(data) / name).exists() for name in (STATE, UNFINISHED, DATASET_DICT))
