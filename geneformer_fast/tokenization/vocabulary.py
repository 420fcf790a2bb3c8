"""A vocabulary: which genes have tokens, their medians, the special tokens, and who it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast import families
from geneformer_fast.arguments import checked
from geneformer_fast.errors import OutputError, VocabularyError
from geneformer_fast.families.family import TokenLayout
from geneformer_fast.files.checksums import DIGEST, VERIFY, check_digest, with_digest
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json
from geneformer_fast.tokenization.bundled import dictionaries_in
from geneformer_fast.tokenization.dictionaries import SAVED_FILE, checked_numbers, checked_strings, read_contents

if TYPE_CHECKING:
    import numpy as np

_CHANGED = f"restore it, or if it was changed on purpose remove its field {DIGEST} (or set {VERIFY}=0)"
_FORMAT = "geneformer-fast vocabulary"

_MAX_TOKEN_ID = 2**31 - 1
_MAX_LEN = 2**24


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Genes, token ids, medians and special tokens of one Geneformer-like model family.

    Parameters
    ----------
    name
        Who it is: ``"geneformer-v1"``, ``"geneformer-v2"``, ``"bionemo"`` for the published ones, otherwise any name.
    family
        ``"v1"``, ``"v2"`` or ``"bionemo"``: decides the special tokens around a cell and its maximal length.
    token_ids
        Gene id to token id, special tokens excluded.
    medians
        Gene id to median normalised count (float64). Every gene with a token has one; further genes are ignored.
    aliases
        UPPER-CASE id, symbol or retired id to gene id. May be empty: then an id must be a gene id.
    symbols
        Gene name to gene id, for display only.
    special
        ``pad``, ``mask`` and, where the family has them, ``cls``, ``eos``, ``sep``, ``unk``.
    max_len
        Longest token list of a cell, special tokens included.

    Raises
    ------
    VocabularyError
        Duplicate or negative token ids, missing special tokens, missing, zero, negative or NaN medians.
    """

    name: str
    family: str
    token_ids: dict[str, int]
    medians: dict[str, float]
    aliases: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    max_len: int = 0

    def __post_init__(self) -> None:
        layout = layout_named(self.family, where=f"{self.name}: ")
        if not self.special:
            object.__setattr__(self, "special", dict(layout.special))
        if not self.max_len:
            object.__setattr__(self, "max_len", layout.max_len)
        self._check_tokens()
        self._check_medians()

    def __repr__(self) -> str:
        """One line: what is in it would be a million."""
        return (
            f"Vocabulary({self.name!r}, family={self.family!r}, {len(self.token_ids):,} genes, "
            f"max_len={self.max_len}, fingerprint={self.fingerprint[:12]})"
        )

    def _check_tokens(self) -> None:
        missing = [
            key for key in self.layout.special if key in ("pad", "mask", "cls", "eos") and key not in self.special
        ]
        if missing:
            raise VocabularyError(
                f"{self.name}: special tokens missing for family {self.family}: {', '.join(missing)}; "
                f"present are {', '.join(self.special) or 'none'}. Is this the token dictionary of another version?"
            )
        if not self.token_ids:
            raise VocabularyError(f"{self.name}: the token dictionary holds no genes")
        n_special = len(self.special)
        if type(self.max_len) is not int or not n_special < self.max_len <= _MAX_LEN:
            raise VocabularyError(
                f"{self.name}: max_len {_short(self.max_len)} leaves no room for genes, or is above {_MAX_LEN:,}"
            )
        seen: dict[int, str] = {}
        for key, value in (*self.special.items(), *self.token_ids.items()):
            if type(value) is not int or not 0 <= value <= _MAX_TOKEN_ID:
                raise VocabularyError(
                    f"{self.name}: token id of {key!r} is {_short(value)}, expected a non-negative integer"
                )
            if value in seen:
                raise VocabularyError(
                    f"{self.name}: token id {value} is used twice, by {seen[value]!r} and {key!r}; "
                    "every token needs an id of its own"
                )
            seen[value] = key

    def _check_medians(self) -> None:
        missing = [gene for gene in self.token_ids if gene not in self.medians]
        if missing:
            raise VocabularyError(
                f"{self.name}: {len(missing)} of {len(self.token_ids)} genes with a token have no median "
                f"(e.g. {', '.join(missing[:3])}). The token and the median dictionary do not belong together: take "
                "both from the same release (same gc30M / gc95M / gc104M suffix)."
            )
        for gene in self.token_ids:
            median = self.medians[gene]
            if not isinstance(median, float) or not 0.0 < median < math.inf:
                raise VocabularyError(
                    f"{self.name}: the median of {gene} is {median!r}; medians must be positive, finite numbers"
                )

    @property
    def layout(self) -> TokenLayout:
        """What the family says of special tokens, lengths and totals."""
        return families.layout(self.family)

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self.special["pad"]

    @property
    def mask_id(self) -> int:
        """Token id that replaces a masked gene."""
        return self.special["mask"]

    @property
    def cls_id(self) -> int | None:
        """Token id put before the genes, or None (V1)."""
        return self.special.get("cls")

    @property
    def eos_id(self) -> int | None:
        """Token id put after the genes, or None (V1, BioNeMo)."""
        return self.special.get("eos")

    @cached_property
    def n_tokens(self) -> int:
        """Largest token id plus one: the rows an embedding table needs."""
        return max(max(self.token_ids.values()), max(self.special.values())) + 1

    @property
    def gene_capacity(self) -> int:
        """How many genes fit into one cell's tokens."""
        return self.max_len - (self.cls_id is not None) - (self.eos_id is not None)

    @property
    def totals_over_vocabulary(self) -> bool:
        """Whether a cell's total is over the genes of the vocabulary only (BioNeMo), not over all (Geneformer)."""
        return self.layout.totals_over_vocabulary

    @property
    def input_ids_dtype(self) -> np.dtype:
        """Integer type of stored tokens: what the official tool of the family writes, wider if the ids need it."""
        import numpy as np

        own = np.dtype(self.layout.ids_dtype)
        return own if self.n_tokens - 1 <= np.iinfo(own).max else np.dtype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over family, length, special tokens, token ids and medians: what a model has to agree with."""
        return _fingerprint(self.family, self.max_len, self.special, self.token_ids, self.medians)

    def under_public_name(self) -> Vocabulary:
        """Itself, renamed if it is a published pair of token and median dictionaries."""
        published = {each.fingerprint: each.published for each in families.layouts().values() if each.fingerprint}
        object.__setattr__(self, "name", published.get(self.fingerprint, self.name))
        return self

    @cached_property
    def mapping_fingerprint(self) -> str:
        """SHA-256 over the aliases in use: with another mapping the same file gives other tokens to the same model."""
        genes = self.token_ids
        used = sorted(f"{key}\t{gene}\n" for key, gene in self.aliases.items() if key != gene and gene in genes)
        return sha256("".join(used).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The few values that tell vocabularies apart, and where the special tokens are.

        ``name``, ``family``, ``special``, ``n_tokens``, ``fingerprint`` and ``mapping``.
        """
        return {
            "name": self.name,
            "family": self.family,
            "special": dict(self.special),
            "n_tokens": self.n_tokens,
            "fingerprint": self.fingerprint,
            "mapping": self.mapping_fingerprint,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that JSON can hold; `from_dict` is the inverse."""
        return {
            "format": _FORMAT,
            "version": 1,
            "name": self.name,
            "family": self.family,
            "max_len": self.max_len,
            "special": self.special,
            "token_ids": self.token_ids,
            "medians": {gene: self.medians[gene] for gene in self.token_ids},
            "aliases": self.aliases,
            "symbols": self.symbols,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str = "vocabulary") -> Vocabulary:
        """Build from what `to_dict` gave; `where` is named in errors."""
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise VocabularyError(f"{where}: not a vocabulary saved by geneformer_fast")
        if content.get("version") != 1:
            raise VocabularyError(f"{where}: written by a newer geneformer_fast (version {content.get('version')!r})")
        try:
            fields = {
                "name": _text(content["name"], f"{where}: name"),
                "family": _text(content["family"], f"{where}: family"),
                "token_ids": checked_numbers(content["token_ids"], int, f"{where}: token_ids"),
                "medians": checked_numbers(content["medians"], float, f"{where}: medians"),
                "aliases": checked_strings(content["aliases"], f"{where}: aliases"),
                "symbols": checked_strings(content["symbols"], f"{where}: symbols"),
                "special": checked_numbers(content["special"], int, f"{where}: special"),
                "max_len": content["max_len"],
            }
        except KeyError as error:
            raise VocabularyError(f"{where}: the field {error.args[0]!r} is missing; the file is incomplete") from None
        try:
            return cls(**fields)
        except VocabularyError as error:
            raise VocabularyError(f"{where}: {error}") from None

    @classmethod
    @checked
    def from_folder(cls, folder: str | Path, preset: str | None = None) -> Vocabulary:
        """Read a vocabulary from a folder.

        Understood are Geneformer's own files under any of their names (``token_dictionary*``,
        ``gene_median_dictionary*``, optionally ``ensembl_mapping_dict*`` and ``gene_name_id_dict*``; pickles, read
        without executing anything, or JSON), BioNeMo's (``vocab.txt`` or ``geneformer.vocab`` with medians), and what
        `save` writes. So are BioNeMo's where they lie in a ``.nemo`` archive, or in the context of a NeMo 2 folder.

        Parameters
        ----------
        folder
            The folder, or a ``.nemo`` archive.
        preset
            ``"v1"``, ``"v2"`` or ``"bionemo"`` (:func:`geneformer_fast.families.layouts`): which one when the folder
            holds several. ``"bionemo"`` on a folder with Geneformer's V1 dictionaries builds BioNeMo's vocabulary out
            of them.

        Raises
        ------
        VocabularyError
            Nothing usable, several candidates, or dictionaries that do not belong together.
        """
        folder = Path(folder)
        if preset is not None:
            layout_named(preset, what="preset")
        if not folder.is_dir() and not folder.is_file():
            raise VocabularyError(f"{folder}: no such folder; give the folder that holds the gene dictionaries")
        if not (folder / SAVED_FILE).is_file():
            with dictionaries_in(folder) as place:
                if not place.is_dir():
                    raise VocabularyError(f"{folder} is a file; give the folder that holds the gene dictionaries")
                return cls(**vars(read_contents(place, preset))).under_public_name()
        saved = folder / SAVED_FILE
        content = read_json(saved, VocabularyError)
        found = cls.from_dict(content, where=str(saved))
        check_digest(content, saved, VocabularyError, _CHANGED)
        if preset is not None and found.family != preset:
            raise VocabularyError(
                f"{folder}: preset {preset!r} was asked for, but this is {found.name!r} of family "
                f"{found.family!r}; use --preset {found.family}"
            )
        return found

    @classmethod
    @checked
    def from_medians(
        cls,
        medians: Mapping[str, float],
        family: str = families.DEFAULT_LAYOUT,
        *,
        name: str = "custom",
        aliases: Mapping[str, str] | None = None,
        symbols: Mapping[str, str] | None = None,
        max_len: int | None = None,
    ) -> Vocabulary:
        """Make a vocabulary for an own corpus or species: token ids follow the sorted gene ids, after the specials.

        Parameters
        ----------
        medians
            Gene id to median of its non-zero normalised counts, all positive.
        family
            Which layout of special tokens and length to use.
        name
            What the vocabulary is called in manifests and errors.
        aliases, symbols, max_len
            As in the class; by default no aliases, no names, the family's length.
        """
        layout = layout_named(family)
        special = dict(layout.special)
        first = len(special)
        return cls(
            name=name,
            family=family,
            token_ids={gene: first + i for i, gene in enumerate(sorted(medians))},
            medians={gene: float(median) for gene, median in medians.items()},
            aliases={key.upper(): gene for key, gene in (aliases or {}).items()},
            symbols=dict(symbols or {}),
            special=special,
            max_len=max_len or layout.max_len,
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``vocabulary.json`` into `folder` (made if needed), for `from_folder` to read back unchanged.

        Returns
        -------
        Path
            The file written. It appears whole or not at all.
        """
        path = Path(folder) / SAVED_FILE
        write_json(path, with_digest(self.to_dict()), indent=None)
        return path

    def check_same(self, other: Vocabulary | Mapping[str, Any], *, what: str = "model") -> None:
        """Raise VocabularyError, naming both, unless `other` (a vocabulary or an identity) is this vocabulary."""
        theirs = other.identity() if isinstance(other, Vocabulary) else other
        check_same(self.identity(), theirs, first="tokens", second=what)


def check_vocabulary_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder in which no vocabulary may be saved."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is no folder; name another one")
    if (folder / SAVED_FILE).exists() and not overwrite:
        raise OutputError(f"{folder} holds a vocabulary already; name another folder or pass --overwrite")


def layout_named(family: str, *, what: str = "family", where: str = "") -> TokenLayout:
    """The layout of a family's tokens; in the error, ``what`` is the name of the option and ``where`` begins it.

    Raises
    ------
    VocabularyError
        There is none of this name.
    """
    known = families.layouts()
    if family not in known:
        raise VocabularyError(f"{where}unknown {what} {family!r}; use one of {', '.join(known)}")
    return known[family]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise VocabularyError(f"{where} is {_short(value)}, expected text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fingerprint(
    family: str, max_len: int, special: Mapping[str, int], token_ids: Mapping[str, int], medians: Mapping[str, float]
) -> str:
    rows = [f"{token}\t{gene}\t{float(medians[gene]).hex()}\n" for gene, token in token_ids.items()]
    rows.sort()
    return sha256(f"{family}\t{max_len}\t{sorted(special.items())}\n{''.join(rows)}".encode()).hexdigest()


def check_same(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, first: str = "tokens", second: str = "model"
) -> None:
    """Refuse to mix two vocabularies.

    Parameters
    ----------
    ours, theirs
        Identities as `Vocabulary.identity` gives them. A value that is missing or None on either side is not compared,
        so a checkpoint that knows only its family or number of tokens can be checked too.
    first, second
        What the two belong to, for the message.

    Raises
    ------
    VocabularyError
        Naming both vocabularies and the first value in which they differ.
    """
    for key in ("fingerprint", "name", "family", "n_tokens"):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            continue
        if key == "fingerprint" and a == b:
            return
        if a != b:
            raise VocabularyError(
                f"the {first} were made with vocabulary {_describe(ours)}, the {second} belongs to "
                f"{_describe(theirs)}: {key} differs. Tokenize again with the dictionaries of the {second}."
            )


def _describe(identity: Mapping[str, Any]) -> str:
    name = identity.get("name") or identity.get("family") or "unnamed"
    parts = []
    if identity.get("n_tokens") is not None:
        parts.append(f"{identity['n_tokens']} tokens")
    if identity.get("fingerprint"):
        parts.append(f"fingerprint {str(identity['fingerprint'])[:12]}")
    return f"{name!r}" + (f" ({', '.join(parts)})" if parts else "")
