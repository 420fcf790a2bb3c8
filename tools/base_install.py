"""An environment as ``pip install geneformer-fast`` leaves it: what the project depends on, and no extra.

``python tools/base_install.py FOLDER [--wheel WHEEL]`` makes a virtual environment whose packages are links to those of
the environment that runs this: the dependencies in ``pyproject.toml``, what these depend on in turn, and nothing
besides. So it takes no network and no time, and what is not there is truly absent. Of the project it holds the wheel,
or this checkout.
"""

from __future__ import annotations

import argparse
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def base_requirements() -> list[str]:
    """What ``pyproject.toml`` asks for without extras."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def brought_by(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Everything that installing some requirements brings, as far as it is installed here: name -> distribution."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset({""})) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": one}) for one in extras):
            continue
        name, asked = canonicalize_name(requirement.name), frozenset({"", *requirement.extras})
        if (name, asked) in seen:
            continue
        seen.add((name, asked))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # CUDA's libraries, where torch is the build for CPUs
        waiting += [(Requirement(text), asked) for text in found[name].requires or ()]
    return found


def top_level(one: Distribution) -> set[Path]:
    """The files and folders of a distribution in its site-packages."""
    names = {path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}
    return {Path(str(one.locate_file(name))) for name in names}


def link_packages(folder: Path, requirements: Iterable[str], *, without: Iterable[str] = ()) -> None:
    """Links in ``folder`` to everything that some requirements bring, but for the distributions left out."""
    left_out = {canonicalize_name(name) for name in without}
    for name, one in brought_by(requirements).items():
        for path in () if name in left_out else top_level(one):
            link = folder / path.name
            if not link.is_symlink():  # a namespace that several share
                link.symlink_to(path)


def make_environment(folder: Path, *, wheel: Path | None = None, without: Iterable[str] = ()) -> Path:
    """Make the environment; returns its Python.

    Parameters
    ----------
    folder
        A new folder.
    wheel
        The project's wheel; None takes this checkout.
    without
        Distributions to leave out besides.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    link_packages(packages, base_requirements(), without=without)
    if wheel is not None:
        zipfile.ZipFile(wheel).extractall(packages)
    else:
        (packages / "checkout.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n")
    return Path(sysconfig.get_path("scripts", "venv", places)) / "python"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path)
    asked_for = parser.parse_args()
    print(make_environment(asked_for.folder, wheel=asked_for.wheel))
