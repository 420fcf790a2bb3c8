"""The official perturber by its own names: its arguments, what they are called here, and the files that it writes.

Geneformer's ``InSilicoPerturber(...).perturb_data(model, tokens, folder, prefix)`` is
``perturb_official(model, tokens, folder, prefix, ...)``.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geneformer_fast.arguments import checked
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.perturbation.official_files import write_official
from geneformer_fast.perturbation.perturb import perturb
from geneformer_fast.perturbation.reading import open_perturbations
from geneformer_fast.tokenization.pickles import read_pickle
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: What each argument of the perturber is called by :func:`geneformer_fast.perturb`; None where nothing is left to say.
NAMES: dict[str, str | None] = {
    "perturb_type": "kind",
    "perturb_rank_shift": "doses",
    "genes_to_perturb": "genes",
    "combos": "pairs",
    "anchor_gene": "anchor",
    "model_type": None,
    "num_classes": None,
    "emb_mode": "mode",
    "cell_emb_style": None,
    "filter_data": "where",
    "cell_states_to_model": "states",
    "state_embs_dict": "state_embeddings",
    "max_ncells": "max_cells",
    "cell_inds_to_perturb": "window",
    "emb_layer": "layer",
    "forward_batch_size": None,
    "nproc": None,
    "model_version": None,
    "token_dictionary_file": "dictionary",
    "clear_mem_ncells": None,
}
#: Arguments without any effect on values, by their defaults, and why there is nothing to do.
_IDLE: dict[str, tuple[Any, str]] = {
    "model_type": ("Pretrained", "no head is computed, so any checkpoint with the encoder serves"),
    "num_classes": (0, "no head is computed"),
    "forward_batch_size": (100, "batches are made by tokens: token_budget"),
    "nproc": (4, "nothing is mapped by processes: workers"),
    "clear_mem_ncells": (1000, "memory is bounded by token_budget"),
}
#: Arguments of :func:`geneformer_fast.perturb` that :func:`perturb_official` has by itself, or that give no folder.
_NO_OPTIONS = ("tokens", "model", "out", "dictionary", "official", "overwrite", "resume", "dry_run")
_LAYERS = {0: "last", -1: "penultimate"}
_STATES = {"state_key": "column", "start_state": "start", "goal_state": "goal", "alt_states": "alternatives"}
# A quartile of a cell's ranks.
_SHARE = 0.25


def arguments_of(
    *,
    perturb_type: str = "delete",
    perturb_rank_shift: int | None = None,
    genes_to_perturb: str | Sequence[str] = "all",
    combos: int = 0,
    anchor_gene: str | None = None,
    model_type: str = "Pretrained",
    num_classes: int = 0,
    emb_mode: str = "cls",
    cell_emb_style: str = "mean_pool",
    filter_data: Mapping[str, Any] | None = None,
    cell_states_to_model: Mapping[str, Any] | None = None,
    state_embs_dict: Mapping[str, Any] | None = None,
    max_ncells: int | None = None,
    cell_inds_to_perturb: str | Mapping[str, int] = "all",
    emb_layer: int = -1,
    forward_batch_size: int = 100,
    nproc: int = 4,
    model_version: str = "V2",
    token_dictionary_file: str | os.PathLike[str] | None = None,
    clear_mem_ncells: int = 1000,
) -> dict[str, Any]:
    """What :func:`geneformer_fast.perturb` takes in place of the perturber's arguments, which have their names.

    Raises
    ------
    UnsupportedError
        An argument has a value that the perturber does not know.
    VocabularyError
        A gene has no token in ``token_dictionary_file``.
    """
    _check("perturb_type", perturb_type, ("delete", "overexpress", "inhibit", "activate"))
    _check("combos", combos, (0, 1))
    _check("emb_mode", emb_mode, ("cls", "cell", "cls_and_gene", "cell_and_gene"))
    _check("cell_emb_style", cell_emb_style, ("mean_pool",))
    _check("emb_layer", emb_layer, tuple(_LAYERS))
    _check("model_version", model_version, ("V1", "V2"))
    _say_idle(
        model_type=model_type, num_classes=num_classes, forward_batch_size=forward_batch_size, nproc=nproc,
        clear_mem_ncells=clear_mem_ncells,
    )  # fmt: skip
    is_all = isinstance(genes_to_perturb, str) and genes_to_perturb == "all"
    if not is_all and (combos or anchor_gene is not None):
        _warn("combos and anchor_gene are left out, since genes_to_perturb is a list, which is perturbed together")
        combos, anchor_gene = 0, None
    if combos and anchor_gene is None:
        raise UnsupportedError(
            "combos=1 needs an anchor_gene; for all pairs of some genes call geneformer_fast.perturb with pairs=True"
        )
    if not combos and anchor_gene is not None:
        raise UnsupportedError("anchor_gene needs combos=1, as in the official perturber")
    if model_version == "V1" and emb_mode.startswith("cls"):
        _warn(f"emb_mode {emb_mode!r} is 'cell' for V1, which has no CLS token")
        emb_mode = emb_mode.replace("cls", "cell")
    if anchor_gene is not None and emb_mode == "cell_and_gene":
        _warn("emb_mode is 'cell', since the official perturber compares no genes with an anchor_gene")
        emb_mode = "cell"
    tokens = None if token_dictionary_file is None else _tokens(Path(token_dictionary_file))
    return {
        "kind": perturb_type,
        "doses": _dose(perturb_type, perturb_rank_shift),
        "genes": "all" if is_all else [_gene(gene, tokens) for gene in _listed(genes_to_perturb)],
        "together": not is_all,
        "anchor": None if anchor_gene is None else _gene(anchor_gene, tokens),
        "mode": emb_mode,
        "layer": _LAYERS[emb_layer],
        "where": dict(filter_data) if filter_data else None,
        "states": None if cell_states_to_model is None else _roles(cell_states_to_model),
        "state_embeddings": state_embs_dict,
        "max_cells": max_ncells,
        "window": _window(cell_inds_to_perturb),
    }


@checked
def perturb_official(
    model_directory: str | os.PathLike[str],
    input_data_file: str | os.PathLike[str],
    output_directory: str | os.PathLike[str],
    output_prefix: str,
    *,
    official: bool = False,
    pickles: bool = True,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    overwrite: bool = False,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Path:
    """What Geneformer's ``InSilicoPerturber`` does, asked by its arguments.

    Parameters
    ----------
    model_directory, input_data_file
        Checkpoint folder, and token folder.
    output_directory, output_prefix
        Where pickles go and what they are called. The Parquet files lie in a folder of the prefix's name within.
    official
        What the perturber writes, also where it is wrong, as in :func:`geneformer_fast.perturb`.
    pickles
        Whether pickles are written, for programs that read the perturber's.
    dictionary, overwrite, resume
        As in :func:`geneformer_fast.perturb`.
    options
        Further arguments of :func:`geneformer_fast.perturb`, such as ``{"dtype": "bfloat16", "token_budget": 32768}``.
    **arguments
        Of ``InSilicoPerturber``, with its names, defaults and values.

    Returns
    -------
    Path
        The folder of Parquet files, for :func:`geneformer_fast.open_perturbations`.

    Raises
    ------
    UnsupportedError
        There is no such argument, or it has a value that the perturber does not know.
    GeneformerFastError
        As :func:`geneformer_fast.perturb` raises it.
    """
    if unknown := next((name for name in arguments if name not in NAMES), None):
        raise UnsupportedError(f"InSilicoPerturber has no argument {unknown!r}; it has {', '.join(NAMES)}")
    if not output_prefix or Path(output_prefix).name != output_prefix:
        raise UnsupportedError(f"output_prefix is what files are called, without folders, not {output_prefix!r}")
    asked = arguments_of(**arguments)
    more = dict(options or {})
    if twice := next((name for name in more if asked.get(name) is not None), None):
        raise UnsupportedError(f"options: {twice} is given by an argument of InSilicoPerturber too; leave one out")
    known = [name for name in inspect.signature(perturb).parameters if name not in _NO_OPTIONS]
    if odd := next((name for name in more if name not in known), None):
        raise UnsupportedError(f"options: {odd!r} is none of them; there are {', '.join(known)}")
    folder = Path(output_directory)
    out = perturb(
        input_data_file, model_directory, folder / output_prefix, dictionary=dictionary, official=official,
        overwrite=overwrite, resume=resume, **{**asked, **more},
    )  # fmt: skip
    assert isinstance(out, Path)
    if pickles:
        write_official(open_perturbations(out), folder, output_prefix, overwrite=overwrite or resume)
    return out


def _check(name: str, value: Any, known: Sequence[Any]) -> None:
    if isinstance(value, bool) or value not in known:
        raise UnsupportedError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def _say_idle(**values: Any) -> None:
    """Name the arguments that would do nothing."""
    said = [f"{name} ({_IDLE[name][1]})" for name, value in values.items() if value != _IDLE[name][0]]
    if said:
        _warn(f"not needed here, and left out: {', '.join(said)}")


def _warn(text: str) -> None:
    warnings.warn(f"InSilicoPerturber: {text}", UserWarning, stacklevel=4)


def _dose(kind: str, shift: int | None) -> float | None:
    """A rank shift of so many quartiles, as a share of the ranks."""
    if kind in ("delete", "overexpress"):
        if shift is not None:
            raise UnsupportedError(f"perturb_rank_shift is of 'inhibit' and 'activate'; {kind!r} has none")
        return None
    _check("perturb_rank_shift", shift, (1, 2, 3))
    return _SHARE * (shift or 0)


def _listed(genes: str | Sequence[str]) -> list[str]:
    if isinstance(genes, str):
        raise UnsupportedError(f"genes_to_perturb must be 'all' or a list of Ensembl ids, not {genes!r}")
    return list(genes)


def _tokens(path: Path) -> dict[str, Any]:
    tokens = read_pickle(path)
    if not isinstance(tokens, dict):
        raise VocabularyError(f"{path} holds no dictionary of tokens")
    return tokens


def _gene(gene: str, tokens: Mapping[str, Any] | None) -> str | int:
    """The token of a gene where a dictionary is given, else its name."""
    if tokens is None:
        return gene
    if gene not in tokens:
        raise VocabularyError(f"gene {gene!r} has no token in token_dictionary_file; leave it out")
    return int(tokens[gene])


def _roles(states: Mapping[str, Any]) -> dict[str, Any]:
    known = {_STATES[name]: value for name, value in states.items() if name in _STATES and value is not None}
    odd = [name for name in states if name not in _STATES]
    missing = [name for name in ("state_key", "start_state", "goal_state") if _STATES[name] not in known]
    if odd or missing:
        what = f"{odd[0]!r} is none of them" if odd else f"{missing[0]!r} is missing"
        raise UnsupportedError(f"cell_states_to_model has the keys {', '.join(map(repr, _STATES))}; {what}")
    return known


def _window(cells: str | Mapping[str, int]) -> tuple[int, int] | None:
    if isinstance(cells, str) and cells == "all":
        return None
    if isinstance(cells, str) or set(cells) != {"start", "end"}:
        raise UnsupportedError("cell_inds_to_perturb must be 'all' or {'start': ..., 'end': ...}")
    return cells["start"], cells["end"]
