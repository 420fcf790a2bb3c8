"""``geneformer-fast profile``: how fast it is here, how far from the limit, and what to change."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_fast import families
from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed

if TYPE_CHECKING:
    from geneformer_fast.profiling.figures import Setting
    from geneformer_fast.profiling.report import Report
    from geneformer_fast.profiling.request import Request

NAME = "profile"
HELP = "measure speed, memory and energy of embedding, training or tokenizing, and say what to change"
EXAMPLE = "geneformer-fast profile --model geneformer-v1-10m --lengths real --seconds 10 --out report"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--mode", choices=("embed", "train", "tokenize"), default="embed", help="(default: embed)")
    what.add_argument(
        "--model",
        metavar="FOLDER|PRESET",
        help="checkpoint folder, or a preset such as geneformer-v1-10m, which gets random weights (required, but for "
        "what has no model; default with --predict: geneformer-v1-10m)",
    )
    what.add_argument(
        "--tokens",
        metavar="FOLDER",
        help="token folder, from geneformer-fast tokenize (default: made-up cells)",
    )
    what.add_argument(
        "--lengths",
        metavar="real|uniform:LOW-HIGH|N",
        help="made-up cells instead: as long as real blood cells, evenly from LOW to HIGH tokens, or of N tokens each "
        "(required without --tokens; default with --predict: real)",
    )
    what.add_argument(
        "--cells",
        type=int,
        metavar="N",
        help="how many cells to take, at most all of --tokens (default: as many as the time allows)",
    )
    what.add_argument("--counts", metavar="INPUT", help="with --mode tokenize: counts (default: made-up ones)")
    what.add_argument(
        "--dictionary", metavar="FOLDER", help="with --counts: folder with the gene dictionaries (required there)"
    )
    what.add_argument(
        "--preset",
        choices=tuple(families.layouts()),
        help="which dictionaries, if there are several; with --predict, whose (default: the only ones in FOLDER)",
    )
    _add_how(parser)
    answer = parser.add_argument_group("what comes out")
    answer.add_argument(
        "--out", metavar="DIR", help="folder to write: report.json, report.html and traces (default: none)"
    )
    answer.add_argument("--overwrite", action="store_true", help="replace the report in DIR")
    before = parser.add_argument_group("without measuring")
    before.add_argument(
        "--predict", action="store_true", help="say what --cells N would take on --card NAME, from measurements there"
    )
    before.add_argument(
        "--card", metavar="NAME", help="with --predict: a card or machine, such as 'NVIDIA H200' (required there)"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: auto, the fastest here)")
    how.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    how.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: all cores)")
    budget = how.add_argument(
        "--token-budget", type=int, metavar="N",
        help="most tokens that are computed at once (default: by device); with --mode train about so many make a step",
    )  # fmt: skip
    renamed(parser, "--batch-tokens", budget)
    how.add_argument("--layer", metavar="last|penultimate|N", help="where embedding stops (default: penultimate)")
    how.add_argument("--recompute", action="store_true", help="with --mode train: keep less, compute blocks twice")
    how.add_argument(
        "--compare", choices=("stock",), help="stock: transformers beside ours on the same cells (default: none)"
    )
    how.add_argument("--sweep", action="store_true", help="find the best token budget, and what memory it leaves")
    how.add_argument("--seconds", type=float, metavar="S", help="seconds to measure (default: about 10)")
    how.add_argument(
        "--steps", type=int, metavar="N", help="how many steps to measure, instead of seconds (default: --seconds)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import check_counts, check_device, check_dictionary, check_layer, check_tokens
    from geneformer_fast.errors import UnsupportedError

    request = _request(args)
    request.check()
    if args.quiet and args.out is None and not args.json:
        raise UnsupportedError("--quiet prints nothing, so that nothing would come out: pass --out, or --json")
    if not request.predict:
        check_device(request.device)
    check_dictionary(request.dictionary)
    if request.counts is not None:
        check_counts([request.counts])
    if request.tokens is not None:
        check_tokens(request.tokens)
    check_layer(request.layer, request.model or (families.DEFAULT_PRESET if request.predict else None))
    if request.out is not None:
        check_place(Path(request.out), is_replacing=request.overwrite)


def _request(args: argparse.Namespace) -> Request:
    from geneformer_fast.profiling.request import Request

    fields = Request.__dataclass_fields__
    return Request(**{name: value for name, value in vars(args).items() if name in fields})


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.profiling.meters.silence import import_torch_quietly

    import_torch_quietly()
    request = _request(args)
    if request.predict:
        return _predict(request)
    report = _measured(request, None) if request.out is None else _written(request, Path(request.out))
    return Answer(_text(report, request), report.to_dict())


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C."""
    return "nothing was measured" if args.out is None else f"{args.out} is not written; run the same command again"


def _measured(request: Request, place: Path | None) -> Report:
    """Everything that was asked for; traces go into a folder."""
    from dataclasses import replace

    from geneformer_fast.profiling.compare import check_comparable, compared
    from geneformer_fast.profiling.findings import findings
    from geneformer_fast.profiling.scenarios import Tokenizing, opened
    from geneformer_fast.profiling.sweep import best_of, finding_of, sweep

    with opened(request) as scenario:
        if isinstance(scenario, Tokenizing):
            logger.info("%s", f"tokenizing {scenario.what}")
            return scenario.report()
        if request.compare is not None:
            check_comparable(scenario.encoder)
        settings: list[Setting] = []
        usual = scenario.token_budget
        if request.sweep:
            logger.info("%s", f"trying token budgets on {scenario.cells.what}")
            settings = sweep(scenario, tell=lambda setting: logger.info("%s", _line_of(setting)))
            scenario = scenario.with_budget(best_of(settings).token_budget)
        logger.info("%s", f"measuring {scenario.name} on {scenario.cells.what}")
        report = scenario.report(None if place is None else place / "trace.json.gz")
        report = replace(report, sweep=settings)
        if request.compare is not None:
            logger.info("measuring transformers on the same cells")
            report = compared(scenario, report, None if place is None else place / "trace.transformers.json.gz")
        elif settings:
            report = replace(report, findings=findings(report))
        if settings and (faster := finding_of(settings, usual)) is not None:
            report = replace(report, findings=[faster, *report.findings])
    return report


def _written(request: Request, out: Path) -> Report:
    """The report, in a folder that is there whole or not at all."""
    from geneformer_fast.files.locks import file_lock
    from geneformer_fast.files.writing import whole_folder

    check_place(out, is_replacing=request.overwrite)
    _check_page()
    with file_lock(out):
        check_place(out, is_replacing=request.overwrite)
        with whole_folder(out) as place:
            report = _measured(request, place)
            report.save(place / "report.json")
            (place / "report.html").write_text(report.to_html(), encoding="utf-8")
    return report


def check_place(out: Path, *, is_replacing: bool) -> None:
    """Refuse a folder that may not be written, before anything is measured.

    Raises
    ------
    OutputError
        Something is there and may not be replaced, or is more than a report.
    """
    from geneformer_fast.errors import OutputError

    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    there = sorted(path.name for path in out.iterdir())
    foreign = [name for name in there if not (name in ("report.json", "report.html") or name.startswith("trace."))]
    if foreign:
        raise OutputError(f"{out} holds {foreign[0]}, which is no part of a report; name a folder of its own")
    if there and not is_replacing:
        raise OutputError(f"{out} exists already; choose another name or pass --overwrite")


def _check_page() -> None:
    """Refuse to measure what could not be drawn afterwards.

    Raises
    ------
    UnsupportedError
        A library is not installed.
    """
    from importlib.util import find_spec

    from geneformer_fast.errors import UnsupportedError

    absent = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if absent:
        raise UnsupportedError(
            f"--out writes a page, which needs {absent[0]}, and that is not installed: pip install "
            "'geneformer-fast[profile]', or leave --out away (--json for machines)"
        )


def _predict(request: Request) -> Answer:
    """Say what many cells would take."""
    from geneformer_fast.profiling.prediction.asked import predicted

    found = predicted(request)
    return Answer(found.as_text(), found.to_dict())


def _text(report: Report, request: Request) -> str:
    from geneformer_fast.profiling.text import table

    if request.out is None:
        return table(report)
    place = Path(request.out) / "report.html"
    return f"{table(report)}\n{place} shows all of it, report.json beside it is for machines"


def _line_of(setting: Setting) -> str:
    from geneformer_fast.profiling.figures import Missing

    rate = setting.cells_per_s
    said = str(rate) if isinstance(rate, Missing) else f"{rate:,.3g} cells/s"
    return f"  {setting.token_budget:>9,} tokens: {said}"
