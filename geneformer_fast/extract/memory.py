"""How much memory is in use: of this process, as the operating system says, or of a card, as its driver says."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from geneformer_kernels.cpu.onednn import keep_few_products

from geneformer_fast.errors import UnsupportedError

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/smaps")
# glibc's names for what mallopt sets (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Linux's advice that pages are not needed (mman.h): those of a file are read again when they are.
_MADV_DONTNEED = 4
# The first line of a mapping of a file's code that only this process sees: addresses, rights, offset, device, inode.
_CODE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ [1-9][0-9]* ", re.ASCII)
# Blocks from this size on are mapped, and given back when they are freed.
_MAPPED_BYTES = 128 << 10
# What glibc comes to by itself once a large block was freed.
_USUAL_MAPPED_BYTES = 32 << 20


class Memory(Protocol):
    """One kind of memory that a run fills."""

    #: Whose it is, within a sentence.
    owner: str
    #: Smallest number of bytes that are set aside for what was not foreseen.
    margin: int

    def used(self) -> int:
        """Bytes in use now."""

    def peak(self) -> int:
        """The most bytes in use so far."""

    def settle(self) -> None:
        """Give back what was freed and kept."""

    def within(self, limit: int) -> contextlib.AbstractContextManager[None]:
        """While a run goes on that should stay below a limit."""


class ProcessMemory:
    """Resident memory of this process: weights, results, Python, libraries and what they map."""

    owner = "this process"
    margin = 16 << 20

    def __init__(self) -> None:
        if not _STATUS.exists():
            raise UnsupportedError(
                "memory_budget (--memory-budget) on a CPU needs the figures of Linux in /proc/self/status, which are "
                "not here; choose a token_budget instead"
            )

    def used(self) -> int:
        """Bytes in use now (VmRSS)."""
        return _figure("VmRSS")

    def peak(self) -> int:
        """The most since the process began (VmHWM)."""
        return _figure("VmHWM")

    def settle(self) -> None:
        """Let the C library give back free memory that lies between what is in use, and let go of libraries' code.

        Importing torch, and compiling, touch 150 MB of code of which a batch uses a quarter. Pages are taken back one
        by one when they are used, from the system's cache of files.
        """
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
        _let_go_of_code(library)

    @contextlib.contextmanager
    def within(self, limit: int) -> Iterator[None]:
        """Meanwhile the C library maps large blocks, so that what is freed is given back at once.

        It would keep up to 64 MB for each thread otherwise, and what it has in pieces is of little use to the next
        batch: 413 MB instead of 345 for V1-10M in float32 (4,096 tokens). New pages for each batch cost some time.
        """
        keep_few_products()
        _map_from(_MAPPED_BYTES)
        try:
            yield
        finally:
            _map_from(_USUAL_MAPPED_BYTES)


class CardMemory:
    """Memory of a CUDA card that is taken: this process's context and allocator, and whatever else runs there."""

    margin = 64 << 20

    def __init__(self, device: torch.device) -> None:
        self.device, self.owner = device, f"what runs on {device}"

    def used(self) -> int:
        """Bytes in use now: what the allocator keeps for later can be used again."""
        return self._others() + int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        """What the allocator had reserved at most, with all that is none of it."""
        return self._others() + int(torch.cuda.max_memory_reserved(self.device))

    def _others(self) -> int:
        """Bytes that are not free (``torch.cuda.mem_get_info``), those aside that torch's allocator has reserved."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free) - int(torch.cuda.memory_reserved(self.device))

    def settle(self) -> None:
        """Let torch's allocator give back blocks that it keeps."""
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def within(self, limit: int) -> Iterator[None]:
        """Meanwhile torch's allocator reserves nothing beyond the limit: it uses again what it has, or fails."""
        _, total = torch.cuda.mem_get_info(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        share = min(max(limit - self._others(), 0) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def memory_of(device: torch.device) -> Memory:
    """The memory that an encoder on a device fills.

    Raises
    ------
    UnsupportedError
        Nobody says how much of it is in use.
    """
    if device.type == "cpu":
        return ProcessMemory()
    if device.type == "cuda":
        return CardMemory(device)
    raise UnsupportedError(
        f"memory_budget (--memory-budget) is for cpu and cuda, not for {device}; choose a token_budget instead"
    )


def _figure(name: str) -> int:
    """Bytes that the operating system states of this process under a name."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UnsupportedError(f"{_STATUS} has no {name}; choose a token_budget rather than a memory_budget")


def _let_go_of_code(library: Any) -> None:
    """Take pages of code, as it lies in files, out of this process's memory."""
    if not _MAPS.exists() or not hasattr(library, "madvise"):
        return
    for start, stop in _code_as_in_files(_MAPS.read_text(encoding="utf-8", errors="replace")):
        # What is refused (memory that is locked) stays.
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)


def _code_as_in_files(maps: str) -> list[tuple[int, int]]:
    """Addresses, from the system's table of mappings, of code that nobody changed: it can be read again."""
    found: list[tuple[int, int]] = []
    where: tuple[int, int] | None = None
    for line in maps.splitlines():
        name, _, rest = line.partition(":")
        if " " in name:  # the first line of a mapping: others begin with a name and a colon
            match = _CODE.match(line)
            where = None if match is None else (int(match[1], 16), int(match[2], 16))
        elif name == "Anonymous" and where is not None and rest.split()[0] == "0":
            found.append(where)
    return found


def _map_from(n_bytes: int) -> None:
    """Tell glibc from which size on blocks are mapped, and how much free memory may stay at the end of its heap."""
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries decide for themselves
        mallopt(_M_MMAP_THRESHOLD, n_bytes)
        mallopt(_M_TRIM_THRESHOLD, 2 * n_bytes)
