"""The three models: their cells, and encoders of real weights or small ones pretrained by their own objective."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast as gf
from bench.finetune_real import SEED
from bench.imbalance.objectives import MaskedBins, MaskedValues
from bench.imbalance.study import MODELS, Asked, Study
from geneformer_fast.data.identity import identity_of
from geneformer_fast.files.writing import write_json
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.training.loop import fit
from geneformer_fast.training.recipe import Recipe

_OBJECTIVES: dict[str, Any] = {"scgpt": MaskedValues, "scbert": MaskedBins}
#: How cells of value families are read: scGPT as its tutorials prepare fine-tuning; scBERT leaves no cell out here.
_OPTIONS: dict[str, dict[str, Any]] = {
    "scgpt": {"normalise": "log1p", "cls_value": "finetune"},
    "scbert": {"min_genes": 1},
}


class Model:
    """One of the three, in a study.

    Parameters
    ----------
    study
        Where it is part of.
    name
        Which.
    """

    def __init__(self, study: Study, name: str) -> None:
        assert name in MODELS
        self.study, self.name = study, name
        given = study.asked.weights.get(name)
        self.given = None if given is None else Path(given)
        self.folder = study.work / name

    def tokens(self, of: str) -> Path:
        """Cells as the model reads them: ``"labelled"``, or the ``"unlabelled"`` ones without any label."""
        folder, asked = self.folder / of, self.study.asked
        if not (folder / "state.json").exists():
            files, obs = ([asked.cells], [asked.label]) if of == "labelled" else (list(asked.unlabelled), [])
            family = None if self.name == "geneformer" else self.name
            gf.tokenize(
                files, folder, dictionary=self._dictionary(), family=family, options=_OPTIONS.get(self.name), obs=obs,
                max_len=asked.max_len if self.given is None and self.name == "scgpt" else None,
                allow_few_genes=self.given is None, overwrite=folder.exists(), workers=1, progress=False,
            ).close()  # fmt: skip
        return folder

    def _dictionary(self) -> Any:
        if self.given is not None:
            return self.given.parent if self.given.is_file() else self.given
        genes = self.study.genes()
        if self.name != "geneformer":
            path = self.folder / "genes.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(["gene_name", *genes, ""]))
            return path
        folder = self.folder / "vocabulary"
        if not (folder / "vocabulary.json").exists():
            asked = self.study.asked
            corpus = gf.medians([asked.cells, *asked.unlabelled], name="real cells", progress=False)
            medians = {gene: corpus.medians[gene] for gene in genes if gene in corpus.medians}
            gf.Vocabulary.from_medians(medians, "v2", name="real cells", max_len=asked.max_len).save(folder)
        return gf.Vocabulary.from_folder(folder)

    def pretrained(self) -> Path:
        """The folder or file of the encoder, pretrained by its own objective if no real weights are named."""
        if self.given is not None:
            return self.given
        done = self.folder / "pretraining.json"
        found = self.folder / ("run/final" if self.name == "geneformer" else "model")
        if not done.exists():
            begin, losses = time.process_time(), []
            recipe = _pretraining(self.study.asked)
            tokens = self.tokens("unlabelled")
            if self.name == "geneformer":
                gf.pretrain(
                    tokens, self.folder / "run", config=self.config(), recipe=recipe, eval_share=0, device="cpu",
                    resume=(self.folder / "run").exists(), progress=False,
                    on_step=lambda record: losses.append(record.loss),
                )  # fmt: skip
            else:
                losses += self._fit(tokens, recipe)
            tenth = max(1, len(losses) // 10)
            loss = {"first": float(np.mean(losses[:tenth])), "last": float(np.mean(losses[-tenth:]))}
            write_json(done, {"loss": loss, "cpu_s": round(time.process_time() - begin, 1)})
        return found

    def _fit(self, folder: Path, recipe: Recipe) -> list[float]:
        objective = _OBJECTIVES[self.name]()
        torch.manual_seed(SEED)
        encoder = gf.Encoder(self.config(), "expression" if self.name == "scgpt" else "mlm")
        objective.begin(encoder)
        with open_tokens(folder) as tokens:
            identity_of(tokens, encoder.config)
            history = fit(encoder, tokens, objective, recipe, train_cells=np.arange(tokens.n_cells))
        gf.save(encoder, self.folder / "model", overwrite=True)
        return history.losses

    def encoder(self) -> gf.Encoder:
        """In float32 on the CPU."""
        return gf.load(self.pretrained(), dtype="float32", device="cpu")

    def config(self) -> gf.EncoderConfig:
        """Of a small one: the published architecture with fewer layers, a smaller width and the genes of the study."""
        asked = self.study.asked
        n_heads, n_genes = max(1, asked.width // 32), len(self.study.genes())
        sizes: dict[str, Any] = {"n_layers": asked.n_layers, "width": asked.width, "n_heads": n_heads}
        if self.name == "scgpt":
            return gf.EncoderConfig.preset(
                "scgpt-whole-human", **sizes, ff_width=asked.width, vocab_size=n_genes + 3, max_len=n_genes + 3,
                pad_id=n_genes, dropout=0.02, attention_dropout=0.0,
            )  # fmt: skip
        if self.name == "scbert":
            return gf.EncoderConfig.preset(
                "scbert", **sizes, ff_width=4 * asked.width, max_len=n_genes + 1, attention_width=None, n_features=110
            )
        words = self._dictionary()
        return gf.EncoderConfig(
            **sizes, ff_width=2 * asked.width, vocab_size=words.n_tokens, max_len=asked.max_len, dropout=0.02,
            attention_dropout=0.0, vocabulary=words.name, vocabulary_fingerprint=words.fingerprint,
        )  # fmt: skip


def positions(tokens: TokenFolder) -> int:
    """The longest cell, in positions that the model reads."""
    return int(tokens.lengths().max())


def _pretraining(asked: Asked) -> Recipe:
    return Recipe(
        steps=asked.pretraining_steps, batch_cells=asked.batch_cells, token_budget=2**20, learning_rate=2e-3,
        schedule="cosine", warmup_share=0.1, weight_decay=0.01, seed=SEED, keep=1, progress=False, workers=0,
    )  # fmt: skip
