"""What the official package computes (../shared/fixtures/isp), and how to ask for the same here."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from geneformer_fast import Encoder, Vocabulary, load, open_tokens
from geneformer_fast.perturbation.compare import Comparison, Framing
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.engine import CellEffects, PerturbationRun

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
ISP = SHARED / "fixtures" / "isp"
HAS_ISP = (ISP / "index.json").exists()
#: Of the official package's tokens; its values move by 3e-7 with batches and threads.
TOLERANCE = 2e-6
MAX_LEN = 64

#: (rank, or place among the cells with the list; state; perturbed tokens; affected token, or -1) -> value.
Values = dict[tuple[Any, str, tuple[int, ...], int], float]


@functools.cache
def index() -> dict[str, dict[str, Any]]:
    """The scenarios, by name."""
    return json.loads((ISP / "index.json").read_text())["scenarios"] if HAS_ISP else {}


@functools.cache
def model(version: str) -> Encoder:
    """The tiny model of a version, ``"V1"`` or ``"V2"``."""
    return load(ISP / f"model_{version.lower()}", dtype="float32", device="cpu").eval()


@functools.cache
def vocabulary(version: str) -> Vocabulary:
    return Vocabulary.from_folder(SHARED / "data" / "dicts", version.lower())


def cells_folder(version: str) -> Path:
    return ISP / f"cells_{version.lower()}.dataset"


@dataclass(frozen=True)
class Asked:
    """A scenario in our words."""

    version: str
    edits: Edits
    comparison: Comparison
    layer: str
    cells: np.ndarray
    lengths: np.ndarray
    states: tuple[str, ...]
    anchor: int | None

    def run(self, encoder: Encoder | None = None, **options: Any) -> PerturbationRun:
        folder = open_tokens(cells_folder(self.version))
        return PerturbationRun(
            encoder or model(self.version), self.edits, self.comparison, self.layer, self.lengths,
            lambda ranks: folder.read(self.cells[ranks]), **options,
        )  # fmt: skip

    def values(self, pieces: Iterator[CellEffects]) -> Values:
        """What the engine gives, under the official keys: a pair is called by the gene that is not the anchor."""
        found: Values = {}
        for piece in pieces:
            effects = piece.effects
            keys = [tuple(t for t in row if t >= 0 and t != self.anchor) for row in piece.perturbed.tolist()]
            for place, key in enumerate(keys):
                for number, value in enumerate(effects.cell[place].tolist()):
                    found[piece.rank, self.states[number] if self.states else "", key, -1] = value
            if effects.genes is not None:
                rows = zip(effects.variant.tolist(), effects.affected.tolist(), effects.genes.tolist(), strict=True)
                for place, affected, value in rows:
                    found[piece.rank, "", keys[place], affected] = value
        return found


@functools.cache
def asked(name: str) -> Asked:
    """What a scenario asks for."""
    scenario = index()[name]
    version, options = scenario["version"], scenario["options"]
    tokens, is_v2 = vocabulary(version).token_ids, version == "V2"
    named, roles = options.get("genes_to_perturb", "all"), options.get("cell_states_to_model")
    genes = None if named == "all" else tuple(tokens[gene] for gene in named)
    # The anchor is dropped where states are modelled (faults 5 of the README beside the fixtures).
    anchor = tokens[options["anchor_gene"]] if options.get("anchor_gene") and not roles else None
    front = back = int(is_v2)
    edits = Edits(
        options["perturb_type"], genes, together=genes is not None, anchor=anchor, front=front, back=back,
        max_len=MAX_LEN,
    )  # fmt: skip
    states = (roles["start_state"], roles["goal_state"], *roles["alt_states"]) if roles else ()
    embeddings = None
    if roles:
        stored = json.loads((ISP / "outputs" / f"{options['state_embs']}.json").read_text())
        embeddings = torch.tensor([stored[state] for state in states])
    mode = "cell" if anchor is not None and not is_v2 else options["emb_mode"]
    cells, lengths = _cells(version, options, edits)
    layer = "last" if options.get("emb_layer", -1) == 0 else "penultimate"
    return Asked(
        version, edits, Comparison(mode, Framing(front, back), embeddings), layer, cells, lengths, states, anchor
    )


def _cells(version: str, options: dict[str, Any], edits: Edits) -> tuple[np.ndarray, np.ndarray]:
    """Cells and their lengths by rank, by the rules of the README beside the fixtures."""
    folder = open_tokens(cells_folder(version))
    lengths, cells = folder.lengths(), np.arange(folder.n_cells)
    wanted = dict(options.get("filter_data") or {})
    if roles := options.get("cell_states_to_model"):
        wanted[roles["state_key"]] = [roles["start_state"]]
    for column, values in wanted.items():
        cells = cells[np.isin(np.array(folder.column(column).to_pylist())[cells], values)]
    needed = set(edits.genes or ()) if edits.kind == "delete" else set()
    needed |= {edits.anchor} - {None}
    cells = cells[[needed <= set(folder.read([cell])[0].tolist()) for cell in cells]]
    most = options.get("max_ncells")
    if most is not None and most < len(cells):
        cells = cells[np.random.default_rng(42).permutation(len(cells))[:most]]
    cells = cells[np.argsort(-lengths[cells], kind="stable")]
    window = options.get("cell_inds_to_perturb")
    cells = cells[window["start"] : window["end"]] if window else cells
    return cells, lengths[cells]


def raw_scenarios() -> list[str]:
    """Names of those with values."""
    return [
        name
        for name, scenario in index().items()
        if scenario["kind"] == "isp" and (scenario.get("file") or (ISP / "corrected" / f"{name}.parquet").exists())
    ]


def expected(name: str, *, official: bool = False) -> Values:
    """The values of a scenario: what is right, or what the official package writes."""
    corrected = ISP / "corrected" / f"{name}.parquet"
    path = corrected if corrected.exists() and not official else ISP / "outputs" / f"{name}.parquet"
    table = pq.read_table(path).to_pydict()
    found: Values = {}
    for row in range(len(table["rank"])):
        rank: Any = table["rank"][row]
        place = ("place", table["item"][row]) if rank < 0 else rank
        key = tuple(map(int, table["perturbed"][row].split()))
        found[place, table["state"][row], key, table["affected"][row]] = table["value"][row]
    return found


def by_place(values: Values) -> Values:
    """With places in a list instead of ranks: which of the cells that have this key, by rank, each is."""
    counts: dict[Any, int] = defaultdict(int)
    found: Values = {}
    for rank, *key in sorted(values, key=lambda key: key[0]):
        found[("place", counts[tuple(key)]), *key] = values[rank, *key]  # type: ignore[index]
        counts[tuple(key)] += 1
    return found


def largest_difference(found: Values, wanted: Values) -> float:
    """Between values under the same keys; the keys must agree."""
    if any(isinstance(key[0], tuple) for key in wanted):
        found = by_place(found)
    missing, further = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    assert not missing, sorted(missing, key=str)[:3]
    assert not further, sorted(further, key=str)[:3]
    return max(abs(found[key] - wanted[key]) for key in wanted)
