"""Turns whatever a file library raises into one error that names the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from geneformer_fast.errors import GeneformerFastError, InputError

# What h5py, zarr, anndata, zlib and numpy raise on damaged files. Programming errors such as NameError stay visible.
_FOREIGN = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SystemError,
    NotImplementedError,
    zlib.error,
    struct.error,
)


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Inside this context every foreign error becomes an InputError: '{name}: cannot read {what}: ...'."""
    try:
        yield
    except GeneformerFastError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file or folder") from None
    except PermissionError:
        raise InputError(f"{name}: no permission to read it") from None
    except _FOREIGN as error:
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().split("\n")[0]
        raise InputError(
            f"{name}: cannot read {what}: {reason or type(error).__name__}. The file is damaged, incomplete or not "
            "what its name says; copy or download it again."
        ) from error
