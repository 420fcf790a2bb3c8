"""The genes of a family that reads values: which, in which order, and by which other ids they are known.

No list is shipped: those of AIDO.Cell and scBERT are under their owners' licences. A user names the file or folder that
came with the model.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from geneformer_fast.counts.identifiers import is_ensembl_gene
from geneformer_fast.errors import GeneformerFastError, VocabularyError
from geneformer_fast.files.checksums import check_digest, with_digest
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json

#: A list of genes as we save it, beside a model or anywhere.
SAVED_FILE = "genes.json"
_FORMAT = "geneformer-fast genes"
# A column of float32 holds every whole number up to here.
_MOST_ID = 2**24 - 1
#: Headers of a column with names, best first, and of one with Ensembl ids.
_NAMES = ("gene_name", "gene_symbol", "symbol", "feature_name", "gene", "name")
_ENSEMBL = ("ensembl_id", "ensembl", "ensembl_gene_id", "gene_id", "gene_ids", "feature_id")
_DELIMITERS = {".tsv": "\t", ".csv": ",", ".txt": "\t"}
# Geneformer's dictionaries of other ids, which may lie beside a list.
_MAPPING = re.compile(r"(?:ensembl_mapping_dict|gene_name_id_dict)(?:_[A-Za-z0-9]+)?\.(?:pkl|pickle|json)$")


@dataclass(frozen=True, eq=False)
class GeneList:
    """Genes of a family that reads values.

    Parameters
    ----------
    family
        Whose.
    token_ids
        Name of a gene (a symbol or an Ensembl id, as the list has it) to its number.
    aliases
        UPPER-CASE other id to a name of the list.
    special
        Numbers that are no genes, by name without brackets.

    Raises
    ------
    VocabularyError
        No genes, a number that is taken twice, or no number.
    """

    family: str
    token_ids: dict[str, int]
    aliases: dict[str, str] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise VocabularyError(f"the gene list of {self.family} holds no genes")
        seen: dict[int, str] = {}
        for name, number in (*self.special.items(), *self.token_ids.items()):
            if type(number) is not int or not 0 <= number <= _MOST_ID:
                raise VocabularyError(
                    f"the gene list of {self.family}: the number of {name!r} is {number!r}, expected a whole number "
                    f"from 0 to {_MOST_ID:,}"
                )
            if number in seen:
                raise VocabularyError(
                    f"the gene list of {self.family}: number {number} is used twice, by {seen[number]!r} and {name!r}"
                )
            seen[number] = name

    def __repr__(self) -> str:
        return f"GeneList({self.family!r}, {len(self):,} genes, fingerprint={self.fingerprint[:12]})"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def name(self) -> str:
        """What models call it: the family."""
        return self.family

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over family, special numbers, names and numbers: what a model has to agree with."""
        rows = sorted(f"{number}\t{name}\n" for name, number in self.token_ids.items())
        return sha256(f"{self.family}\n{sorted(self.special.items())}\n{''.join(rows)}".encode()).hexdigest()

    @cached_property
    def mapping_fingerprint(self) -> str:
        """SHA-256 over the other ids: with others the same file gives other cells to the same model."""
        return sha256("".join(sorted(f"{key}\t{name}\n" for key, name in self.aliases.items())).encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``genes.json`` into a folder, which :func:`read_gene_list` reads back unchanged."""
        path = Path(folder) / SAVED_FILE
        content = {
            "format": _FORMAT, "version": 1, "family": self.family, "special": self.special, "genes": self.token_ids,
            "aliases": self.aliases,
        }  # fmt: skip
        write_json(path, with_digest(content), indent=None)
        return path


def in_order(family: str, names: Sequence[str], where: str | Path, ensembl: Sequence[str] = ()) -> GeneList:
    """A list whose genes are numbered from 0 in their order.

    Parameters
    ----------
    family
        Whose.
    names
        Of the genes.
    where
        What they were read from, for errors.
    ensembl
        Their Ensembl ids, where they are known; empty text for none.

    Raises
    ------
    VocabularyError
        A name is empty or comes twice.
    """
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name:
            raise VocabularyError(f"{where}: gene {number} (counted from 0) has no name")
        if name in found:
            raise VocabularyError(f"{where}: {name!r} is listed twice, as gene {found[name]} and as gene {number}")
        found[name] = number
    pairs = zip(ensembl, names, strict=False) if ensembl else ()
    return GeneList(family, found, _aliases(found, {gene.upper(): name for gene, name in pairs if gene}, {}))


def read_gene_list(path: Path, family: str, patterns: Sequence[str]) -> GeneList:
    """The gene list in a file, or in a folder that holds one.

    A table (.tsv, .csv, .txt) has a name per row, in a column that its header names (``gene_name``, ``gene_symbol``,
    ...; perhaps another with ``ensembl_id``) or in its only one; a .json is what :meth:`GeneList.save` wrote, a list of
    names, or an object of names and numbers; of an .h5ad the row names of var are taken. Geneformer's dictionaries of
    symbols (``ensembl_mapping_dict*``, ``gene_name_id_dict*``) in the same folder add other ids.

    Parameters
    ----------
    path
        The file or folder.
    family
        Whose genes.
    patterns
        How the file is called in folders that come with a model.

    Raises
    ------
    VocabularyError
        There is none, or it cannot be understood.
    """
    file = _file_of(path, family, patterns)
    try:
        genes = _read(file, family)
    except VocabularyError:
        raise
    except (GeneformerFastError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise VocabularyError(f"{file}: cannot be read as a list of genes ({error})") from None
    ids: dict[str, str] = {}
    for beside in sorted(file.parent.iterdir()):
        if _MAPPING.match(beside.name):
            ids |= _mapping(beside)
    if not ids:
        return genes
    return GeneList(family, genes.token_ids, _aliases(genes.token_ids, genes.aliases, ids), genes.special)


def _file_of(path: Path, family: str, patterns: Sequence[str]) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise VocabularyError(f"{path}: no such file or folder; give the one with the genes of {family}")
    for pattern in (SAVED_FILE, *patterns):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise VocabularyError(f"{path} holds several gene lists: {listed}; name one of them")
        if found:
            return found[0]
    raise VocabularyError(
        f"{path} holds no gene list of {family}: expected {' or '.join(patterns)}, or {SAVED_FILE}; name the file "
        "itself if it is called otherwise"
    )


def _read(file: Path, family: str) -> GeneList:
    if file.suffix == ".json":
        return _of_json(file, family)
    if file.suffix == ".h5ad":
        return in_order(family, _row_names(file), file)
    if file.suffix not in _DELIMITERS:
        raise VocabularyError(f"{file}: a gene list is a .tsv, .csv, .txt, .json or .h5ad")
    names, ensembl = _columns(file)
    return in_order(family, names, file, ensembl)


def _columns(file: Path) -> tuple[list[str], list[str]]:
    """Names and, where a column has them, Ensembl ids."""
    text = file.read_text(encoding="utf-8-sig")
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=_DELIMITERS[file.suffix])]
    rows = [row for row in rows if any(row)]
    if not rows:
        raise VocabularyError(f"{file}: is empty")
    header = [cell.lower() for cell in rows[0]]
    named = next((header.index(name) for name in _NAMES if name in header), None)
    ensembl = next((header.index(name) for name in _ENSEMBL if name in header), None)
    if named is None and ensembl is None:
        if len(header) > 1:
            raise VocabularyError(
                f"{file}: no column of its header is called {_NAMES[0]}; there are {', '.join(header)}"
            )
        named = 0
    else:
        rows = rows[1:]
    short = next((number for number, row in enumerate(rows) if len(row) != len(header)), None)
    if short is not None:
        raise VocabularyError(f"{file}: row {short + 1} has {len(rows[short])} columns, the first has {len(header)}")
    if "index" in header and [row[header.index("index")] for row in rows] != list(map(str, range(len(rows)))):
        raise VocabularyError(f"{file}: its column index does not count from 0, so its rows are not in their order")
    column = ensembl if named is None else named
    assert column is not None
    ids = [row[ensembl] for row in rows] if ensembl is not None and named is not None else []
    return [row[column] for row in rows], ids


def _of_json(file: Path, family: str) -> GeneList:
    from geneformer_fast.files.schema import parse_json

    content = parse_json(file.read_bytes(), file, VocabularyError)
    if isinstance(content, list):
        return in_order(family, _strings(content, file), file)
    if not isinstance(content, dict):
        raise VocabularyError(f"{file}: holds neither a list of genes nor an object of names and numbers")
    if content.get("format") != _FORMAT:
        special, genes = specials_apart(numbers_of(content, file))
        return GeneList(family, genes, {}, special)
    check_digest(content, file, VocabularyError, "restore it from a good copy")
    if content.get("family") != family:
        raise VocabularyError(f"{file}: is the gene list of {content.get('family')}, not of {family}")
    aliases = content.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise VocabularyError(f"{file}: aliases are no object of names")
    genes, special = (numbers_of(content.get(key), f"{file}: {key}") for key in ("genes", "special"))
    return GeneList(family, genes, aliases, special)


def numbers_of(content: Any, where: str | Path) -> dict[str, int]:
    """An object of names and whole numbers; VocabularyError for anything else."""
    if not isinstance(content, Mapping):
        raise VocabularyError(f"{where}: holds no object of names and numbers")
    for name, number in content.items():
        if type(number) is not int:
            raise VocabularyError(f"{where}: the number of {name!r} is {str(number)[:40]!r}, expected a whole number")
    return dict(content)


def specials_apart(numbers: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What stands in angle brackets, without them, and the genes."""
    special = {name[1:-1]: number for name, number in numbers.items() if re.fullmatch(r"<\w+>", name)}
    return special, {name: number for name, number in numbers.items() if name[1:-1] not in special or name[0] != "<"}


def _strings(content: Sequence[Any], where: Path) -> list[str]:
    wrong = next((entry for entry in content if not isinstance(entry, str)), None)
    if wrong is not None:
        raise VocabularyError(f"{where}: {str(wrong)[:40]!r} is no name of a gene")
    return list(content)


def _row_names(file: Path) -> list[str]:
    """The row names of an .h5ad's var, whatever its matrix holds."""
    import h5py

    from geneformer_fast.counts.encodings import member, read_table, table_length
    from geneformer_fast.counts.reading import reading

    with reading(str(file), "var"), h5py.File(file, "r") as root:
        var = member(root, "var")
        return read_table(var, root, f"{file}: var", table_length(var)).index().tolist()


def _mapping(path: Path) -> dict[str, str]:
    """Symbol, alias or retired id to Ensembl id."""
    from geneformer_fast.tokenization.pickles import read_pickle

    content = read_json(path, VocabularyError) if path.suffix == ".json" else read_pickle(path)
    if not isinstance(content, dict):
        raise VocabularyError(f"{path}: holds no dictionary")
    return {key: gene for key, gene in content.items() if isinstance(key, str) and isinstance(gene, str)}


def _aliases(genes: Mapping[str, int], known: Mapping[str, str], ids: Mapping[str, str]) -> dict[str, str]:
    """Other ids of listed genes: those that are known, and by way of Ensembl ids those of a dictionary.

    A name of the list is never another gene's alias, whatever a dictionary says.
    """
    listed = {name.upper() for name in genes}
    aliases = {key: name for key, name in known.items() if key not in listed}
    upper = {key.upper(): gene.upper() for key, gene in ids.items()}
    gene_of = dict.fromkeys(genes, "")
    for alias, name in known.items():
        if is_ensembl_gene(alias):
            gene_of[name] = alias
    listed_as: dict[str, str] = {}
    for name in genes:
        gene = gene_of[name] or (
            name.upper() if is_ensembl_gene(name) else ids.get(name) or upper.get(name.upper(), "")
        )
        if gene:
            listed_as.setdefault(gene.upper(), name)
    of_genes = ((gene, gene) for gene in listed_as)
    for key, gene in itertools.chain(of_genes, upper.items()):
        if gene in listed_as and key not in listed:
            aliases.setdefault(key, listed_as[gene])
    return aliases
