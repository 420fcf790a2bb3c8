"""Arrow arrays out of numpy arrays and lists of text.

``pyarrow.array`` imports pandas to see whether it was given a Series: half a second and 60 MB in a process that needs
no pandas. These build the same arrays from their buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def number_array(values: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """A numpy array of numbers or bool as an Arrow array, without a copy where it is contiguous.

    Parameters
    ----------
    values
        [n], native byte order.
    missing
        [n] bool, True where the value is missing.
    """
    values = np.ascontiguousarray(values)
    content = np.packbits(values, bitorder="little") if values.dtype.kind == "b" else values
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [_validity(missing), pa.py_buffer(content)])


def text_list_array(texts: Sequence[str | None]) -> pa.Array:
    """A list of strings, None where one is missing, as an Arrow string array (large_string beyond 2 GB).

    Raises
    ------
    UnicodeEncodeError
        Lone surrogates, which UTF-8 cannot hold.
    """
    encoded = [b"" if text is None else text.encode() for text in texts]
    return _binary_array(encoded, np.fromiter((text is None for text in texts), dtype=bool, count=len(texts)))


def bytes_list_array(texts: Sequence[bytes | None]) -> pa.Array:
    """As :func:`text_list_array`, from encoded strings.

    Raises
    ------
    ValueError
        Bytes that are not UTF-8.
    """
    missing = np.fromiter((text is None for text in texts), dtype=bool, count=len(texts))
    array = _binary_array([text or b"" for text in texts], missing)
    array.validate(full=True)
    return array


def _binary_array(encoded: Sequence[bytes], missing: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=offsets[1:])
    is_large = int(offsets[-1]) >= 2**31
    offsets = offsets if is_large else offsets.astype(np.int32)
    buffers = [_validity(missing), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string() if is_large else pa.string(), len(encoded), buffers)


def _validity(missing: np.ndarray | None) -> pa.Buffer | None:
    if missing is None or not missing.any():
        return None
    return pa.py_buffer(np.packbits(~missing, bitorder="little"))
