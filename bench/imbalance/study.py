"""What the study is asked to do, which cells each row learns from, and where everything lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.finetune_real import SEED, VARIANTS, _log_counts, _variable_genes
from geneformer_fast.files.writing import write_json
from geneformer_fast.finetuning.splits import Split, folds
from geneformer_fast.tokenization.manifest import read_json

BASELINE = "pca"
MODELS = ("geneformer", "scgpt", "scbert")
#: Shares of the rare class's training cells that are left; with all of them only the plain way is computed.
SHARES = (1.0, 0.2, 0.05, 0.01)
PLAIN = "plain"
WAYS = tuple(VARIANTS)


@dataclass(frozen=True)
class Asked:
    """What is computed; a folder of work holds one of these.

    Attributes
    ----------
    cells, label, rare
        File of labelled cells, the column of obs to tell, and the class that is cut.
    unlabelled
        Files that small encoders are pretrained on.
    weights
        Model -> folder or file of real weights; those without are small ones of their architecture.
    genes_per_file, max_len
        Of small models: most variable genes of every file, whose union is their vocabulary; most genes of a cell that
        Geneformer and scGPT read (scBERT reads them all).
    n_layers, width
        Of small models.
    pretraining_steps, steps, batch_cells, learning_rate
        Steps of pretraining; steps of every fine-tuning, equally many whatever the sampler makes of an epoch; cells of
        a step, all at once in the model; the peak rate of fine-tuning.
    folds, threads
        Of the cross-validation; of torch.
    """

    cells: str
    label: str
    rare: str
    unlabelled: tuple[str, ...]
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    genes_per_file: int = 300
    max_len: int = 256
    n_layers: int = 2
    width: int = 64
    pretraining_steps: int = 400
    steps: int = 150
    batch_cells: int = 16
    learning_rate: float = 1e-3
    folds: int = 3
    threads: int = 1


class Row(NamedTuple):
    """One training: a model, the share of the rare class that is left, what is done about it, and the fold."""

    model: str
    share: float
    way: str
    fold: int


class Study:
    """A folder of work, and what is in it.

    Parameters
    ----------
    work
        Where everything lies; what is finished there is not computed again.
    asked
        None reads what the folder was made for.
    """

    def __init__(self, work: Path, asked: Asked | None = None) -> None:
        self.work, path = work, work / "asked.json"
        if asked is None:
            found = read_json(path)
            asked = Asked(**{**found, "unlabelled": tuple(found["unlabelled"])})
        said = {**dataclasses.asdict(asked), "unlabelled": list(asked.unlabelled)}
        if path.exists() and read_json(path) != said:
            raise SystemExit(f"{work} holds a study that was asked for otherwise: name another folder")
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, said)
        self.asked = asked

    def rows(self) -> Iterator[Row]:
        """Every row, models one after another and folds outermost within one, so that whole tables come first."""
        for model in (BASELINE, *MODELS):
            for fold in range(self.asked.folds):
                for share in SHARES:
                    ways = (PLAIN,) if share == 1.0 else WAYS
                    # Logistic regression has no focal loss in scikit-learn.
                    yield from (Row(model, share, way, fold) for way in ways if (model, way) != (BASELINE, "focal"))

    def path(self, row: Row) -> Path:
        """Where a row's scores lie."""
        return self.work / "rows" / row.model / f"{row.share:g}_{row.way}_{row.fold}.json"

    def missing(self, model: str) -> list[Row]:
        """Rows of a model that are still to be computed."""
        return [row for row in self.rows() if row.model == model and not self.path(row).exists()]

    def keep(self, row: Row, scores: dict[str, Any]) -> None:
        """Remember a row."""
        self.path(row).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path(row), scores)

    def found(self) -> dict[Row, dict[str, Any]]:
        """All rows that are there."""
        return {row: read_json(self.path(row)) for row in self.rows() if self.path(row).exists()}

    def labels(self) -> tuple[np.ndarray, list[str]]:
        """[cells of the file] codes, and the names of the classes, sorted."""
        import anndata

        texts = anndata.read_h5ad(self.asked.cells, backed="r").obs[self.asked.label].astype(str).to_numpy()
        names, codes = np.unique(texts, return_inverse=True)
        if self.asked.rare not in names:
            raise SystemExit(f"{self.asked.cells}: no cell has {self.asked.label} {self.asked.rare!r}")
        return codes, names.tolist()

    def split(self, share: float, fold: int) -> Split:
        """Rows of the file to learn from and to test with: the rare class is cut in training alone.

        Of one fold a smaller share is part of a larger one, and one cell is always left.
        """
        codes, names = self.labels()
        found = folds(codes, names, self.asked.folds, eval_share=0.0, seed=SEED)[fold]
        is_rare = codes[found.train] == names.index(self.asked.rare)
        rare = np.random.default_rng((SEED, fold)).permutation(found.train[is_rare])
        kept = rare[: max(1, round(share * len(rare)))]
        return Split(np.sort(np.concatenate([found.train[~is_rare], kept])), found.eval, found.test)

    def genes(self) -> list[str]:
        """Ensembl ids that small models know: the most variable ones of every file, no label asked."""
        path = self.work / "genes.json"
        if not path.exists():
            files = [Path(file) for file in (self.asked.cells, *self.asked.unlabelled)]
            known = set(_log_counts(files[0])[1])
            chosen = set().union(*(_variable_genes(file, self.asked.genes_per_file) for file in files))
            write_json(path, {"genes": sorted(chosen & known)})
        return read_json(path)["genes"]
