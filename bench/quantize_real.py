"""What quantization costs on real cells: embeddings, neighbours, classes and masked genes of a trained model.

``python -m bench.quantize_real --work DIR`` tokenizes the sets of real cells, trains an encoder of Geneformer V1-10M's
shape on all of them (masked genes, then a classifier of sorted cells), quantizes both by every scheme, plainly and
calibrated, also with columns made 60 times as large, and writes ``bench/results/<machine>/quantize_real.json``.
Everything finished is kept in DIR. ``--model`` and ``--classifier`` take models that were trained elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast as gf
from bench.machine import ROOT, save_result
from geneformer_fast.finetuning.recipes import CELLS
from geneformer_fast.quantization.answers import Questions
from geneformer_fast.quantization.build import quantized
from geneformer_fast.quantization.calibrate import as_anywhere, calibrate
from geneformer_fast.quantization.check import check, compared
from geneformer_fast.quantization.choices import SCHEMES
from geneformer_fast.quantization.convert import dtypes_of
from geneformer_fast.quantization.quantize import quantize
from geneformer_fast.quantization.report import Report

SHARED = ROOT.parent / "shared" / "data"
FILES = ("pbmc_facs/pbmc_facs.h5ad", "pbmc3k/pbmc3k.h5ad", "mix_celseq2_5cl/mix_celseq2_5cl.h5ad")
LABEL, SEED = "subpop", 0
#: Columns that are made larger, and by how much: within what trained models of this kind are known to have.
OUTLIERS, FACTOR = (3, 77, 201), 60.0


class Study:
    """Everything, in a folder that remembers what is done."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        work.mkdir(parents=True, exist_ok=True)

    def tokens(self, name: str) -> Path:
        """Tokens of all cells, of those the classifier learns from (``train``) or of those it is asked about."""
        folder = self.work / "tokens" / name
        if (folder / "state.json").exists():
            return folder
        asked: dict[str, Any] = dict(dictionary=SHARED / "dicts", preset="v1", progress=False, workers=1)
        if name == "all":
            files = [str(SHARED / file) for file in FILES]
            gf.tokenize(files, folder, max_len=self.args.tokens, overwrite=folder.exists(), **asked)
            return folder
        import anndata

        adata = anndata.read_h5ad(SHARED / FILES[0])
        order = np.random.default_rng(SEED).permutation(adata.n_obs)
        n_train = self.args.classifier_cells
        part = adata[np.sort(order[:n_train] if name == "train" else order[n_train:])].copy()
        counts = self.work / f"{name}.h5ad"
        part.write_h5ad(counts)
        gf.tokenize(
            str(counts), folder, obs=[LABEL], max_len=self.args.classifier_tokens, overwrite=folder.exists(), **asked
        )
        return folder

    def model(self) -> Path:
        """The encoder that was trained to name masked genes."""
        if self.args.model is not None:
            return self.args.model
        out = self.work / "pretrained"
        if not (out / "final" / "config.json").exists():
            gf.pretrain(
                self.tokens("all"), out, config="geneformer-v1-10m", batch_cells=6, learning_rate=5e-4,
                schedule="cosine", precision="auto", epochs=40.0, max_seconds=float(self.args.seconds), save_every=50,
                resume=True, progress=False,
            )  # fmt: skip
        return out / "final"

    def classifier(self) -> Path:
        """The classifier of sorted cells."""
        if self.args.classifier is not None:
            return self.args.classifier
        out = self.work / "classifier"
        if not (out / "final" / "config.json").exists():
            recipe = dataclasses.replace(
                CELLS, epochs=self.args.classifier_epochs, batch_cells=12, learning_rate=3e-4, precision="auto",
                seed=SEED, progress=False,
            )  # fmt: skip
            gf.finetune_cells(
                self.tokens("train"), self.model(), LABEL, out, test_share=0.0, recipe=recipe, resume=out.exists()
            )
        return out / "final"


@torch.no_grad()
def with_outliers(encoder: gf.Encoder) -> gf.Encoder:
    """A copy in which a few columns of what every product reads are 60 times as large, and its weights as much smaller.

    What attention and feed-forward say stays what it was, exactly: values and hidden units of ReLU are proportional to
    rows of weights. What a LayerNorm of post-norm makes is the residual too, which its larger columns then dominate:
    that is another model, as good as any to be compared with itself.
    """
    made, columns = copy.deepcopy(encoder), list(OUTLIERS)
    width = made.config.width
    for index, block in enumerate(made.blocks):
        values = [2 * width + column for column in columns]
        block.qkv.weight[values] *= FACTOR
        block.qkv.bias[values] *= FACTOR
        block.out.weight[:, columns] /= FACTOR
        block.up.weight[columns] *= FACTOR
        block.up.bias[columns] *= FACTOR
        block.down.weight[:, columns] /= FACTOR
        readers = [(block.attention_norm, block.up)]
        if index + 1 < len(made.blocks):
            readers.append((block.ff_norm, made.blocks[index + 1].qkv))
        for norm, reader in readers:
            norm.weight[columns] *= FACTOR
            norm.bias[columns] *= FACTOR
            reader.weight[:, columns] /= FACTOR
    return made


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``given`` in its place."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantize_real", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is computed")
    parser.add_argument("--model", type=Path, help="an encoder with a head of masked genes, trained elsewhere")
    parser.add_argument("--classifier", type=Path, help="a classifier of subpop, trained elsewhere")
    parser.add_argument("--no-classifier", action="store_true", help="leave the classifier out")
    parser.add_argument("--note", default="", help="goes into the result: how --model was trained")
    parser.add_argument("--seconds", type=int, default=2700, help="of pretraining")
    parser.add_argument("--classifier-cells", type=int, default=1200)
    parser.add_argument("--classifier-tokens", type=int, default=512, help="most tokens of a cell")
    parser.add_argument("--classifier-epochs", type=float, default=3.0)
    parser.add_argument("--cells", type=int, default=1000, help="that are compared")
    parser.add_argument("--calibration-cells", type=int, default=256)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="most tokens of a cell that the encoder is asked about"
    )
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(given)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Row of the table -> what was found."""
    study = Study(args.work, args)
    tokens, encoder = study.tokens("all"), gf.load(study.model(), dtype="float32")
    rows: dict[str, Any] = {}
    drawn = np.random.default_rng(SEED).permutation(len(gf.open_tokens(tokens)))[: args.cells]
    questions = Questions(gf.open_tokens(tokens), drawn, "penultimate", None, SEED, False)
    for name, exact in (("trained", encoder), ("with outliers", with_outliers(encoder))):
        said = questions.ask(exact)
        for scheme in args.schemes:
            found = calibrate(exact, tokens, scheme=scheme, max_cells=args.calibration_cells)
            made = quantized(exact, found.choices)
            sizes = [{n: x.numel() * x.element_size() for n, x in m.state_dict().items()} for m in (exact, made)]
            plain = quantize(exact, scheme=scheme)
            rows[f"{name}, {scheme}"] = {
                "plain": compared(said, questions.ask(as_anywhere(plain))).to_dict(),
                "calibrated": compared(said, questions.ask(as_anywhere(made))).to_dict(),
                "report": Report.of(scheme, found.choices, *sizes, found, dtypes=dtypes_of(made)).to_dict(),
            }
            _say(f"{name}, {scheme}", rows[f"{name}, {scheme}"])
    if args.no_classifier:
        return rows
    classifier = study.classifier()
    for scheme in args.schemes:
        made = as_anywhere(quantize(gf.load(classifier, dtype="float32"), scheme=scheme))
        found = check(classifier, made, study.tokens("test"), max_cells=args.cells, progress=False)
        rows[f"classifier, {scheme}"] = {"plain": found.to_dict()}
        _say(f"classifier, {scheme}", rows[f"classifier, {scheme}"])
    return rows


def main() -> int:
    """Run everything and write the result."""
    args = arguments_of()
    if not SHARED.is_dir():
        raise SystemExit("the real cells are not here (shared/ beside the checkout is absent)")
    torch.set_num_threads(args.threads)
    rows = run(args)
    asked = {name: value for name, value in vars(args).items() if isinstance(value, int | float | list)}
    training = training_of(Study(args.work, args))
    content = {"what": __doc__.splitlines()[0], "asked": asked, "training": training, "rows": rows}
    print(save_result("quantize_real", content))
    return 0


def training_of(study: Study) -> dict[str, Any]:
    """How far the encoder came."""
    if study.args.model is not None:
        return {"note": study.args.note}
    lines = [json.loads(line) for line in (study.model().parent / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    return {"n_steps": len(steps), "n_cells": sum(line["n_cells"] for line in steps), "losses": losses}


def _say(name: str, row: dict[str, Any]) -> None:
    for way in ("plain", "calibrated"):
        if way in row:
            told = "  ".join(f"{m['name']} {m['quantized']:.5g}" for m in row[way]["measures"])
            print(f"{name:<28} {way:<10} {told}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
