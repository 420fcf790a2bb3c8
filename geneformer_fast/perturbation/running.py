"""What is done once a question is ready: values into rows, rows into memory or a folder, and what is said of them."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast.encoder import Encoder
from geneformer_fast.extract.encoding import scheme_of
from geneformer_fast.files.checksums import fingerprint_of_tensors
from geneformer_fast.perturbation.counts import CountEdits
from geneformer_fast.perturbation.engine import CellEffects, PerturbationRun
from geneformer_fast.perturbation.noise import Noise, Spread, noise_of
from geneformer_fast.perturbation.plan import Plan, estimated_seconds
from geneformer_fast.perturbation.precision import agreement_of
from geneformer_fast.perturbation.question import Prepared, Question
from geneformer_fast.perturbation.rows import CellRows, RowSchema
from geneformer_fast.perturbation.states import StateRoles
from geneformer_fast.perturbation.store import PerturbationWriter, RunCells
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.distributed import Ranks

logger = logging.getLogger(__name__)
#: Columns of the dose, where there are doses, and of the name of a set, where there are sets.
DOSE, SET = "dose", "set"


def rows_of(piece: CellEffects, ready: Prepared, *, official: bool = False) -> CellRows:
    """Values of a cell as rows: of each variant those of the cell, state by state, and then those of its genes."""
    effects, doses = piece.effects, ready.run.edits.doses
    n_variants, n_values = effects.cell.shape
    variant, state = np.repeat(np.arange(n_variants), n_values), None
    affected, value = None, effects.cell.reshape(-1)
    if ready.states is not None:
        state = np.tile(np.arange(n_values), n_variants)
    if effects.variant is not None and effects.affected is not None and effects.genes is not None:
        of_genes = effects.variant, effects.affected, effects.genes
        if official and ready.run.edits.kind == "overexpress" and ready.run.edits.items is None:
            of_genes = _named_as_officially(*of_genes)
        order = np.argsort(np.concatenate([variant, of_genes[0]]), kind="stable")
        affected = np.concatenate([np.full(len(variant), -1, np.int32), of_genes[1]])[order]
        value = np.concatenate([value, of_genes[2]])[order]
        if state is not None:
            state = np.concatenate([state, np.full(len(of_genes[0]), -1)])[order]
        variant = np.concatenate([variant, of_genes[0]])[order]
    extra: dict[str, np.ndarray] = {DOSE: np.array(doses, dtype=np.float32)[piece.dose]} if doses else {}
    if ready.sets:
        extra[SET] = np.array(ready.sets, dtype=object)[piece.item]
    return CellRows.of(piece.perturbed, value, variant=variant, affected=affected, state=state, extra=extra)


def _named_as_officially(
    variant: np.ndarray, affected: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values under the name of the next gene of their variant, and without the last one."""
    is_followed = variant[:-1] == variant[1:]
    return variant[:-1][is_followed], affected[1:][is_followed], value[:-1][is_followed]


def timed(run: PerturbationRun, plan: Plan) -> Plan:
    """A plan that knows how long it takes."""
    return dataclasses.replace(plan, seconds=estimated_seconds(run, plan))


def in_memory(
    ready: Prepared, rows: RowSchema, carried: Mapping[str, pa.Array | pa.ChunkedArray], *, official: bool
) -> pa.Table:
    """All values as a table."""
    tables, n_absent = [], 0
    for piece in ready.run.values(n_variants=int(ready.plan.n_variants.sum())):
        n_absent += _n_absent(piece)
        of_cell = {name: column[piece.rank] for name, column in carried.items()}
        cell = int(ready.plan.chosen.cells[piece.rank])
        tables.append(rows.table(cell, rows_of(piece, ready, official=official), of_cell))
    _warn_of_absent(n_absent)
    return pa.concat_tables(tables) if tables else rows.schema.empty_table()


def into_folder(
    out: Path,
    cells: RunCells,
    ready: Prepared,
    ranks: Ranks,
    opening: Mapping[str, Any],
    beside: Encoder | None = None,
    *,
    official: bool,
) -> None:
    """Compute what is not in a folder yet, and complete it."""
    # The first process makes the folder, and says whether it was found finished.
    device = ready.run.encoder.device
    if not ranks.is_first and ranks.first(0.0, device):
        return
    with PerturbationWriter(out, cells, **opening, part=ranks.rank, n_parts=ranks.world_size) as writer:
        if ranks.is_first and ranks.first(float(writer.is_finished), device):
            return
        report = _computed(ready, writer, ranks, official=official)
        writer.complete()
        ranks.barrier()
        if ranks.is_first:
            report |= _of_all(ready, writer, report)
            if beside is not None:
                states = None if ready.states is None else torch.from_numpy(ready.states.embeddings).to(device)
                agreement = agreement_of(ready.run, beside, states)
                report["compared"] = None if agreement is None else agreement.to_dict()
            writer.finish(report)
            logger.info("%s", said_of(report))


def _computed(ready: Prepared, writer: PerturbationWriter, ranks: Ranks, *, official: bool) -> dict[str, Any]:
    """Compute and append what is left for this process; what to report of it."""
    run, left = ready.run, writer.remaining
    n_variants = int(ready.plan.n_variants[left].sum())
    # Of what is computed already, where nothing is left: effects are said beside it.
    noise = _noise(ready, left if n_variants else np.arange(len(ready.plan.n_variants)))
    if ranks.is_first:
        part = ready.plan.of_ranks(left)
        logger.info("%s", (timed(run, part) if n_variants else part).text())
    begin, n_absent = perf_counter(), 0
    for piece in run.values(left, n_variants):
        n_absent += _n_absent(piece)
        writer.append(int(ready.plan.chosen.cells[piece.rank]), rows_of(piece, ready, official=official))
    seconds = perf_counter() - begin
    _warn_of_absent(n_absent)
    return {
        "n_variants_computed": n_variants, "seconds": round(seconds, 3),
        "perturbed_cells_per_second": round(n_variants / seconds, 3) if seconds else None,
        "screen": ready.screened,
        "noise": None if noise is None else noise.to_dict(),
    }  # fmt: skip


def _of_all(ready: Prepared, writer: PerturbationWriter, report: Mapping[str, Any]) -> dict[str, Any]:
    """What to report of all that the folder holds, whichever process computed it, and when."""
    noise = report["noise"]
    spread = Spread(0.0 if noise is None else noise["largest"], is_shift=ready.states is not None)
    for values in writer.values_of_cells():
        spread.add(values)
    return {"n_variants": int(ready.plan.n_variants.sum()), "effects": spread.to_dict()}


def _n_absent(piece: CellEffects) -> int:
    return int(np.isnan(piece.effects.cell).any(1).sum())


def _warn_of_absent(n: int) -> None:
    if n:
        warnings.warn(
            f"{n:,} perturbed cells have no value: every gene of theirs is among the perturbed, and nothing is left to "
            "compare",
            stacklevel=4,
        )


def _noise(ready: Prepared, left: np.ndarray) -> Noise | None:
    """Of the first group of cells that has variants to compute."""
    counts = ready.plan.n_variants
    is_left = np.zeros(len(counts), dtype=bool)
    is_left[left] = counts[left] > 0
    groups = ((first, last) for first, last in ready.run.groups() if is_left[first:last].any())
    return next((noise_of(ready.run, ready.run.group(*bounds)) for bounds in groups), None)


def said_of(report: Mapping[str, Any]) -> str:
    """A report in words: speed, and effects beside their noise."""
    effects, noise = report["effects"], report["noise"]
    rate = report["perturbed_cells_per_second"]
    n_computed, n_variants = report["n_variants_computed"], report["n_variants"]
    others = "" if n_computed == n_variants else f" ({n_computed:,} of them by this process, now)"
    lines = [f"{n_variants:,} perturbed cells{others}" + ("" if rate is None else f", {rate:,.1f}/s")]
    if noise is not None and effects["n"]:
        lines.append(
            f"effects: {effects['root_mean_square']:.2e} (root mean square), {effects['largest']:.2e} at most; noise "
            f"of order and batches: {noise['root_mean_square']:.1e}, {noise['largest']:.1e} at most; "
            f"{effects['share_above_noise']:.1%} of effects are larger than that"
        )
    if (compared := report.get("compared")) is not None:
        lines.append(
            f"beside the other model: rank correlation {compared['rank_correlation']:.4f} of {compared['n_values']:,} "
            f"effects, differences {compared['root_mean_square']:.1e} (root mean square), {compared['largest']:.1e} at "
            "most"
        )
    return "\n".join(lines)


def identity_of_run(
    question: Question, ready: Prepared, model: Encoder | str | os.PathLike[str], folder: TokenFolder
) -> dict[str, Any]:
    """What decides the values, as JSON."""
    run, encoder, comparison = ready.run, ready.run.encoder, ready.run.comparison
    edits = run.edits
    asked = {
        "kind": edits.kind, "genes": None if edits.genes is None else list(edits.genes), "together": edits.together,
        "pairs": edits.pairs, "anchor": edits.anchor, "doses": list(edits.doses),
        "sets": None if edits.sets is None else [list(each) for each in edits.sets],
        "mode": comparison.mode, "layer": str(question.layer), "official": question.official,
        "token_budget": run.token_budget,
        "set_names": list(ready.sets),
        "screen": question.screen,
        "chosen": None if edits.chosen is None else [list(each) for each in edits.chosen],
        "counts": edits.counts.digests if isinstance(edits, CountEdits) and edits.counts is not None else None,
    }  # fmt: skip
    states: dict[str, Any] | None = None
    if ready.states is not None:
        vectors = {"embeddings": torch.from_numpy(np.ascontiguousarray(ready.states.embeddings))}
        # As they were understood, so that a list and a tuple are the same, and numbers are text.
        roles = StateRoles.of(question.states or {}).to_dict()
        states = {"names": list(ready.states.names), "roles": roles, "fingerprint": fingerprint_of_tensors(vectors)}
    return {
        "tokens": {"name": folder.path.name, "fingerprint": folder.content_fingerprint},
        "model": {
            "name": "Encoder" if isinstance(model, Encoder) else Path(model).name,
            "fingerprint": fingerprint_of_tensors(encoder.state_dict()),
            "config": encoder.config.to_dict(),
            "dtype": str(encoder.dtype).removeprefix("torch."), "quantization": scheme_of(encoder),
            "device": encoder.device.type,
        },
        "options": asked,
        "states": states,
    }  # fmt: skip
