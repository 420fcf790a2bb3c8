"""``geneformer-fast finetune cells|genes``: classes of cells or genes from a pretrained encoder."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed
from geneformer_fast.cli.selection import add_selection_options, selection_options

if TYPE_CHECKING:
    from geneformer_fast.finetuning.outputs import Finetuned
    from geneformer_fast.training.recipe import Recipe

NAME = "finetune"
HELP = "teach a pretrained encoder classes of cells or genes, and report how well it tells them"

EXAMPLE = "geneformer-fast finetune cells tokens --model pretrained/final --label cell_type --out finetuned"
EXAMPLE_GENES = "geneformer-fast finetune genes tokens --model pretrained/final --classes genes.csv --out finetuned"

logger = logging.getLogger(__name__)

#: Option -> field of the recipe, type, metavar, what it says, and the defaults for cells and for genes.
_RECIPE = {
    "epochs": ("epochs", float, "X", "passes over the training cells", ("10", "1")),
    "batch-cells": ("batch_cells", int, "N", "cells per step", ("12", "12")),
    "learning-rate": ("learning_rate", float, "X", "peak of the learning rate, per step", ("5e-05", "5e-05")),
    "schedule": ("schedule", str, "NAME", "constant, linear, cosine, polynomial or step", ("linear", "linear")),
    "warmup-steps": ("warmup_steps", int, "N", "optimizer steps until the peak", ("none", "none")),
    "warmup-share": (
        *("warmup_share", float, "X", "share of all steps until the peak, 0 to 1, instead of their number"),
        ("0.1", "0.1"),
    ),
    "weight-decay": ("weight_decay", float, "X", "of AdamW, per step and learning rate", ("0.001", "0.001")),
    "patience": ("patience", int, "N", "stop after so many evaluations without a better one", ("never", "never")),
    "precision": ("precision", str, "NAME", "float32, bfloat16 or float16 (by autocast)", ("float32", "float32")),
    "token-budget": (
        *("token_budget", int, "N", "most tokens in memory at once; larger steps are accumulated"),
        ("16384", "16384"),
    ),
    "wandb": ("wandb", str, "PROJECT", "report to a project of Weights & Biases", ("none", "none")),
    "seed": (
        *("seed", int, "N", "whole number that cells, folds, orders, fresh weights and dropout are drawn by"),
        ("42", "42"),
    ),
}

_OLD_NAMES = {"batch-cells": "--batch", "learning-rate": "--lr", "warmup-share": "--warmup"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    kinds = parser.add_subparsers(dest="kind", metavar="cells|genes", required=True)
    cells = _kind(kinds, "cells", "classes of cells, from a column that the tokens carry", EXAMPLE)
    genes = _kind(kinds, "genes", "classes of genes, from a file", EXAMPLE_GENES)
    for kind in (cells, genes):
        kind.add_argument("tokens", metavar="TOKENS", help="folder of tokens")
        kind.add_argument("--model", required=True, metavar="DIR", help="pretrained checkpoint folder")
        kind.add_argument("--out", required=True, metavar="DIR", help="folder for scores, pictures and the model")
    cells.add_argument(
        "--label", required=True, action="append", metavar="COLUMN[=WEIGHT]",
        help="column to tell; several for several tasks at once, with the weights of their losses",
    )  # fmt: skip
    cells.add_argument(
        "--group", metavar="COLUMN",
        help="cells of one donor stay together: the column that names it (default: all cells are told apart)",
    )  # fmt: skip
    genes.add_argument("--classes", required=True, metavar="FILE", help=".json, .csv or .tsv: gene id and class")
    genes.add_argument(
        "--dictionary", metavar="DIR", help="gene dictionaries (default: the model folder's vocabulary.json)"
    )
    _add_split(cells, "cells", folds=0, eval_share=0.1, test_share=0.1)
    _add_split(genes, "genes", folds=5, eval_share=0.0, test_share=0.2)
    cells.add_argument(
        "--sampler",
        choices=("none", "over", "under"),
        default="none",
        help="classes of training cells: draw rare ones more, or common ones less, often",
    )
    cells.add_argument("--cap", type=int, metavar="N", help="most cells per class and epoch (default: all)")
    cells.add_argument("--drop-unlabelled", action="store_true", help="leave cells without a label out")
    cells.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="LABEL",
        help="a label that stands for none (default: none does)",
    )
    cells.add_argument(
        "--min-cells", type=int, default=0, metavar="N", help="leave out classes of fewer cells than this"
    )
    genes.add_argument("--drop-unknown", action="store_true", help="leave genes out that are not in the tokens")
    for kind in (cells, genes):
        add_selection_options(kind, has_seed=False)
        _add_training(kind, is_genes=kind is genes)


def _kind(kinds: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=f"{HELP}: {text}", epilog=f"example:\n  {example}")
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _add_split(parser: argparse.ArgumentParser, of: str, *, folds: int, eval_share: float, test_share: float) -> None:
    parser.add_argument(
        "--folds", type=int, default=folds, metavar="K",
        help=f"folds of cross-validation; 0 for one division into training, evaluation and test (default: {folds})",
    )  # fmt: skip
    parser.add_argument(
        "--eval-share",
        type=float,
        default=eval_share,
        metavar="X",
        help=f"share of all {of} that chooses the best epoch, 0 to 1",
    )
    parser.add_argument(
        "--test-share",
        type=float,
        metavar="X",
        help=f"share of all {of} that is tested, without folds; 0 for none (default: {test_share})",
    )
    parser.add_argument("--no-final", action="store_true", help="after folds, make no model of all of it")


def _add_training(parser: argparse.ArgumentParser, *, is_genes: bool) -> None:
    parser.add_argument(
        "--loss", default="cross-entropy", metavar="NAME[:OPTION=X,...]",
        help="cross-entropy, weighted, class-balanced, focal, bce, dice, ldam or logit-adjusted; focal:gamma=1.5",
    )  # fmt: skip
    layers = parser.add_argument(
        "--freeze-layers", type=int, default=0, metavar="N", help="blocks from the bottom that stay as they are"
    )
    renamed(parser, "--freeze", layers)
    parser.add_argument("--freeze-embeddings", action="store_true", help="the embeddings stay too")
    parser.add_argument(
        "--lora", type=int, metavar="R",
        help="train adapters of rank R in place of the blocks (LoRA, by peft); they want about ten times the learning "
        "rate (default: train the blocks themselves)",
    )  # fmt: skip
    parser.add_argument(
        "--search", type=int, metavar="N", help="search hyperparameters with N trials per fold (default: no search)"
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="a recipe as .json; the options below change it (default: that of the model's family, else Geneformer's)",
    )
    either = parser.add_mutually_exclusive_group()
    for option, (field, kind, metavar, text, defaults) in _RECIPE.items():
        said = f"{text} (default: {defaults[is_genes]})"
        place = either if field.startswith("warmup") else parser
        added = place.add_argument(f"--{option}", type=kind, metavar=metavar, help=said)
        if option in _OLD_NAMES:
            renamed(parser, _OLD_NAMES[option], added)
    parser.add_argument(
        "--profile", nargs="?", const=True, default=False, metavar="PLACE",
        help="report how fast the first model is trained: a .json, an .html or a folder; profile/ in DIR without PLACE "
        "(default: no)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier fine-tuning left in DIR")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from pathlib import Path

    from geneformer_fast.cli.places import (
        check_device,
        check_dictionary,
        check_file,
        check_labels,
        check_model,
        check_tokens,
    )
    from geneformer_fast.training.occupied import check_finetuning_folder

    check_device(args.device)
    labels = _labels(args.label) if args.kind == "cells" else {}
    if args.kind != "cells":
        check_file(args.classes, "--classes")
        check_dictionary(args.dictionary)
    selection_options(args, has_seed=False)
    check_tokens(args.tokens)
    check_labels(args.tokens, [labels] if isinstance(labels, str) else labels)
    check_model(args.model)
    check_finetuning_folder(Path(args.out), is_resuming=args.resume, is_replacing=args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    if args.profile:
        from geneformer_fast.profiling.meters.silence import import_torch_quietly

        import_torch_quietly()
    from geneformer_fast.finetuning.search import Search

    options: dict[str, Any] = {
        "folds": args.folds, "eval_share": args.eval_share, "test_share": args.test_share, "loss": args.loss,
        "freeze_layers": args.freeze_layers, "freeze_embeddings": args.freeze_embeddings, "lora": args.lora,
        "recipe": _recipe(args),
        "search": None if args.search is None else Search(args.search), "is_final": not args.no_final,
        "device": args.device, "resume": args.resume, "overwrite": args.overwrite,
        "tell": logger.info, "profile": args.profile,
        **selection_options(args, has_seed=False),
    }  # fmt: skip
    done = _finetune(args, options)
    text = str(done)
    if done.model is not None:
        text += f"\nmodel: {done.model} (geneformer-fast predict, or transformers)"
    return Answer(text, {"out": done.folder, "model": done.model, "scores": done.scores})


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    from pathlib import Path

    from geneformer_fast.finetuning.outputs import interrupted_message

    return interrupted_message(Path(args.out))


def _finetune(args: argparse.Namespace, options: dict[str, Any]) -> Finetuned:
    if args.kind == "cells":
        from geneformer_fast.finetuning.cells import finetune_cells

        return finetune_cells(
            args.tokens, args.model, _labels(args.label), args.out, group=args.group, sampler=args.sampler,
            cap=args.cap, drop_unlabelled=args.drop_unlabelled, ignore=args.ignore, min_cells=args.min_cells, **options,
        )  # fmt: skip
    from geneformer_fast.finetuning.genes import finetune_genes

    return finetune_genes(
        args.tokens, args.model, args.classes, args.out, dictionary=args.dictionary,
        drop_unknown=args.drop_unknown, **options,
    )  # fmt: skip


def _labels(entries: list[str]) -> str | dict[str, float]:
    """``["cell_type"]`` as it is, ``["cell_type=2", "disease"]`` as {column: weight}."""
    from geneformer_fast.errors import UnsupportedError

    found: dict[str, float] = {}
    for entry in entries:
        name, equals, weight = entry.rpartition("=")
        try:
            found[name if equals else entry] = float(weight) if equals else 1.0
        except ValueError:
            raise UnsupportedError(f"--label {entry}: the weight must be a number, not {weight!r}") from None
    return next(iter(found)) if len(found) == 1 else found


def _recipe(args: argparse.Namespace) -> Recipe:
    from pathlib import Path

    from geneformer_fast.families import recognise
    from geneformer_fast.finetuning import recipes
    from geneformer_fast.training.named import recipe_of

    recipe = recipes.cells_of(recognise(Path(args.model))) if args.kind == "cells" else recipes.GENES
    if args.recipe is not None:
        from geneformer_fast.errors import UnsupportedError
        from geneformer_fast.files.schema import read_json

        recipe = recipe_of(recipe, changes=read_json(Path(args.recipe), UnsupportedError), where=args.recipe)
    values = {field: getattr(args, option.replace("-", "_")) for option, (field, *_) in _RECIPE.items()}
    changes = {field: value for field, value in values.items() if value is not None}
    if args.quiet:
        changes["progress"] = False
    return recipe_of(recipe, changes=changes)
