"""tools/kernel_source.py: which changes of a file change a kernel's hash."""

from __future__ import annotations

import sys
from pathlib import Path

import kernel_source
import pytest

KERNEL = '''"""Kernels."""
import triton
import triton.language as tl

from shapes import tiles
from shapes.tiles import scale as by

LIMIT = 4  # a constant
OTHER = 5


@triton.jit
def _inner(x):
    return x + LIMIT


@triton.jit
def first_kernel(x_ptr, N: tl.constexpr):
    """One program = everything."""
    text = "# no comment"
    x = _inner(tl.load(x_ptr))  # read
    tl.store(x_ptr, by(x))


@triton.jit(do_not_specialize=["x_ptr"])
def second_kernel(x_ptr):
    tl.store(x_ptr, tiles.moment(OTHER))


def not_a_kernel():
    pass
'''
TILES = """import triton

EPS = 1.0


@triton.jit
def scale(x):
    return x * EPS


@triton.jit
def moment(x):
    return x * x
"""


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a package of two modules, each with texts replaced, and gives both kernels' hashes."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_and_hash(*changes: tuple[str, str]) -> tuple[str, str]:
        kernel, tiles = KERNEL, TILES
        for old, new in changes:
            assert (kernel + tiles).count(old) == 1
            kernel, tiles = kernel.replace(old, new), tiles.replace(old, new)
        folder = tmp_path / "shapes"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "kernel.py").write_text(kernel)
        (folder / "tiles.py").write_text(tiles)
        kernel_source.read_module.cache_clear()
        return tuple(kernel_source.source_hash("shapes.kernel", f"{name}_kernel") for name in ("first", "second"))

    yield write_and_hash
    kernel_source.read_module.cache_clear()
    kernel_source.kernel_module.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # read", ""),
        ("# a constant", "# another word"),
        ('    """One program = everything."""\n', ""),
        ("def not_a_kernel():\n    pass", ""),
        ("LIMIT = 4", "\n\nLIMIT = 4"),
    ],
)
def test_what_does_not_reach_the_machine_changes_nothing(hashes, old, new):
    assert hashes((old, new)) == hashes()


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("LIMIT = 4", "LIMIT = 3", (True, False)),  # through a function it calls
        ("return x + LIMIT", "return x - LIMIT", (True, False)),
        ("# no comment", "# no commend", (True, False)),  # within a text
        ("OTHER = 5", "OTHER = 6", (False, True)),
        ('@triton.jit(do_not_specialize=["x_ptr"])', "@triton.jit", (False, True)),
        ("EPS = 1.0", "EPS = 2.0", (True, False)),  # in another module, under another name
        ("return x * x", "return x", (False, True)),  # in another module, through its name
        ("by(x)", "by(x) + 1", (True, False)),
    ],
)
def test_what_reaches_the_machine_changes_the_kernels_that_use_it(hashes, old, new, changed):
    before, after = hashes(), hashes((old, new))
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


def test_kernels_of_an_operation_may_be_in_several_files(hashes, tmp_path):
    hashes()
    folder = tmp_path / "shapes"
    (folder / "kernel_more.py").write_text(KERNEL.replace("second_kernel", "third_kernel"))
    (folder / "kernels.py").write_text(KERNEL.replace("second_kernel", "fourth_kernel"))
    kernel_source.kernel_module.cache_clear()
    assert [path.name for path in kernel_source.kernel_files(folder)] == ["kernel.py", "kernel_more.py"]
    found = [kernel_source.kernel_module("shapes", f"{name}_kernel") for name in ("second", "third", "fourth")]
    assert found == ["shapes.kernel", "shapes.kernel_more", "shapes.kernel"]
    assert kernel_source.source_hash("shapes.kernel_more", "third_kernel")


def test_kernel_functions_and_unknown_names(hashes, tmp_path):
    hashes()
    found = kernel_source.kernel_functions(tmp_path / "shapes" / "kernel.py")
    assert list(found) == ["first_kernel", "second_kernel"]
    lines = KERNEL.splitlines()
    assert lines[found["second_kernel"].start - 1].startswith("@triton.jit(do")
    assert "tiles.moment" in lines[found["second_kernel"].stop - 2]
    with pytest.raises(LookupError, match=r"shapes\.kernel defines no third_kernel"):
        kernel_source.source_hash("shapes.kernel", "third_kernel")
