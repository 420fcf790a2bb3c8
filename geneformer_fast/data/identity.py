"""Which vocabulary the tokens of a folder belong to."""

from __future__ import annotations

import itertools
from typing import Any

from geneformer_fast import families
from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.stored import StoredCells, without_padding
from geneformer_fast.data.values import ValueCells, cells_of_folder, check_model, check_ranked, preparation_in
from geneformer_fast.errors import VocabularyError
from geneformer_fast.families.family import TokenLayout
from geneformer_fast.tokenization.arrow import TokenFolder

# Enough to see whether the cells of a folder begin with CLS and end with EOS.
_CELLS_LOOKED_AT = 64


def identity_of(folder: TokenFolder, config: EncoderConfig) -> dict[str, Any]:
    """The vocabulary of a folder's tokens, after making sure that a model reads it.

    From then on the folder gives its cells as that model may read them: padding after the genes is left out with a
    warning, and special tokens in places where none may be are refused (:class:`StoredCells`). Cells of a family that
    reads values are expanded to what the model reads (:class:`~geneformer_fast.data.values.ValueCells`).

    Parameters
    ----------
    folder
        The tokens. Where their folder does not say which vocabulary made them (the official tokenizer's does not), they
        are taken for the model's, if that is a published one and its special tokens are where they should be.
    config
        The model's.

    Raises
    ------
    VocabularyError
        The tokens belong to another vocabulary, or nobody knows to which.
    """
    if preparation_in(folder) is not None:
        assert folder.vocabulary is not None
        check_model(folder.vocabulary, config)
        if not isinstance(folder.on_read, ValueCells):
            folder.on_read = cells_of_folder(folder)
        return dict(folder.vocabulary)
    identity = dict(folder.vocabulary or _assumed(config, folder))
    check_ranked(identity, config)
    config.check_vocabulary(identity)
    if getattr(folder.on_read, "special", None) != identity["special"]:
        folder.on_read = StoredCells(folder, identity["special"])
    return identity


def _assumed(config: EncoderConfig, folder: TokenFolder) -> dict[str, Any]:
    published = families.layout_of_vocabulary(config.vocabulary)
    if published is None:
        raise VocabularyError(
            f"{folder.path} does not say which vocabulary made its tokens, and the model's is no published one; "
            "tokenize with geneformer-fast, which writes that down"
        )
    name, layout = published
    others = [each for each in families.layouts().values() if each.is_framed and each is not layout]
    framing = next((each for each in others if _lie_in(folder, each)), None)
    is_fitting = _lie_in(folder, layout) if "cls" in layout.special else framing is None
    if not is_fitting:
        found = "no CLS first and EOS last" if layout.is_framed else "no CLS first"
        if framing is not None:
            found = f"CLS first and EOS last, as {framing.published} has them"
        raise VocabularyError(
            f"{folder.path} does not say which vocabulary made its tokens; its cells have {found}, but the model reads "
            f"{config.vocabulary}. Tokenize again with the dictionary that belongs to the model."
        )
    special, n_tokens = dict(layout.special), layout.n_tokens
    return {"name": config.vocabulary, "family": name, "special": special, "n_tokens": n_tokens, "fingerprint": None}


def _lie_in(folder: TokenFolder, layout: TokenLayout) -> bool:
    """Whether the first cells begin, and end, with the special tokens of a layout."""
    special = layout.special
    stored = folder.read_stored(range(min(folder.n_cells, _CELLS_LOOKED_AT)))
    _, values, bounds = without_padding(*stored, special["pad"])
    cells = [values[start:stop] for start, stop in itertools.pairwise(bounds) if stop > start]
    ends = [(at, special[name]) for at, name in ((0, "cls"), (-1, "eos")) if name in special]
    return bool(cells) and all(cell[at] == token for cell in cells for at, token in ends)
