"""The conda package of ``recipe/recipe.yaml``, built and tested without a channel of packages.

``python tools/conda_package.py OUT [--source FOLDER]`` makes a small channel in OUT: its python is the one that runs
this, pip and setuptools are those installed here, and what the recipe needs at run time are empty packages with the
versions found here, whose modules are links to those of this environment. So the solver meets the recipe's bounds, the
build is the real one, and the recipe's tests run on what it made, beside nothing that the recipe does not name.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import rattler_build
from base_install import ROOT, base_requirements, link_packages
from packaging.requirements import Requirement
from packaging.version import Version

RECIPE = ROOT / "recipe" / "recipe.yaml"
#: What packages are called in conda-forge where that is another name.
CONDA_NAMES = {"torch": "pytorch"}
BUILDING = ("pip", "setuptools")
#: What the recipe does not ask for, since pytorch's builds bring it where it is of use.
LEFT_TO_PYTORCH = ("triton",)
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def for_this_python(text: str, source: Path) -> str:
    """The recipe with the least Python exchanged for the one that runs this, and with its source."""
    text, n_python = re.subn(r'python_min: ".*"', f'python_min: "{_PYTHON}"', text)
    text, n_source = re.subn(r"(?<=source:\n  path: )\.\.(?=\n)", str(source.resolve()), text)
    if (n_python, n_source) != (1, 1):
        raise ValueError(f"{RECIPE} has no python_min or no path of its source where they are expected")
    return text


def make_channel(out: Path, links: Path) -> None:
    """A channel in ``out`` of everything that the recipe names, packages being links in ``links``."""
    link_packages(links, [*base_requirements(), *BUILDING, "packaging"], without=LEFT_TO_PYTORCH)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        executable = Path(sys.base_prefix) / "bin" / f"python{_PYTHON}"
        (folder / "bin").mkdir()
        for name in ("python", "python3", f"python{_PYTHON}"):
            (folder / "bin" / name).symlink_to(executable)
        # What makes a folder with such links a virtual environment.
        (folder / "pyvenv.cfg").write_text(f"home = {executable.parent}\ninclude-system-site-packages = false\n")
        packages = folder / "lib" / f"python{_PYTHON}" / "site-packages"
        packages.mkdir(parents=True)
        (packages / "links.pth").write_text(f"{links}\n")
        _assemble(out, "python", platform.python_version(), files_dir=folder)
    names = [*(Requirement(text).name for text in base_requirements()), *BUILDING]
    for name in set(names) - set(LEFT_TO_PYTORCH):
        _assemble(out, CONDA_NAMES.get(name, name), Version(version(name)).public)


def _assemble(out: Path, name: str, of_version: str, *, files_dir: Path | None = None) -> None:
    subdir = rattler_build.PlatformConfig().target_platform or "linux-64"
    (out / subdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        rattler_build.assemble_package(
            name, of_version, subdir, "0", out / subdir, files_dir=files_dir or empty, detect_prefix=False
        )


def build(out: Path, source: Path) -> rattler_build.Package:
    """Build the recipe with the channel in ``out``, and run the tests it holds.

    Raises
    ------
    rattler_build.RattlerBuildError
        The recipe is wrong, its requirements cannot be met, or its build failed.
    RuntimeError
        A test of the package failed.
    """
    out = out.resolve()
    links, recipe = out / "links", out / "recipe" / "recipe.yaml"
    for folder in (links, recipe.parent):
        folder.mkdir(parents=True)
    recipe.write_text(for_this_python(RECIPE.read_text(), source))
    channel = out / "channel"
    make_channel(channel, links)
    (rendered,) = rattler_build.Stage0Recipe.from_file(recipe).render(rattler_build.VariantConfig())
    result = rendered.run_build(output_dir=channel, channels=[channel.as_uri()])
    package = rattler_build.Package.from_file(result.packages[0])
    for test in package.run_tests(channel=[channel.as_uri()]):
        if not test.success:
            print("\n".join(test.output))
            raise RuntimeError(f"test {test.test_index} of {package.filename} failed")
    return package


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--source", type=Path, default=ROOT, help="the project's files (default: this checkout)")
    asked_for = parser.parse_args(arguments)
    package = build(asked_for.out, asked_for.source)
    print(f"{package.path}: {len(package.files)} files, {package.test_count} tests passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
