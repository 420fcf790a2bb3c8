"""The public function: what becomes of cells when genes are deleted, switched on or moved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import load
from geneformer_fast.config import warn_if_emulated
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.extract.cells import asked_columns
from geneformer_fast.perturbation.folder import check_state
from geneformer_fast.perturbation.plan import Plan
from geneformer_fast.perturbation.question import Prepared, Question, prepared
from geneformer_fast.perturbation.rows import OWN, RowSchema, plain
from geneformer_fast.perturbation.running import DOSE, SET, identity_of_run, in_memory, into_folder, timed
from geneformer_fast.perturbation.shards import Shard
from geneformer_fast.perturbation.store import RunCells
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.vocabulary import Vocabulary
from geneformer_fast.training.distributed import local_device, process_group

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData

#: Columns of a token folder that say where a cell is, not what it is.
_PLACES = ("input_ids", "length", "source_file", "source_row")


@checked
def perturb(
    tokens: str | os.PathLike[str],
    model: Encoder | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    kind: str = "delete",
    genes: str | int | Sequence[str | int] = "all",
    together: bool = False,
    pairs: bool = False,
    anchor: str | int | None = None,
    sets: str | os.PathLike[str] | Mapping[str, Sequence[str | int]] | Sequence[Sequence[str | int]] | None = None,
    doses: float | Sequence[float] | None = None,
    screen: str | None = None,
    best: int | None = None,
    counts: AnnData | str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    mode: str | None = None,
    layer: str | int = "penultimate",
    states: Mapping[str, Any] | None = None,
    state_embeddings: Any = None,
    where: Mapping[str, Any] | None = None,
    max_cells: int | None = None,
    seed: int | None = None,
    window: Sequence[int | None] | None = None,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    obs: str | Mapping[str, str] | Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    workers: int | None = None,
    shard: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    official: bool = False,
    dry_run: bool = False,
    compare: str | os.PathLike[str] | Encoder | None = None,
    progress: bool | None = None,
) -> pandas.DataFrame | Path | Plan:
    """What becomes of cells when genes are deleted, switched on or moved in rank.

    Parameters
    ----------
    tokens
        Token folder: one that ``tokenize`` made, or Geneformer's own tokenizer.
    model
        Checkpoint folder, or an :class:`Encoder`.
    out
        Folder for the values, which is made: Parquet files with a row for every perturbed cell, and state and gene
        where there are several. None returns them in memory.
    kind
        ``"delete"``: without the gene. ``"overexpress"``: the gene in front of all others. ``"activate"`` and
        ``"inhibit"``: the gene moved up or down by a share of the cell's ranks, ``doses``. ``"swap"``: two genes in
        each other's place. ``"counts"``: the gene's counts multiplied by ``doses``, and the cell ranked again as the
        tokenizer does it; 0 takes the gene out, of the cell's total too.
    genes
        ``"all"``, every gene of each cell by itself; or some: Ensembl ids or symbols, which need a dictionary, or
        tokens.
    together, pairs, anchor, sets
        Several genes at once: the whole list, every pair of it (of each cell's genes without a list), one gene with
        each of the others, or every set: a file (GMT, JSON, or a set of genes per line), a mapping of
        names to genes, both of which give a column ``set``, or a list of lists. A list is that of cells which have all
        of its genes, unless they are overexpressed; of a set, cells lose or move the genes that they have.
    doses
        Shares of a cell's ranks, above 0 and up to 1, or factors of counts; a perturbed cell for each, and a column
        ``dose``.
    screen, best
        ``"gradient"``: estimate the deletion, or overexpression, of every gene of every cell from a few backward
        passes per cell, and compute only so many genes (None is 100) whose mean effect, on the goal where there is one,
        is estimated to be largest, in the cells that have them. With ``pairs`` so many pairs, of the genes with the
        largest effects by themselves (four for every pair, at least 256); with an ``anchor`` so many genes beside it.
        The report has the estimates.
    counts
        What the tokens were made of, for the kind ``"counts"``: an AnnData, or files in the order of the token folder's
        inputs. None takes the files that the folder names. Counts that do not give its tokens are refused.
    mode
        What is compared: ``"cls"``, the CLS tokens; ``"cell"``, the cell by its genes; ``"cls_and_gene"`` and
        ``"cell_and_gene"``, the hidden states of all other genes as well. None: ``"cls"`` where the vocabulary has that
        token (Geneformer V2), else ``"cell"``.
    layer
        Whose hidden states: ``"penultimate"`` (the official default), ``"last"``, ``"embeddings"`` or a block from 0.
    states
        Towards which states cells move: ``{"column": "cell_type", "start": "NK", "goal": "B", "alternatives": ["T"]}``.
        Cells of the start are perturbed. Values are then the cosine with each state's embedding after the edit, less
        the one before: positive towards it. None: values are similarities with the cell itself, 1 for no change.
    state_embeddings
        A file of :func:`geneformer_fast.state_embeddings` or (.pkl) of Geneformer's extractor, what the former
        returned, or vectors by name. None makes them of the same tokens: the mean of at most 1,000 cells of each state.
    where, max_cells, seed, window
        Which cells: those with some values in columns of obs, at most so many of them, drawn by the seed (None is 42,
        as in the official tool), and of these ``(start, stop)``, the longest first.
    dictionary
        Folder of gene dictionaries, or a :class:`Vocabulary`. None looks for ``vocabulary.json`` in the model's folder;
        where there is none tokens serve, and the ids of genes stay empty.
    obs
        Columns that go into the rows; None takes all that the tokens carry.
    dtype, device, token_budget
        As in :func:`geneformer_fast.embed`.
    workers
        Most batches at a time on a CPU; None is one for each core. Values do not depend on it.
    shard
        ``"i/N"``: every Nth cell, from the ith on; the folders of all shards are read together.
    resume
        Go on with a folder whose run was interrupted; it ends as if it had not been.
    overwrite
        Whether ``out`` may exist, and is replaced.
    official
        What the official tool writes, also where it is wrong: with genes' values an overexpressed gene's neighbours
        bear each other's names, an anchor is dropped where there are states, and near the model's limit a list that is
        overexpressed shortens the cell that it is compared with by too many genes (but of a V1 cell's own similarity
        padding is no part, which there depends on the other cells of a batch).
    dry_run
        Return what the run will be, and do nothing of it.
    compare
        What the report says effects agree with, on variants of some cells: ``"float32"``, the same model in float32; or
        a checkpoint folder or :class:`Encoder`, such as the model before it was quantized. None compares nothing.
    progress
        Whether to show a progress bar; None shows one on a terminal, and lines of the log elsewhere.

    Returns
    -------
    pandas.DataFrame, Path or Plan
        With ``out`` its path. Else a table with the columns ``cell`` (row of the token folder), ``tokens`` and
        ``genes`` (perturbed, in order), ``affected`` (token of the gene that is compared; missing for the cell itself),
        ``state``, ``value`` and what is carried. With ``dry_run`` the plan, whose ``text()`` says it in
        words.

    Raises
    ------
    UnsupportedError, InputError, VocabularyError
        What is asked for cannot be: no such gene or state, no cell left, options that exclude each other.
    OutputError
        ``out`` holds something else, or another run.
    CheckpointError
        As ``load`` raises it.

    References
    ----------
    Theodoris et al., Nature 618 (2023).
    """
    question = Question(
        kind, genes, together, pairs, anchor, sets, doses, mode, layer, states, state_embeddings, where, max_cells,
        seed, _window(window), official, counts, screen, best,
    )  # fmt: skip
    question.check()
    for name, number in (("token_budget", token_budget), ("workers", workers)):
        if number is not None and number < 1:
            raise UnsupportedError(f"{name} must be at least 1, not {number}")
    if isinstance(model, Encoder) and (dtype != "auto" or device is not None):
        raise UnsupportedError("dtype and device are of a model that is loaded; an Encoder has its own: leave them out")
    if out is not None and not dry_run:
        check_state(Path(out), resume=resume, overwrite=overwrite)  # before what takes long; the writer looks again
    part, place = Shard.of(shard), model.device if isinstance(model, Encoder) else local_device(device)
    if out is None and (resume or overwrite or compare is not None or not part.is_whole):
        raise UnsupportedError("resume, overwrite, compare and shard are of a folder: say where with out")
    if compare == "float32" and isinstance(model, Encoder):
        raise UnsupportedError("compare 'float32' loads the model once more: give its folder, or another encoder")
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(process_group(place))
        if out is None and ranks.world_size > 1:
            raise UnsupportedError("several processes write into a folder: say where with out (--out)")
        encoder = model.eval() if isinstance(model, Encoder) else load(model, dtype=dtype, device=place)
        if isinstance(model, Encoder):
            warn_if_emulated(encoder.dtype, encoder.device)
        folder = stack.enter_context(open_tokens(tokens))
        shown = progress if ranks.is_first else False
        ready = prepared(
            question, folder, encoder, model, dictionary, part, ranks, token_budget=token_budget, workers=workers,
            progress=shown,
        )  # fmt: skip
        if dry_run:
            return timed(ready.run, ready.plan)
        carried = _carried(folder, ready.plan, obs)
        rows = _schema(ready, carried)
        if out is None:
            return in_memory(ready, rows, carried, official=official).to_pandas()
        cells = RunCells(
            ready.plan.chosen.cells, ready.plan.chosen.lengths, ready.plan.n_rows,
            None if part.is_whole else ready.ranks, None if part.is_whole else ready.n_cells, carried,
        )  # fmt: skip
        identity = identity_of_run(question, ready, model, folder)
        opening = {"plan": identity, "rows": rows, "shard": part, "resume": resume, "overwrite": overwrite}
        beside = _beside(compare, model, place) if ranks.is_first else None
        into_folder(Path(out), cells, ready, ranks, opening, beside, official=official)
    return Path(out)


def _beside(
    compare: str | os.PathLike[str] | Encoder | None, model: Encoder | str | os.PathLike[str], place: torch.device
) -> Encoder | None:
    """The model whose effects are computed beside those of the run."""
    if compare is None or isinstance(compare, Encoder):
        return compare
    folder = model if compare == "float32" and not isinstance(model, Encoder) else Path(compare)
    assert not isinstance(folder, Encoder)
    return load(folder, dtype="float32", device=place).eval()


def _window(window: Sequence[int | None] | None) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if len(window) != 2:
        raise UnsupportedError(f"window (--window) is (start, stop), not {len(window)} numbers")
    return window[0], window[1]


def _carried(
    folder: TokenFolder, plan: Plan, obs: str | Mapping[str, str] | Sequence[str] | None
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Columns of obs that go into the rows, of the cells of a plan by rank."""
    there = [each.name for each in folder.schema if not pa.types.is_nested(each.type) and each.name not in _PLACES]
    # All that is there keeps its name, but for those that a column of ours has.
    everything = {name: f"obs_{name}" if name in (*OWN, DOSE, SET) else name for name in there}
    asked = everything if obs is None else asked_columns(obs)
    absent = next((name for name in asked if name not in there), None)
    if absent is not None:
        raise InputError(
            f"{folder.path} carries no column {absent!r}; there are {', '.join(there) or 'none'}. Carry it along with "
            f"tokenize --obs {absent}"
        )
    return {name: plain(folder.column(old).take(pa.array(plan.chosen.cells))) for old, name in asked.items()}


def _schema(ready: Prepared, carried: Mapping[str, pa.Array | pa.ChunkedArray]) -> RowSchema:
    extra = {DOSE: pa.float32()} if ready.run.edits.doses else {}
    if ready.sets:
        extra[SET] = pa.string()
    names = () if ready.states is None else ready.states.names
    return RowSchema(names, ready.names.ids(), extra, {name: column.type for name, column in carried.items()})
