"""What a family of models is: what is true of its checkpoints, its cells and its authors' ways, in one record.

Nothing here imports torch, and what a family brings of it is loaded when it is used: the tokenization pass asks for
special tokens and runs without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from geneformer_fast.checkpoints.mapping import Entry
    from geneformer_fast.config import EncoderConfig
    from geneformer_fast.encoder import Encoder
    from geneformer_fast.tokenization.dictionaries import Contents, Release


@dataclass(frozen=True)
class TokenLayout:
    """How a vocabulary of ranked genes puts a cell into tokens.

    Attributes
    ----------
    special
        Special token to id: ``pad``, ``mask`` and, where there are such, ``cls`` (before the genes), ``eos`` (after
        them), ``sep``, ``unk``.
    max_len
        Longest cell, specials included.
    published
        Name of the published vocabulary, such as ``"geneformer-v2"``, which its dictionaries carry and models name.
    fingerprint
        SHA-256 of the published dictionaries (:attr:`geneformer_fast.Vocabulary.fingerprint`): nothing else carries
        their name. None: nobody has them here.
    n_rows
        Rows of the token table by which a stock ``config.json`` of BERT is told to read this vocabulary; None where
        the number tells nothing.
    n_tokens
        Ids of the published vocabulary, where its models have more rows than that; None: as many as a model has rows.
    totals_over_vocabulary
        Whether a cell's total is over the genes of the vocabulary only, not over all.
    ids_dtype
        Integer type of stored tokens, as the official tool writes them.
    files, read
        Names of files that list the tokens, and ``read(file, beside)``, where they do not come in Geneformer's
        dictionaries; ``beside()`` is the dictionaries beside the file, and refuses a folder without medians.
    derived_from, derive
        Name of the layout whose dictionaries it can be made of, and ``derive(dictionaries)``.
    """

    special: Mapping[str, int]
    max_len: int
    published: str
    fingerprint: str | None = None
    n_rows: int | None = None
    n_tokens: int | None = None
    totals_over_vocabulary: bool = False
    ids_dtype: str = "int32"
    files: tuple[str, ...] = ()
    read: Callable[[Path, Callable[[], Release]], Contents] | None = None
    derived_from: str | None = None
    derive: Callable[[Release], Contents] | None = None

    @property
    def is_framed(self) -> bool:
        """Whether a cell lies between two special tokens."""
        return "cls" in self.special and "eos" in self.special


@dataclass(frozen=True)
class Reading:
    """Where the authors of a family read an embedding.

    Attributes
    ----------
    layer
        As in :func:`geneformer_fast.embed`.
    pool
        Name of a pooling rule; None: by the vocabulary (CLS where it has one, else the mean over genes).
    normalise
        Whether embeddings are divided by their length.
    pools
        Rules of pooling that are the family's own: name (in ``extract.pooling.MEANS``) to what it is.
    n_behind
        Positions behind a cell's genes that stand for none, and are in no mean over genes (depth tokens of AIDO.Cell).
    """

    layer: str = "penultimate"
    pool: str | None = None
    normalise: bool = False
    pools: Mapping[str, str] = field(default_factory=dict)
    n_behind: int = 0


def _recognises_nothing(_folder: Path) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes
    ----------
    name
        In the registry, such as ``"aido-cell"``; its module is named with ``_`` for ``-``.
    title, paper, licence
        What people call it, where it is published, and under what terms its weights are: for model cards, docs and
        ``geneformer-fast doctor``.
    presets
        Published models: name to configuration.
    other_names
        Names that others have for these models, in lower case and with ``-`` for ``_``, to those of presets.
    layouts
        Of families that read ranked genes: the name under which a layout is chosen (``--preset``), and the layout.
    preparation
        Of families that read values: the rules from counts to them (``families.preparation.Preparation``), or a
        function that gives them, so that numpy is loaded by who needs them.
    recipes
        How models were trained: name, a preset's where there is one, to fields of
        :class:`geneformer_fast.training.recipe.Recipe`, batches being those of all GPUs together.
    recognise
        Whether a folder, or a file, holds a checkpoint of the family. Reads names and small JSON, and executes nothing.
    load
        ``load(folder, *, dtype, device, verify)`` -> Encoder; None: as BERT's folders, or ours, are loaded.
    save
        ``save(encoder, folder, *, overwrite)`` -> Path, in the family's own format; None: as BERT, or under our names.
    is_saved
        Whether :attr:`save` can express an encoder; others are saved as without it. None: all of the family.
    entries
        Table of tensors for a configuration and the name of a head.
    input_layer
        What makes the first hidden states; None: what ``config.inputs`` names.
    heads
        Heads that only this family has, or has otherwise: name to ``make(config, n_classes)``.
    reading
        Where its authors read embeddings.
    notes
        What to say once when a checkpoint of the family is loaded, such as that its card contradicts its weights.
    refused
        What cannot be done with it: name of the command (``"perturb"``, ``"pretrain"``, ``"quantize"`` ...) to one
        sentence why not.
    """

    name: str
    title: str
    paper: str
    licence: str
    presets: Mapping[str, EncoderConfig]
    other_names: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, TokenLayout] = field(default_factory=dict)
    preparation: Any = None
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recognise: Callable[[Path], bool] = _recognises_nothing
    load: Callable[..., Encoder] | None = None
    save: Callable[..., Path] | None = None
    is_saved: Callable[[Encoder], bool] | None = None
    entries: Callable[[EncoderConfig, str | None], list[Entry]] | None = None
    input_layer: Callable[[EncoderConfig], nn.Module] | None = None
    heads: Mapping[str, Callable[[EncoderConfig, int], nn.Module]] = field(default_factory=dict)
    reading: Reading = Reading()
    notes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocabularies(self) -> frozenset[str]:
        """Names by which a model of the family says what it reads."""
        named = (config.vocabulary for config in self.presets.values() if config.vocabulary is not None)
        return frozenset({*named, *(layout.published for layout in self.layouts.values())})
