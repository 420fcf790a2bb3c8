"""``geneformer-fast quantize``: a model folder with weights of eight bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.embed import not_written, state_of
from geneformer_fast.cli.options import renamed

NAME = "quantize"
HELP = "make a model of a quarter of the size, with weights of eight bits"
EXAMPLE = "geneformer-fast quantize pretrained/final --calibrate tokens --check tokens --out quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder (config.json and weights)")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write, which embed, predict and transformers load"
    )
    parser.add_argument(
        "--scheme",
        choices=("int8", "int8-weights", "fp8"),
        default="int8",
        help="int8: int8 weights, multiplied with activations that are rounded to int8 as they come, "
        "where that is faster; int8-weights: activations are not rounded; fp8: both in e4m3, for Ada and Hopper "
        "(default: int8)",
    )
    parser.add_argument(
        "--keep-embeddings",
        action="store_true",
        help="leave embedding tables, and a decoder that shares one, in float32",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TOKENS",
        help="token folder to measure each layer on: one that loses too much is smoothed, or stays in floating point "
        "(default: none, all layers follow the scheme)",
    )
    parser.add_argument(
        "--bar",
        type=float,
        metavar="DB",
        help="with --calibrate: least signal over noise of a layer, in dB (default: 30; fp8: 25)",
    )
    parser.add_argument(
        "--least-cosine",
        type=float,
        metavar="X",
        help="with --calibrate: least cosine of a cell's embeddings (default: 0.9995)",
    )
    cells = parser.add_argument(
        "--max-cells", type=int, metavar="N", help="with --calibrate: most cells that are looked at (default: 256)"
    )
    renamed(parser, "--cells", cells)
    parser.add_argument(
        "--check",
        dest="check_on",
        metavar="TOKENS",
        help="token folder on which the new model is compared with MODEL, in a table (default: none)",
    )
    parser.add_argument(
        "--label",
        metavar="NAME",
        help="with --check: column with the right classes of a classifier (default: the one it was trained on)",
    )
    parser.add_argument(
        "--device", help="with --calibrate or --check: cpu, cuda, cuda:1 ... (default: cpu to calibrate)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DIR")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import check_device, check_labels, check_model, check_tokens
    from geneformer_fast.errors import UnsupportedError
    from geneformer_fast.quantization.places import check_out

    if args.label is not None and args.check_on is None:
        raise UnsupportedError("--label is about comparing models: pass --check TOKENS too")
    if args.device is not None and args.calibrate is None and args.check_on is None:
        raise UnsupportedError("--device is where cells are embedded: pass --calibrate TOKENS or --check TOKENS too")
    check_device(args.device)
    check_model(args.model)
    for tokens in (args.calibrate, args.check_on):
        if tokens is not None:
            check_tokens(tokens)
    if args.label is not None:
        check_labels(args.check_on, [args.label])
    check_out(Path(args.out), Path(args.model), overwrite=args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.quantization.quantize import quantize
    from geneformer_fast.quantization.report import Report

    args.before = state_of(args.out)
    out, progress = Path(args.out), False if args.quiet else None
    if args.check_on is not None:
        from geneformer_fast.quantization.check import check, check_askable

        check_askable(args.model, args.check_on, label=args.label, device=args.device)
    quantize(
        Path(args.model),
        out,
        scheme=args.scheme,
        calibrate=args.calibrate,
        keep_embeddings=args.keep_embeddings,
        bar=args.bar,
        least_cosine=args.least_cosine,
        max_cells=args.max_cells,
        device=None if args.calibrate is None else args.device,
        overwrite=args.overwrite,
        progress=progress,
    )
    report = Report.read(out)
    text, values = f"{report.as_text()}\n{out}", {"out": out, **report.to_dict()}
    if args.check_on is not None:
        found = check(args.model, out, args.check_on, label=args.label, device=args.device, progress=progress)
        text, values = f"{text}\n{found.as_text()}", {**values, "check": found.to_dict()}
    return Answer(text, values)


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    is_there = state_of(args.out) != getattr(args, "before", None)
    return f"{args.out} is complete" if is_there else not_written(args.out)
