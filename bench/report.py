"""Turns ``bench/results`` into tables: ``python -m bench.report``, with ``--check`` only looks.

``docs/results.md`` has everything; the README has six rows of it (:mod:`bench.front`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import aido_report, finetune_report, float32_report, front, perturb_report, quantize_report, scgpt_report
from bench.gpu import report as gpu_report
from bench.imbalance import report as imbalance_report

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "No results yet."
NAMES = {"v1": "Geneformer V1", "v2": "Geneformer V2", "v1-10m": "Geneformer V1-10M", "v2-104m": "Geneformer V2-104M"}

Result = Mapping[str, Any]


def render(results: Path) -> str:
    """The Markdown for all machines with a folder of JSON files in ``results``."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    found = [_read(folder) for folder in folders]
    parts = [_machine([result for result in machine if not gpu_report.is_gpu(result)]) for machine in found]
    tests = [_outcomes(folder) for folder in folders]
    return "\n\n".join([*filter(None, parts)] or [NOTHING]) + "\n\n" + gpu_report.render(found, tests)


def replaced(text: str, tables: str) -> str:
    """``text`` with what is between the markers replaced.

    Raises
    ------
    ValueError
        A marker is missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def _read(folder: Path) -> list[Result]:
    # A file that begins with something else than a case (the outcomes of tests) is no result.
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if "case" in result]


def _outcomes(folder: Path) -> Result:
    """What tests said on the machine's card."""
    path = folder / "tests.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _machine(results: Sequence[Result]) -> str:
    """One machine: a heading and a table per kind of measurement."""
    if not results:
        return ""
    at = results[0]["provenance"]
    extras = [name for name in ("avx512_bf16", "amx_bf16") if name in at["instructions"]]
    features = f", {', '.join(extras)}" if extras else ""
    blocks = [f"### {at['machine']}, {at['n_cores']} cores, {at['memory_gib']:.0f} GiB{features}"]
    of_case: Callable[[str], list[Result]] = lambda prefix: [r for r in results if r["case"].startswith(prefix)]  # noqa: E731
    embedded = sorted(of_case("embed_"), key=lambda r: r["geometry"] + _order(r))
    blocks += [_embedding(result) for result in embedded if "held_to" not in result]
    blocks += [_float32(result) for result in embedded if "held_to" in result]
    blocks += [_training(result) for result in of_case("train_")]
    blocks += [_quantized(result) for result in of_case("quantized_")]
    blocks += [_block(*scgpt_report.table(r, _threads(r["threads"]))) for r in of_case("scgpt_embed_")]
    blocks += [_block(*imbalance_report.table(result)) for result in of_case("imbalance")]
    blocks += [_perturbed(result) for result in of_case("perturb_") if "geometry" in result]
    tables = (
        *(("tokenize_", _tokenizing), ("rank_genes_", _ranking), ("memory_", _memory), ("peak_", _peaks)),
        *(("quantize_real", _accuracy), ("perturb_real", _effects), ("aido_", _aido)),
        *(("verify_", _verifying), ("finetune_", _finetuning), ("cost_", _costs), ("first_call_", _first_calls)),
    )
    for prefix, table in tables:
        if found := of_case(prefix):
            blocks.append(table(found))
    return "\n\n".join(blocks)


def _order(result: Result) -> str:
    return f"{-result['threads'] + 1000:05d}"


def _embedding(result: Result) -> str:
    rows = []
    candidates, ratios = result["candidates"], result["ratios"]
    for name, row in candidates.items():
        speed = row["cells_per_s"]
        batch = f", batches of {row['batch_size']}" if row["batch_size"] else ""
        what = row["what"]
        if name == "extractor-tuned" and "extractor" not in candidates:  # no row above says what "the same" is
            what = what.replace("the same", "transformers as Geneformer's extractor calls it", 1)
        # Of the same layer only: a block less to compute is no speed.
        ours = [one for one, other in candidates.items() if other["is_ours"] and other["layer"] == row["layer"]]
        compared = [_ratio(ratios, [one for one in ours if ("float32" in one) == is_float32], name)
                    for is_float32 in (False, True)]  # fmt: skip
        rows.append(
            (
                f"**{what}**" if row["is_ours"] else what + batch,
                f"{_number(speed['p50'])} ({_number(speed['p10'])} to {_number(speed['p90'])})",
                *("" if ratio is None else f"{ratio:.1f}x" for ratio in compared),
                _megabytes(row["peak_bytes"]),
            )
        )
    lengths = result["lengths"]
    title = (
        f"Cell embeddings, {NAMES[result['geometry']]} geometry with random weights, {result['n_cells']} real cells of "
        f"{lengths['p10']:.0f} / {lengths['p50']:.0f} / {lengths['p90']:.0f} tokens (10th, 50th, 90th percentile), "
        f"{_threads(result['threads'])}, medians of {result['rounds']} runs in turns. transformers' default attention "
        f"is {result['default_attention']}."
    )
    layer_of: Callable[[str], str] = lambda name: candidates[name]["layer"]  # noqa: E731
    goals = [
        f"{goal:g}x against {candidates[rival]['what'].split(':')[0]}"
        for (ours, rival), goal in ((pair.split(" / "), goal) for pair, goal in result["goals"].items())
        if layer_of(ours) == layer_of(rival)
    ]
    header = ("", "cells/s (p10 to p90)", "ours is faster", "ours in float32 is faster", "peak memory")
    return _block(title, header, rows, [result], f"Goals: {', '.join(goals)}." if goals else "")


def _float32(result: Result) -> str:
    title = float32_report.title(result, NAMES[result["geometry"]], _threads(result["threads"]))
    return _block(title, float32_report.HEADER, float32_report.rows(result), [result], float32_report.goals(result))


def _ratio(ratios: Mapping[str, float], ours: Sequence[str], rival: str) -> float | None:
    """How much faster the first of ours is that was compared with a rival."""
    return next((ratios[pair] for one in ours if (pair := f"{one} / {rival}") in ratios), None)


def _quantized(result: Result) -> str:
    rows = []
    for name, row in result["candidates"].items():
        speed, ratio = row["cells_per_s"], result["ratios"].get(f"int8 / {name}")
        rows.append(
            (
                f"**{row['what']}**" if row["is_ours"] else f"{row['what']}, batches of {row['batch_size']}",
                f"{_number(speed['p50'])} ({_number(speed['p10'])} to {_number(speed['p90'])})",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{row['least_centred_cosine']:.4f}",
                _megabytes(row["peak_bytes"]),
            )
        )
    held = f", libraries held to {result['held_to']}" if result["held_to"] else ""
    lengths = result["lengths"]
    title = (
        f"Quantized, {NAMES[result['geometry']]} geometry with random weights, {result['n_cells']} real cells of "
        f"{lengths['p10']:.0f} / {lengths['p50']:.0f} / {lengths['p90']:.0f} tokens, {_threads(result['threads'])}"
        f"{held}, last layer, medians of {result['rounds']} runs in turns."
    )
    goals = ", ".join(f"{pair} {goal:g}x" for pair, goal in result["goals"].items())
    header = ("", "cells/s (p10 to p90)", "int8 is faster", "least centred cosine with float32", "peak memory")
    return _block(title, header, rows, [result], f"Goals: {goals}." if goals else "")


def _training(result: Result) -> str:
    rows = []
    candidates, ratios = result["candidates"], result["ratios"]
    for name, row in candidates.items():
        speed = row["cells_per_s"]
        at_once = f", {row['batch_size']} cells at once" if row["batch_size"] else ""
        compared = [ratios.get(f"{ours} / {name}") for ours in ("ours", "accelerated", "ours-float32")]
        rows.append(
            (
                f"**{row['what']}**" if row["is_ours"] else row["what"] + at_once,
                f"{_number(speed['p50'])} ({_number(speed['p10'])} to {_number(speed['p90'])})",
                _number(row["tokens_per_s"]["p50"]),
                *("" if ratio is None else f"{ratio:.1f}x" for ratio in compared),
                _megabytes(row["peak_bytes"]),
            )
        )
    lengths, curve = result["lengths"], result["curve"]
    title = (
        f"Pretraining, {NAMES[result['geometry']]} geometry, dropout {result['dropout']:g}, steps of "
        f"{result['cells_per_step']} real cells of {lengths['p10']:.0f} / {lengths['p50']:.0f} / {lengths['p90']:.0f} "
        f"tokens (10th, 50th, 90th percentile) in length-grouped order ({result['padded_share']:.0%} of a padded batch "
        f"is padding), {_threads(result['threads'])}, medians of {result['rounds']} runs of {result['n_steps']} steps "
        "in turns, optimizer included."
    )
    goals = [f"{goal:g}x against {candidates[pair.split(' / ')[1]]['what'].split(':')[0]}"
             for pair, goal in result["goals"].items()]  # fmt: skip
    differences = [
        f"{difference:.4f} ({candidates[name]['what']})"
        for name, difference in curve["largest_difference_from_trainer"].items()
        if candidates[name]["is_ours"]
    ]
    note = (
        f"Goals: {', '.join(goals)}. Over {curve['n_steps']} steps without dropout, no step's loss differs from the "
        f"Trainer's in float32 by more than {' or '.join(differences)} nats."
    )
    header = ("", "cells/s (p10 to p90)", "tokens/s", "ours is faster", "accelerated", "in float32", "peak memory")
    return _block(title, header, rows, [result], note)


def _tokenizing(results: Sequence[Result]) -> str:
    rows = [
        (
            NAMES[r["case"].removeprefix("tokenize_")],
            f"{r['n_cells']:,}",
            _number(r["ours"]["cells_per_s"]),
            _number(r["n_cells"] / r["rival"]["at_n_cells"]["wall_s"]),
            f"{r['ratio']:.0f}x",
            f"{r['goal']}x",
            _megabytes(r["ours"]["fresh_process"]["peak_bytes"]),
        )
        for r in results
    ]
    header = ("", "cells", "cells/s", "one cell after another, cells/s", "faster", "goal", "peak memory")
    rival = results[0]["rival"]
    measured = " and ".join(f"{at['n_cells']:,}" for at in rival["measured"])
    title = (
        f"Tokenization: {results[0]['what']}. The rival works as the official tool does; it was measured at {measured} "
        f"cells ({rival['how']})."
    )
    return _block(title, header, rows, results)


def _ranking(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        name, _, version = result["case"].removeprefix("rank_genes_").rpartition("_")
        million = [f"{value / 1e6:.0f}" for value in (result["tokens_per_s"], result["entries_per_s"], result["goal"])]
        rows.append((f"{name}, {NAMES[version]}", *million))
    header = ("", "million tokens/s", "million counts/s", "goal, million tokens/s")
    return _block("Ranking alone, one thread, in memory, best of 15 runs.", header, rows, results)


def _memory(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for n_cells, run in result["by_n_cells"].items():
            command = f"geneformer-fast {result['case'].removeprefix('memory_')}"
            goal = _megabytes(result["goal_peak_bytes"])
            rows.append(
                (f"`{command}`", f"{int(n_cells):,}", _megabytes(run["peak_bytes"]), goal, f"{run['wall_s']:.0f}")
            )
    header = ("", "cells", "peak memory", "goal", "seconds, start included")
    return _block("Peak memory of whole commands, as the operating system counts it.", header, rows, results)


def _peaks(results: Sequence[Result]) -> str:
    rows = [
        (
            f"{NAMES[result['geometry']]}, {name}",
            _megabytes(row["weight_bytes"]),
            _megabytes(row["peak_bytes"]),
            _megabytes(row["smallest_budget_bytes"]),
            _megabytes(row["peak_bytes_within"]),
            _megabytes(row["goal_bytes"]) if row["goal_bytes"] else "",
        )
        for result in results
        for name, row in result["rows"].items()
    ]
    lengths = " and ".join(f"{max(result['lengths']):,}" for result in results)
    title = (
        "Peak memory of `geneformer-fast embed`, the whole process with Python and libraries, random weights, cells of "
        f"up to {lengths} tokens: with nothing asked for, and within the smallest `--memory-budget` that works."
    )
    header = ("", "weights", "peak memory", "smallest budget", "peak memory within it", "goal")
    return _block(title, header, rows, results)


def _aido(results: Sequence[Result]) -> str:
    return _block(aido_report.title(results[0]), aido_report.HEADER, aido_report.rows(results[0]), results)


def _accuracy(results: Sequence[Result]) -> str:
    return _block(quantize_report.title(results[0]), quantize_report.header(), quantize_report.rows(results), results)


def _perturbed(result: Result) -> str:
    title = perturb_report.title(result, NAMES[result["geometry"]], _threads(result["threads"]))
    return _block(title, perturb_report.HEADER, perturb_report.rows(result), [result], perturb_report.goals(result))


def _effects(results: Sequence[Result]) -> str:
    title, rows = perturb_report.real_title(results[0]), perturb_report.real_rows(results)
    return _block(title, perturb_report.REAL_HEADER, rows, results)


def _verifying(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        without, with_sums = (result["wall_s"][name]["median"] for name in ("without", "with"))
        row = _megabytes(result["n_bytes"]), f"{without:.2f} s", f"{with_sums:.2f} s", f"{result['ratio']:.2f}"
        rows.append((result["what"], *row))
    header = ("", "size", "without checksums", "with", "ratio")
    title = "What checksums cost: everything in the page cache, so that no disk hides it; in turns, medians."
    return _block(title, header, rows, results)


def _finetuning(results: Sequence[Result]) -> str:
    (result,) = results
    return _block(finetune_report.title(result), finetune_report.header(), finetune_report.rows(result), results)


def _costs(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        growth, points, beyond = result["growth"], result["points"], result["predicted"]
        measured = f"{points[0]['at']:,} to {points[-1]['at']:,}" if points else ""
        fitted = [f"{growth['exponent']:.2f}", f"{growth['fixed_s']:.2g} s"] if growth else ["", ""]
        last = _seconds(points[-1]["seconds"]["median"]) if points else ""
        predicted = f"{beyond[-1]['at']:,}: {_seconds(beyond[-1]['seconds'])}" if beyond else ""
        by = (f"{result['name']}, by {result['size']}", measured, last)
        rows.append((*by, fitted[0], f"{result['expected_exponent']:.2f}", fitted[1], predicted))
    header = ("", "sizes", "the largest takes", "exponent", "expected", "fixed part", "predicted")
    title = (
        "Cost against size: a fixed part, and a factor times the size to the power of the exponent. Tokens per cell, "
        "perturbed cell or batch grow while the tokens of all stay as many; theirs is the time of a cell, and of all."
    )
    return _block(title, header, rows, results)


def _first_calls(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for program, found in result["programs"].items():
            name = f"{NAMES.get(result['geometry'], result['geometry'])}, {result['device']}: {program}"
            if "not_available" in found:
                rows.append((name, f"not available ({found['not_available']})", ""))
                continue
            for stage, kinds in {"altogether": found["whole"], **found["stages"]}.items():
                times = (f"{kinds[kind]['seconds']['median']:.2f}" for kind in ("cold", "warm"))
                rows.append((name if stage == "altogether" else f"&nbsp;&nbsp;{stage}", *times))
    header = ("", "cold, s", "warm, s")
    title = "The first call, from the start of Python: with nothing that compilers keep, and with what they kept."
    return _block(title, header, rows, results)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def _block(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], results: Sequence[Result], note: str = ""
) -> str:
    lines = [title, "", _row(header), _row(["---"] + ["---:"] * (len(header) - 1)), *(_row(row) for row in rows)]
    return "\n".join([*lines, "", " ".join(part for part in (note, _measured(results)) if part)])


def _measured(results: Sequence[Result]) -> str:
    """When, with what, and under which load a table was measured."""
    found = [result["provenance"] for result in results]
    commits = sorted({f"`{p['commit']}`" + (" with uncommitted changes" if p["is_dirty"] else "") for p in found})
    loads = [p["load_1min"] for p in found]
    packages = found[0]["packages"]
    names = [name for name in ("numpy", "numba", "torch", "transformers") if name in packages]
    versions = ", ".join(f"{name} {packages[name]}" for name in names)
    return (
        f"<sub>Commit {', '.join(commits)}; {' and '.join(sorted({p['date'] for p in found}))}; load "
        f"{max(loads):.1f}; Python {found[0]['python']}, {versions}.</sub>"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite both pages; with ``--check`` only say whether that would change them (exit code 1)."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when the tables are stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets the table of six rows")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="gets everything")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    stale = []
    for path, render_ in ((args.readme, front.render), (args.page, render)):
        old = path.read_text(encoding="utf-8")
        new = replaced(old, render_(args.results))
        if new != old:
            stale.append(path)
        if not args.check:
            path.write_text(new, encoding="utf-8")
    if args.check and stale:
        print(f"{' and '.join(path.name for path in stale)}: stale, run python -m bench.report")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
