"""``geneformer-fast pretrain``: tokens to a trained encoder."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from geneformer_fast import families
from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed
from geneformer_fast.errors import UnsupportedError

NAME = "pretrain"
HELP = "train an encoder to name masked genes"
EXAMPLE = "geneformer-fast pretrain tokens --config geneformer-v1-10m --epochs 3 --batch-cells 144 --out pretrained"

logger = logging.getLogger(__name__)

#: Option -> field of the recipe, type, what it says, and the default of the recipe of geneformer-v1-10m, where another
#: recipe may have another one.
_FIELDS: dict[str, tuple[str, type, str, str | None]] = {
    "--epochs": ("epochs", float, "passes over the cells", "3"),
    "--steps": ("steps", int, "optimizer steps, instead of epochs", "none"),
    "--batch-cells": ("batch_cells", int, "cells per step, over all processes", "144"),
    "--batch-tokens": ("batch_tokens", int, "tokens per step, over all processes, instead of cells", "none"),
    "--token-budget": (
        *("token_budget", int, "most tokens in memory at once; larger steps are accumulated"),
        "16384",
    ),
    "--learning-rate": ("learning_rate", float, "peak of the learning rate, per step", "0.001"),
    "--schedule": ("schedule", str, "linear, cosine, polynomial, step or constant", "linear"),
    "--warmup-steps": ("warmup_steps", int, "optimizer steps until the peak", "10000"),
    "--warmup-share": (
        *("warmup_share", float, "share of all steps until the peak, 0 to 1, instead of their number"),
        "none",
    ),
    "--precision": ("precision", str, "float32, bfloat16, float16 or auto (the fastest here)", "float32"),
    "--parallel": ("parallel", str, "under torchrun: ddp or fsdp", "ddp"),
    "--eval-every": ("eval_every", int, "steps between validations (default: every epoch)", None),
    "--save-every": (
        "save_every",
        int,
        "steps between checkpoints (default: every epoch, and every 1,000 steps)",
        None,
    ),
    "--keep": ("keep", int, "checkpoints that are kept", "2"),
    "--patience": ("patience", int, "stop after so many validations without a better one (default: never)", None),
    "--seed": ("seed", int, "whole number that weights, orders, masks and dropout are drawn by", "42"),
    "--workers": ("workers", int, "threads that read and mask ahead", "1"),
}
_METAVARS = {int: "N", float: "X", str: "NAME"}
#: Options of which one is given.
_EITHER = (
    *(("--epochs", "--steps"), ("--batch-cells", "--batch-tokens")),
    ("--warmup-steps", "--warmup-share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("tokens", metavar="TOKENS", help="token folder, from geneformer-fast tokenize")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the run; the model is in its final/")
    parser.add_argument(
        "--config",
        default=families.DEFAULT_PRESET,
        metavar="NAME",
        help="a preset's name, a config.json, or a model's folder (its geometry only) (default: geneformer-v1-10m)",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="a published recipe's name, or a JSON file (default: the one of --config)"
    )
    parser.add_argument("--init", metavar="FOLDER", help="go on from this checkpoint's weights (default: fresh ones)")
    adapt = parser.add_argument(
        "--adapt-vocabulary", action="store_true", help="give the model the vocabulary of the tokens, not the preset's"
    )
    renamed(parser, "--own-vocabulary", adapt)
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--eval-share",
        type=float,
        metavar="SHARE",
        help="share of cells held out, 0 to 1 (default: 0.01, at most 10,000 cells)",
    )
    held_out.add_argument("--eval-tokens", metavar="FOLDER", help="token folder to validate on (default: --eval-share)")
    held_out.add_argument(
        "--eval-column", metavar="COLUMN=VALUE[,VALUE]",
        help="hold out the cells with these values of a column (default: --eval-share)",
    )  # fmt: skip
    groups = [(options, parser.add_mutually_exclusive_group()) for options in _EITHER]
    for option, (_, kind, text, default) in _FIELDS.items():
        place = next((group for options, group in groups if option in options), parser)
        said = text if default is None else f"{text} (default: the recipe's; geneformer-v1-10m: {default})"
        place.add_argument(option, type=kind, metavar=_METAVARS[kind], help=said)
    parser.add_argument("--recompute", action="store_true", help="keep less in memory, compute blocks twice")
    parser.add_argument("--wandb", metavar="PROJECT", help="report to a project of Weights & Biases (default: to none)")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the recipe, as JSON (default: the recipe's)",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const=True,
        default=False,
        metavar="PLACE",
        help="report how fast it trains: a .json, an .html or a folder; profile/ in --out without PLACE (default: no)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from pathlib import Path

    from geneformer_fast.cli.places import check_device, check_model, check_tokens
    from geneformer_fast.training.named import recipe_of
    from geneformer_fast.training.occupied import check_run_folder

    check_device(args.device)
    recipe_of(args.recipe, args.config, changes_of(args))
    _column(args.eval_column)
    for tokens in (args.tokens, args.eval_tokens):
        if tokens is not None:
            check_tokens(tokens)
    if args.init is not None:
        check_model(args.init)
    check_run_folder(Path(args.out), is_resuming=args.resume)


def run(args: argparse.Namespace) -> Answer | int:
    """Run the command."""
    import os

    if args.profile:
        from geneformer_fast.profiling.meters.silence import import_torch_quietly

        import_torch_quietly()
    from geneformer_fast.training.history import StepRecord
    from geneformer_fast.training.pretrain import pretrain

    is_first = int(os.environ.get("RANK", "0")) == 0
    last: list[StepRecord] = []
    args.last = last  # for what is to be said after Ctrl-C
    evaluations: list[dict[str, float]] = []
    final = pretrain(
        args.tokens,
        args.out,
        config=args.config,
        recipe=args.recipe,
        init=args.init,
        adapt_vocabulary=args.adapt_vocabulary,
        eval_share=args.eval_share,
        eval_tokens=args.eval_tokens,
        eval_column=_column(args.eval_column),
        device=args.device,
        resume=args.resume,
        on_step=lambda record: last.__setitem__(slice(None), [record]),
        on_eval=evaluations.append,
        tell=logger.info if is_first else None,
        profile=args.profile,
        **changes_of(args),
    )
    if not is_first:  # which speaks for all
        return 0
    return Answer(_summary(last, evaluations, final), _values(last, evaluations, final))


def interrupted(args: argparse.Namespace) -> str:
    """How far it is after Ctrl-C, and how to go on."""
    from pathlib import Path

    from geneformer_fast.training.run_folder import interrupted_message

    done = f"after step {args.last[0].step:,}; " if getattr(args, "last", None) else ""
    return done + interrupted_message(Path(args.out))


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that the command line changes."""
    changes = {}
    for option, (field, *_) in _FIELDS.items():
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value is not None:
            changes[field] = value
    if args.recompute:
        changes["is_recomputing"] = True
    if args.wandb is not None:
        changes["wandb"] = args.wandb
    if args.tensorboard:
        changes["tensorboard"] = True
    if args.quiet:
        changes["progress"] = False
    for assignment in args.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UnsupportedError(f"--set {assignment}: write FIELD=VALUE, such as weight_decay=0.1")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return changes


def _column(text: str | None) -> tuple[str, list[str]] | None:
    if text is None:
        return None
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise UnsupportedError(f"--eval-column {text}: write COLUMN=VALUE, or COLUMN=VALUE,VALUE")
    return name, values.split(",")


def _values(last: list[Any], evaluations: list[dict[str, float]], final: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"out": final.parent, "model": final}
    if last:
        said |= {"steps": last[0].step, "epochs": last[0].epoch, "loss": last[0].loss}
    if evaluations:
        said["evaluation"] = evaluations[-1]
    return said


def _summary(last: list[Any], evaluations: list[dict[str, float]], final: Any) -> str:
    lines = []
    if last:
        lines.append(f"{last[0].step:,} steps, {last[0].epoch:.2f} epochs, training loss {last[0].loss:.4f}")
    if evaluations:
        lines.append(f"validation loss {evaluations[-1]['loss']:.4f}")
    return "\n".join([*lines, f"the model is in {final}"])
