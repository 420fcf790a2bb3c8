"""The tensors of a model folder, read one by one, or a few rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from geneformer_fast.checkpoints.weights import (
    ADVICE,
    check_against_sums,
    check_shard,
    files_of,
    is_archive,
    read_pytorch,
)
from geneformer_fast.errors import CheckpointError
from geneformer_fast.files.checksums import is_verifying, read_sums
from geneformer_fast.files.streaming import TensorFile, pieces

# A mapped file's pages count as ours until it is unmapped.
_MOST_MAPPED = 16 << 20


class _File(Protocol):
    described: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...

    def read_into(self, name: str, tensor: torch.Tensor) -> None: ...


class Stored(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors by name, on the meta device until they are read.

    Parameters
    ----------
    files
        What holds them.
    """

    def __init__(self, files: list[_File]) -> None:
        self._place = {name: (file, name) for file in files for name in file.described}
        #: What the headers of safetensors files say beside their tensors.
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        file, found = self._place[name]
        return file.described[found]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A tensor, or its rows from ``start`` to ``stop``, in memory of their own."""
        file, found = self._place[name]
        return file.read(found, start, stop)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Read a tensor to where it stays, which is contiguous and of its dtype and shape."""
        file, found = self._place[name]
        file.read_into(found, tensor)

    def renamed(self, names: Mapping[str, str]) -> Stored:
        """The same under other names, new to old; what is not named is left out."""
        other = Stored([])
        other._place = {new: self._place[old] for new, old in names.items()}
        other.metadata = self.metadata
        return other


@contextlib.contextmanager
def stored_tensors(folder: Path, *, verify: bool | None = None) -> Iterator[Stored]:
    """The tensors of a checkpoint folder, from one file or from shards, without reading them.

    Checksums are compared meanwhile; the context ends with an error where one does not fit.

    Parameters
    ----------
    folder, verify
        As in :func:`geneformer_fast.checkpoints.weights.read_tensors`.

    Raises
    ------
    CheckpointError
        Files are missing, damaged, of another kind, or do not belong together.
    """
    names, weight_map = files_of(folder)
    is_checked = is_verifying(verify)
    sums = read_sums(folder, CheckpointError) if is_checked else {}
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as pool:
        checks = [pool.submit(check_against_sums, folder / name, sums.get(name)) for name in names if is_checked]
        try:
            files = []
            for name in names:
                file = _opened(folder / name)
                if weight_map is not None:
                    check_shard(folder, name, file.described, weight_map)
                files.append(file)
            yield Stored(files)
        except BaseException:
            for check in checks:
                check.cancel()
            raise
        for check in checks:
            check.result()


def _opened(path: Path) -> _File:
    if path.suffix == ".safetensors":
        return TensorFile(path, CheckpointError, ADVICE)
    return _PyTorchFile(path)


class _PyTorchFile:
    """A file of ``torch.save``: mapped while some megabytes are read, then mapped anew; old ones are read at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_mapped = path, is_archive(path)
        self._tensors, self._n_read = read_pytorch(path, mmap=self._is_mapped), 0
        self.metadata: dict[str, str] = {}
        # What is no plain tensor stays what it is, so that it can be refused by its kind.
        self.described = {
            name: tensor.to("meta") if tensor.layout == torch.strided and not tensor.is_quantized else tensor
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if self._is_mapped and self._n_read > _MOST_MAPPED:
            self._tensors = {}
            self._tensors, self._n_read = read_pytorch(self._path, mmap=True), 0
        tensor = self._tensors[name]
        rows = tensor[start:stop] if tensor.ndim else tensor
        self._n_read += rows.numel() * rows.itemsize
        return rows.clone(memory_format=torch.contiguous_format)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        for start, stop in pieces(tensor):
            tensor[start:stop] = self.read(name, start, stop)
