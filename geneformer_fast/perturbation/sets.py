"""Sets of genes from a file, each of which is perturbed together."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from geneformer_fast.errors import InputError, VocabularyError
from geneformer_fast.files.schema import parse_json
from geneformer_fast.files.writing import reason_of

_FORMS = (
    "a .gmt file has a line for each set (name, description, genes, between tabs), a .json file {name: [genes]}, and "
    "any other a line for each set (name, then genes, between tabs, commas or blanks)"
)


def read_sets(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Sets of genes by name, in the order of the file; genes as they are written there.

    Parameters
    ----------
    path
        ``.gmt``: a line for each set, with its name, a description and its genes between tabs. ``.json``: an object of
        lists by name. Any other: a line for each set, with its name and its genes between tabs, commas or blanks; lines
        that begin with ``#`` are none.

    Raises
    ------
    InputError
        The file cannot be read, or holds no set, a set without genes, a name twice, or a gene twice in one set.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text; {_FORMS}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    found: dict[str, tuple[str, ...]] = {}
    for where, name, genes in _from_json(path, text) if path.suffix == ".json" else _from_lines(path, text):
        if not genes:
            raise InputError(f"{where}: the set {name!r} has no genes; {_FORMS}")
        if name in found:
            raise InputError(f"{where}: there are two sets {name!r}; give each a name of its own")
        twice = next((gene for gene in genes if genes.count(gene) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: the set {name!r} has the gene {twice!r} twice")
        found[name] = genes
    if not found:
        raise InputError(f"{path} holds no set of genes; {_FORMS}")
    return found


def tokens_of_sets(
    sets: Mapping[str, Sequence[str | int]], token_of: Callable[[str | int], int | None]
) -> dict[str, tuple[int, ...]]:
    """Sets as tokens. Genes that the model does not know are left out, with a warning that says how many.

    Parameters
    ----------
    sets
        Genes by the name of their set, as :func:`read_sets` gives them, or tokens.
    token_of
        The token of a gene; None where there is none.

    Raises
    ------
    InputError
        A set has no genes, or one of them twice.
    VocabularyError
        No gene of a set has a token; or two genes of one have the same.
    """
    found, n_genes, unknown = {}, 0, []
    for name, genes in sets.items():
        if not len(genes):
            raise InputError(f"sets: the set {name!r} has no genes; leave it out")
        tokens = {gene: token_of(gene) for gene in genes}
        if len(tokens) < len(genes):
            twice = next(gene for gene in tokens if list(genes).count(gene) > 1)
            raise InputError(f"sets: the set {name!r} has the gene {twice!r} twice")
        n_genes += len(tokens)
        unknown += [gene for gene, token in tokens.items() if token is None]
        known = {gene: token for gene, token in tokens.items() if token is not None}
        if not known:
            raise VocabularyError(f"sets: the model knows no gene of the set {name!r}, such as {genes[0]!r}")
        if len(set(known.values())) < len(known):
            same = [gene for gene, token in known.items() if list(known.values()).count(token) > 1]
            raise VocabularyError(f"sets: {same[0]!r} and {same[1]!r} in the set {name!r} are one gene; leave one out")
        found[name] = tuple(known.values())
    if unknown:
        warnings.warn(
            f"sets: {len(unknown):,} of {n_genes:,} genes have no token and are left out, such as {unknown[0]!r}",
            stacklevel=3,
        )
    return found


def _from_json(path: Path, text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    pairs: list[tuple[str, object]] = []

    def kept(items: list[tuple[str, object]]) -> dict[str, object]:
        # JSON objects may have a name twice, of which a dict would keep the last.
        pairs[:] = items
        return dict(items)

    parse_json(text.encode(), str(path), InputError)
    content = json.loads(text, object_pairs_hook=kept)
    is_right = isinstance(content, dict) and all(
        isinstance(genes, list) and all(isinstance(gene, str) for gene in genes) for genes in content.values()
    )
    if not is_right:
        raise InputError(f"{path}: sets of genes are an object of lists of names; {_FORMS}")
    return [(str(path), name, tuple(genes)) for name, genes in pairs]  # type: ignore[arg-type]


def _from_lines(path: Path, text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if path.suffix == ".gmt":
            name, _, *genes = [*line.rstrip("\t ").split("\t"), ""]
            parts = [gene.strip() for gene in genes if gene.strip()]
        else:
            name, *parts = line.replace(",", " ").split()
        found.append((f"{path}, line {number}", name.strip(), tuple(parts)))
    return found
