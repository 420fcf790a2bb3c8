"""The registry of model families: what a family is stands in one file of this folder, and everything else asks here.

A family's module declares ``FAMILY``, a :class:`Family`. Modules are loaded by name when they are asked for, so that
what they import themselves may ask the registry. A family from elsewhere is added by :func:`register`, or by an entry
point of the group :data:`GROUP` that names a :class:`Family`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.families.family import Family, Reading, TokenLayout

if TYPE_CHECKING:
    from geneformer_fast.config import EncoderConfig

__all__ = [
    "DEFAULT_LAYOUT",
    "DEFAULT_PRESET",
    "FAMILIES",
    "GROUP",
    "Family",
    "Reading",
    "TokenLayout",
    "all_families",
    "family",
    "family_name",
    "family_of",
    "family_reading",
    "layout",
    "layout_family",
    "layout_of_vocabulary",
    "layouts",
    "preset_family",
    "preset_name",
    "presets",
    "recipes",
    "recognise",
    "refuse",
    "register",
    "vocabulary_of_rows",
]

#: Families that come with this package, in the order in which they are listed and asked.
FAMILIES = ("geneformer", "bionemo", "aido-cell", "scgpt", "scbert")
#: What is taken where nobody names one.
DEFAULT_PRESET, DEFAULT_LAYOUT = "geneformer-v1-10m", "v2"
#: Group of entry points that bring more.
GROUP = "geneformer_fast.families"

_registered: dict[str, Family] = {}


@functools.cache
def _of_this_package() -> tuple[Family, ...]:
    return tuple(importlib.import_module(f"{__name__}.{name.replace('-', '_')}").FAMILY for name in FAMILIES)


@functools.cache
def _load_entry_points() -> None:
    """Register what other packages bring, once. One that fails is named, and takes nothing else with it."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            brought = point.load()
            register(getattr(brought, "FAMILY", brought))
        except Exception as reason:
            warnings.warn(
                f"the family of models {point.name!r} ({point.value}) cannot be used: {reason}; "
                "mend or uninstall the package that brings it",
                stacklevel=2,
            )


def _families() -> Iterator[Family]:
    """All of them, this package's first; those of other packages are looked for only where these do not answer."""
    yield from _of_this_package()
    yield from _from_elsewhere()


def _from_elsewhere() -> tuple[Family, ...]:
    _load_entry_points()
    return tuple(_registered.values())


def all_families() -> list[Family]:
    """Every family there is."""
    return list(_families())


def register(new: Family) -> Family:
    """Add a family to those that come with this package; one of the same name that was added before is replaced.

    Raises
    ------
    UnsupportedError
        It is no :class:`Family`, or has a name, a preset or a layout of another family.
    """
    if not isinstance(new, Family):
        raise UnsupportedError(f"a family of models is a geneformer_fast.families.Family, not {type(new).__name__}")
    for other in (*_of_this_package(), *(each for each in _registered.values() if each.name != new.name)):
        taken = [("name", new.name)] if new.name == other.name else []
        taken += [("preset", name) for name in new.presets if name in other.presets]
        taken += [("layout", name) for name in new.layouts if name in other.layouts]
        if taken:
            what, name = taken[0]
            raise UnsupportedError(f"the family {new.name!r} has the {what} {name!r} of {other.title}; rename it")
    _registered[new.name] = new
    return new


def family(name: str) -> Family:
    """A family by its name.

    Raises
    ------
    UnsupportedError
        There is none of this name.
    """
    for found in _families():
        if found.name == name:
            return found
    known = ", ".join(found.name for found in all_families())
    raise UnsupportedError(f"no family of models is called {name!r}; there are {known}")


def presets() -> dict[str, EncoderConfig]:
    """Published models of all families by name."""
    return {name: config for found in _families() for name, config in found.presets.items()}


def preset_name(name: str) -> str | None:
    """The preset that a name stands for, whatever its case and whether with ``_`` or ``-``; None: for none."""
    plain = name.lower().replace("_", "-")
    for found in _families():
        named = found.other_names.get(plain, plain)
        if named in found.presets:
            return named
    return None


def preset_family(name: str) -> Family:
    """The family that a preset is of.

    Raises
    ------
    UnsupportedError
        There is no such preset.
    """
    named = preset_name(name)
    if named is None:
        raise UnsupportedError(f"no preset named {name!r}; there are {', '.join(presets())}")
    return next(found for found in _families() if named in found.presets)


def recipes() -> dict[str, Mapping[str, Any]]:
    """How published models were trained, by name: fields of :class:`geneformer_fast.training.recipe.Recipe`."""
    return {name: fields for found in _families() for name, fields in found.recipes.items()}


def layouts() -> dict[str, TokenLayout]:
    """How cells become ranked tokens, by the name under which a layout is chosen."""
    return {name: each for found in _families() for name, each in found.layouts.items()}


def layout(name: str) -> TokenLayout:
    """A layout of ranked tokens by its name.

    Raises
    ------
    UnsupportedError
        There is none of this name.
    """
    for found in _families():
        if name in found.layouts:
            return found.layouts[name]
    raise UnsupportedError(f"no layout of tokens is called {name!r}; there are {', '.join(layouts())}")


def layout_family(name: str) -> Family:
    """The family that a layout of ranked tokens is of.

    Raises
    ------
    UnsupportedError
        There is no such layout.
    """
    layout(name)
    return next(found for found in _families() if name in found.layouts)


def layout_of_vocabulary(published: str | None) -> tuple[str, TokenLayout] | None:
    """The layout of a published vocabulary, with its name; None where no published one is called so."""
    for found in _families():
        for name, each in found.layouts.items():
            if each.published == published:
                return name, each
    return None


def vocabulary_of_rows(n_rows: int) -> str | None:
    """The published vocabulary that a token table of this many rows is of, which is all that stock files say of it."""
    for each in layouts().values():
        if each.n_rows == n_rows:
            return each.published
    return None


def family_of(config: EncoderConfig) -> Family | None:
    """The family that a configuration is of, which it names itself or by its vocabulary; None: none, as any BERT.

    Raises
    ------
    UnsupportedError
        It names one that is not here.
    """
    if config.family is not None:
        return family(config.family)
    if config.vocabulary is None:
        return None
    return next((found for found in _families() if config.vocabulary in found.vocabularies), None)


def family_name(config: EncoderConfig) -> str | None:
    """Name of the family that a configuration is of, if it is of one."""
    found = family_of(config)
    return None if found is None else found.name


def family_reading(config: EncoderConfig) -> Reading:
    """Where the authors of a model's family read embeddings."""
    found = family_of(config)
    return Reading() if found is None else found.reading


def refuse(config: EncoderConfig, what: str) -> None:
    """Refuse what cannot be done with models of a family, named as :attr:`Family.refused` names it.

    Raises
    ------
    UnsupportedError
        In the family's own words.
    """
    found = family_of(config)
    if found is not None and what in found.refused:
        raise UnsupportedError(found.refused[what])


def recognise(folder: Path) -> Family | None:
    """Whose checkpoint a folder or file is; None where no family knows it.

    Families of other packages are asked first, since they know of those here.
    """
    for found in (*_from_elsewhere(), *_of_this_package()):
        if found.recognise(folder):
            return found
    return None
