"""What numba compiled is kept for the sources that it was made of: all of this package, not the file of a loop alone.

numba compares the file in which a loop stands with what that was when the loop was compiled. Where another file has the
pieces that went into it, an update of that file alone would go unnoticed, and the old loop go on without a word.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from numba.core import caching

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def digest_of_sources() -> bytes:
    """SHA-256 of all Python files of the package."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def keep_for_all_sources() -> bool:
    """Tell numba, before the first loop is declared; False where this numba cannot be told and nothing may be kept."""
    keeper: Any = getattr(caching, "CacheImpl", None) or getattr(caching, "_CacheImpl", None)
    locators = getattr(keeper, "_locator_classes", None)
    if not locators:
        return False
    keeper._locator_classes = [*map(_for_this_package, locators), *locators]
    return True


def _for_this_package(base: Any) -> Any:
    """A place for what is compiled, as numba has it, that serves the files of this package and knows all of them."""

    class Locator(base):
        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            if not Path(py_file).resolve().is_relative_to(_PACKAGE):
                return None
            return super().from_function(py_func, py_file)

        def get_source_stamp(self) -> Any:
            return super().get_source_stamp(), digest_of_sources()

    return Locator
