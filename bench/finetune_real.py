"""Cell types of real cells: a small pretrained encoder, fine-tuned, beside PCA with two classifiers; does loss matter?

``python -m bench.finetune_real --work DIR`` tokenizes the sets of real cells, pretrains an encoder on all of them
without their labels, fine-tunes it with 5-fold cross-validation under several losses and samplers, runs the two usual
baselines on the same folds, and writes ``bench/results/<machine>/finetune_real.json``. Everything finished is kept in
DIR: a run that was stopped goes on with the fold it was in.

The encoder is far smaller than any published one, and has seen a few thousand cells: the numbers say what loss, sampler
and pretraining change in one and the same small model, not what a published checkpoint can do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast as gf
from bench.machine import ROOT, save_result
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import Masking
from geneformer_fast.errors import TrainingError
from geneformer_fast.files.writing import write_json
from geneformer_fast.finetuning.cells import CellWork, finetune_cells
from geneformer_fast.finetuning.labels import read_task
from geneformer_fast.finetuning.recipes import CELLS
from geneformer_fast.finetuning.samplers import ClassSampler
from geneformer_fast.finetuning.scores import over_folds, score
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.manifest import read_json
from geneformer_fast.training.loop import fit
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import Recipe

SHARED = ROOT.parent / "shared" / "data"
N_FOLDS, SEED = 5, 0
N_COMPONENTS = 50


@dataclass(frozen=True)
class Cells:
    """A set of real cells and what is told of them."""

    file: str
    label: str
    ignore: tuple[str, ...] = ()


SETS = {
    "pbmc3k": Cells("pbmc3k/pbmc3k.h5ad", "cell_type", ("unassigned",)),
    "pbmc_facs": Cells("pbmc_facs/pbmc_facs.h5ad", "celltype"),
    "pbmc_facs_subpop": Cells("pbmc_facs/pbmc_facs.h5ad", "subpop"),
    "mix_celseq2": Cells("mix_celseq2_5cl/mix_celseq2_5cl.h5ad", "cell_line"),
}

FILES = sorted({cells.file for cells in SETS.values()})

#: Row of the table -> what is asked of ``finetune_cells``; the first is what the others are compared with.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"loss": "weighted"},
    "focal": {"loss": "focal:gamma=2"},
    "over-sampled": {"sampler": "over"},
    "under-sampled": {"sampler": "under"},
}
SCRATCH = "plain, not pretrained"
BASELINES = ("PCA + logistic regression", "PCA + random forest")
ORDER = (*BASELINES, *VARIANTS, SCRATCH)


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes
    ----------
    genes_per_file
        Most variable genes of every file; the vocabulary is their union.
    max_len, n_layers, width
        Tokens per cell, and the encoder.
    pretraining_steps, pretraining_cells
        Steps of masked gene modelling, and cells in each.
    steps, batch_cells
        Of every fine-tuning: equally many whatever the sampler makes of an epoch.
    """

    genes_per_file: int = 1500
    max_len: int = 64
    n_layers: int = 2
    width: int = 96
    pretraining_steps: int = 1600
    pretraining_cells: int = 32
    steps: int = 300
    batch_cells: int = 16


class Study:
    """Everything, in a folder that remembers what is done."""

    def __init__(self, work: Path, size: Size) -> None:
        self.work, self.size = work, size
        work.mkdir(parents=True, exist_ok=True)
        asked = dataclasses.asdict(size)
        if (work / "size.json").exists() and read_json(work / "size.json") != asked:
            raise SystemExit(f"{work} holds a study of another size: name another folder")
        write_json(work / "size.json", asked)
        self.vocabulary = self._vocabulary()

    def _vocabulary(self) -> gf.Vocabulary:
        """Medians of these cells, of the genes that vary most: a small head for a small model."""
        folder = self.work / "vocabulary"
        if not (folder / "vocabulary.json").exists():
            files = [SHARED / file for file in FILES]
            corpus = gf.medians([str(file) for file in files], name="real cells", progress=False)
            genes = set().union(*(_variable_genes(file, self.size.genes_per_file) for file in files))
            medians = {gene: median for gene, median in corpus.medians.items() if gene in genes}
            words = gf.Vocabulary.from_medians(medians, "v2", name="real cells", max_len=self.size.max_len)
            words.save(folder)
        return gf.Vocabulary.from_folder(folder)

    def tokens(self, name: str) -> Path:
        """Tokens of one set with its label, or of all files without labels (``"all"``)."""
        folder = self.work / "tokens" / name
        if not (folder / "state.json").exists():
            files = FILES if name == "all" else [SETS[name].file]
            obs = [] if name == "all" else [SETS[name].label]
            gf.tokenize(
                [str(SHARED / file) for file in files], folder, dictionary=self.vocabulary, obs=obs, progress=False,
                overwrite=folder.exists(), workers=1,
            )  # fmt: skip
        return folder

    def model(self) -> Path:
        """The encoder that was pretrained on all cells without labels."""
        folder = self.work / "model"
        if not (folder / "config.json").exists():
            with open_tokens(self.tokens("all")) as tokens:
                encoder = self._encoder("mlm")
                kinds = TokenKinds.of(identity_of(tokens, encoder.config), encoder.config)
                # The first cells of a random order are looked at, to see that something was learned.
                order = np.random.default_rng(SEED).permutation(tokens.n_cells)
                recipe = Recipe(
                    steps=self.size.pretraining_steps, batch_cells=self.size.pretraining_cells, token_budget=8192,
                    learning_rate=3e-3, schedule="cosine", warmup_share=0.1, weight_decay=0.01, eval_every=100,
                    save_every=100, keep=1, seed=SEED, progress=False,
                )  # fmt: skip
                begin = time.process_time()
                history = fit(
                    encoder, tokens, MaskedGenes(kinds, Masking()), recipe, train_cells=order[300:],
                    eval_cells=order[:300], out=self.work / "pretraining", resume=True,
                )  # fmt: skip
                known = {"losses": history.evaluations, "cpu_s": round(time.process_time() - begin, 1)}
                write_json(self.work / "pretraining.json", known)
                gf.save(encoder, folder)
        return folder

    def _encoder(self, head: str | None) -> gf.Encoder:
        torch.manual_seed(SEED)
        return gf.Encoder(
            gf.EncoderConfig(
                n_layers=self.size.n_layers, width=self.size.width, n_heads=self.size.width // 32,
                ff_width=2 * self.size.width, vocab_size=self.vocabulary.n_tokens, max_len=self.size.max_len,
                dropout=0.02, attention_dropout=0.0, vocabulary=self.vocabulary.name,
                vocabulary_fingerprint=self.vocabulary.fingerprint,
            ),
            head=head,
        )  # fmt: skip

    def finetuned(self, name: str, variant: str) -> dict[str, Any]:
        """Scores of one row over all folds."""
        cells = SETS[name]
        recipe = dataclasses.replace(
            CELLS, steps=self.size.steps, batch_cells=self.size.batch_cells, eval_every=self.size.steps // 4,
            learning_rate=1e-3, warmup_share=0.1, weight_decay=0.01, seed=SEED, progress=False,
            save_every=self.size.steps, token_budget=8192,
        )  # fmt: skip
        model: Any = self._encoder(None) if variant == SCRATCH else self.model()
        done = finetune_cells(
            self.tokens(name), model, cells.label, self.work / "finetuned" / name / variant.replace(", ", "_"),
            folds=N_FOLDS, recipe=recipe, ignore=cells.ignore, is_final=False, device="cpu", resume=True,
            **VARIANTS.get(variant, {}),
        )  # fmt: skip
        (task,) = done.scores["tasks"].values()
        return _row(task["folds"], task["classes"])

    def baselines(self, name: str) -> dict[str, dict[str, Any]]:
        """Scores of the baselines on the same folds; features and classifiers see training cells only."""
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        makers = {
            BASELINES[0]: lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
            BASELINES[1]: lambda: RandomForestClassifier(500, random_state=SEED, n_jobs=1),
        }
        folds: dict[str, list[dict[str, Any]]] = {baseline: [] for baseline in makers}
        with open_tokens(self.tokens(name)) as tokens:
            task = read_task(tokens, SETS[name].label, ignore=SETS[name].ignore)
            work = CellWork(tokens, {}, [task], {task.name: "cross-entropy"}, ClassSampler(task.codes), 0)
            cells = np.flatnonzero(task.codes >= 0)
            splits, _ = work.splits(cells, None, N_FOLDS, 0.1, 0.1, SEED)
            counts = _log_counts(SHARED / SETS[name].file)[0][tokens.column("source_row").to_numpy()]
        for split in splits:
            # What the fine-tuned model uses to choose its best epoch, the baselines may learn from.
            seen = np.concatenate([split.train, split.eval])
            features = _pca(counts, seen)
            for baseline, make in makers.items():
                fitted = make().fit(features[seen], task.codes[seen])
                probabilities = fitted.predict_proba(features[split.test])
                folds[baseline].append(score(task.codes[split.test], probabilities, task.classes))
        return {baseline: _row(parts, task.classes) for baseline, parts in folds.items()}


def _row(folds: list[dict[str, Any]], classes: list[str]) -> dict[str, Any]:
    """What a table needs of the scores of all folds."""
    f1 = {name: round(float(np.mean([fold["per_class"][name]["f1"] for fold in folds])), 4) for name in classes}
    n = {name: int(sum(fold["per_class"][name]["n"] for fold in folds)) for name in classes}
    return {**over_folds(folds), "f1_by_class": f1, "n_by_class": n}


def _log_counts(file: Path) -> tuple[Any, list[str]]:
    """Counts per 10,000 and log1p, sparse [cells, genes], and the ids of the genes."""
    import anndata
    from scipy import sparse

    adata = anndata.read_h5ad(file)
    counts = sparse.csr_matrix(adata.X).astype(np.float64)
    totals = np.asarray(counts.sum(1)).ravel()
    logs = (sparse.diags(1e4 / np.maximum(totals, 1)) @ counts).log1p().tocsr()
    return logs, [str(gene) for gene in adata.var["ensembl_id"]]


def _variable_genes(file: Path, n_genes: int) -> set[str]:
    """Ids of the genes whose log counts vary most."""
    logs, ids = _log_counts(file)
    return {ids[column] for column in np.argsort(-_variance(logs))[:n_genes]}


def _variance(logs: Any) -> np.ndarray:
    mean = np.asarray(logs.mean(0)).ravel()
    return np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2


def _pca(counts: Any, seen: np.ndarray) -> np.ndarray:
    """[cells, 50] principal components (fewer of fewer genes or cells) of the 3,000 most variable genes; everything
    fitted to the cells seen."""
    from sklearn.decomposition import PCA

    genes = np.sort(np.argsort(-_variance(counts[seen]))[:3000])
    dense = counts[:, genes].toarray()
    n_components = min(N_COMPONENTS, len(genes), len(seen))
    return PCA(n_components, random_state=SEED).fit(dense[seen]).transform(dense)


def run(study: Study, sets: list[str], variants: list[str]) -> dict[str, Any]:
    """Every row that is missing, remembered one by one; returns all of them."""
    path = study.work / "rows.json"
    rows: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    study.model()
    for name in sets:
        table = rows.setdefault(name, {})
        if not all(baseline in table for baseline in BASELINES):
            table |= study.baselines(name)
            write_json(path, rows)
        for variant in variants if name == sets[0] else variants[:1]:
            if variant in table:
                continue
            try:
                table[variant] = study.finetuned(name, variant)
            except TrainingError as error:
                table[variant] = {"error": str(error)}
            write_json(path, rows)
            _say(name, variant, table[variant])
    return rows


def _say(name: str, variant: str, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{name:<18} {variant:<26} {row['error']}", flush=True)
        return
    told = "  ".join(f"{key} {row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" for key in ("accuracy", "macro_f1"))
    print(f"{name:<18} {variant:<26} {told}", flush=True)


def content(study: Study, rows: dict[str, Any]) -> dict[str, Any]:
    """The result as it is written."""
    return {
        "what": "cell types, 5-fold cross-validation, small encoder pretrained on the same cells without labels",
        "size": dataclasses.asdict(study.size),
        "vocabulary": study.vocabulary.n_tokens,
        "n_parameters": sum(parameter.numel() for parameter in study._encoder(None).parameters()),
        "pretraining": read_json(study.work / "pretraining.json"),
        "threads": torch.get_num_threads(),
        "sets": {
            name: {"label": SETS[name].label, "rows": {way: table[way] for way in ORDER if way in table}}
            for name, table in rows.items()
        },
    }


def main() -> int:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune_real", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is computed")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="the first gets the whole table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-only", action="store_true", help="write the result of the rows that are there")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("the real cells are not here (shared/ beside the checkout is absent)")
    torch.set_num_threads(args.threads)
    size = Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Size)})
    study = Study(args.work, size)
    if args.report_only:
        rows = json.loads((args.work / "rows.json").read_text())
    else:
        rows = run(study, args.sets, [*VARIANTS, SCRATCH])
    for name, table in rows.items():
        for variant, row in table.items():
            _say(name, variant, row)
    print(save_result("finetune_real", content(study, rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
