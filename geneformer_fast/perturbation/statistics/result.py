"""What statistics come to, and the folder that they are written into."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.files.locks import file_lock
from geneformer_fast.files.writing import whole_folder, write_json
from geneformer_fast.perturbation.statistics.asked import ABOUT, MODES, check_place

if TYPE_CHECKING:
    import pandas

    from geneformer_fast.perturbation.drawings import Drawings

MEANING = """\
# What these numbers mean

Asked: {asked}.

`effects.csv` has a row per gene{per_state}.

- `mean`, `low`, `high`: the mean over {units} and its {confidence:.0%} interval, by resampling {units}. It says how
  much the mean would differ with other {units} like these, and nothing of other models, or of experiments.
- `null_mean`, `null_sd`, `effect_size`, `p_value`, `q_value`: the same mean among the {matched} genes that stand as
  high in as many cells. A small p-value says that this gene is unusual among genes like it, in this model and these
  cells.
- `coverage`, `is_covered`: the share of cells that have the gene. Genes in fewer than {min_cells} cells are listed and
  not tested.
- `top_share`, `is_universal`: in how many of its cells the gene is among the tenth that moves the cell most, towards
  the goal and every alternative, and (for the latter) in the control too. Such genes move whatever cell they are in,
  whichever way; what they do says little of the state. Without alternatives and a control one cannot tell them from
  genes that move these cells for a reason.
- `detectable`, `units_needed`: the difference from genes like it that these {units} show with a chance of 0.8, and how
  many would be needed to show the one that was found.

No p-value here says that the gene does this in a living cell. All values come from one model, each is a number without
error for its cell, and more cells make any difference significant. Where predictions of such models were held against
experiments, deliberately simple baselines did as well (Ahlmann-Eltze et al. 2025, doi:10.1038/s41592-025-02772-6), and
the shift of a frozen model without a gene was reported to say no more than which gene it is. Take the ranking for a
list of hypotheses: see whether other layers, other sizes of model and other donors agree, and test them in the
laboratory. The guide "What perturbations say of genes" has the literature.
"""


@dataclass
class Statistics:
    """What perturbations say of genes.

    Attributes
    ----------
    mode
        What was asked.
    table
        The official table of the mode, or None where the run has nothing for it.
    effects
        One row per gene and state: means with intervals, genes like it, coverage, power.
    agreement
        How other runs agree, a row per pair of runs; None without other runs.
    interactions
        What pairs do beyond their genes; None without pairs.
    about
        Settings, counts and versions.
    folder, files
        Where all of this was written, or None, and which files.
    """

    mode: str
    table: pandas.DataFrame | None
    effects: pandas.DataFrame
    agreement: pandas.DataFrame | None = None
    interactions: pandas.DataFrame | None = None
    about: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    files: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        said = self.about
        counted = f"{said.get('genes', len(self.effects)):,} genes in {said.get('cells', 0):,} cells"
        return f"Statistics({self.mode!r}: {counted}, {said.get('significant', 0):,} unusual among genes like them)"

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False, pictures: Drawings | None = None) -> Path:
        """Write a folder: tables as CSV, pictures, ``about.md`` and ``statistics.json``; it is there whole or not.

        Raises
        ------
        OutputError
            Something is there that may not be replaced, or the system does not let it be written.
        """
        out = Path(out)
        check_place(out, overwrite=overwrite)
        with file_lock(out):
            check_place(out, overwrite=overwrite)
            with whole_folder(out) as place:
                for name, table in self.tables().items():
                    table.to_csv(place / name, index=name.removesuffix(".csv") in MODES)
                drawn = [] if pictures is None else pictures.draw(place)
                (place / "about.md").write_text(self.meaning(), encoding="utf-8")
                files = [*self.tables(), *drawn, "about.md", ABOUT]
                write_json(place / ABOUT, {**self.about, "files": files})
        self.folder, self.files = out, files
        return out

    def tables(self) -> dict[str, pandas.DataFrame]:
        """File name -> table, of those that there are."""
        named = {
            f"{self.mode}.csv": self.table,
            "effects.csv": self.effects,
            "agreement.csv": self.agreement,
            "interactions.csv": self.interactions,
        }
        return {name: table for name, table in named.items() if table is not None}

    def meaning(self) -> str:
        """What the numbers mean, in words."""
        said: Mapping[str, Any] = self.about
        units = "cells" if not said.get("n_groups") else f"groups ({said['group']})"
        return MEANING.format(
            asked=MODES.get(self.mode, self.mode),
            per_state=" and state" if "state" in self.effects else "",
            units=units,
            confidence=said.get("confidence", 0.95),
            min_cells=said.get("min_cells", 1),
            matched=said.get("matched", 0),
        )
