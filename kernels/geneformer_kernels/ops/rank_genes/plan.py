"""How ranking is launched on a target."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from geneformer_kernels.dispatch import Candidate, Impl, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer
from geneformer_kernels.target import Target

OP = "rank_genes"

#: The compiled loop keeps an entry's position in the 22 low bits of a word.
MAX_ENTRIES_PER_ROW = 1 << 22
#: Bits of a word that hold a gene's rank on a GPU; with more the proof in kernel.py does not hold.
MAX_RANK_BITS = 18
#: Bits of a cell's status on a GPU that make its result no result; ``device.wait`` says them in words.
WRONG_INDPTR, WRONG_COLUMN, WRONG_TOTAL, REPEATED_COLUMN = 1, 2, 4, 16
#: And the one of a cell that one sort leaves undecided.
IS_OPEN = 64
#: What the kernels count cells by: up to five sorts, cells without entries, wide cells, and the end of these.
N_BUCKETS = 8

#: Dtypes of counts the GPU kernels load; what they do not know is widened to one that holds it.
COUNT_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")
WIDENED_COUNTS = {"bool": "uint8", "uint32": "int64", "uint64": "float64", "bfloat16": "float32"}
#: What matrices of counts come in; only of these is every width compiled ahead of time.
USUAL_COUNTS = ("float32", "int32", "uint16")
#: Counts whose score rounds to float32 at first where n_counts is float32: numpy's rules of promotion.
NARROW_COUNTS = frozenset(("float32", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "bool"))


@dataclass(frozen=True)
class RankPlan:
    """Attributes
    ----------
    block_rows
        Cells a caller should hand over at once: enough to make the call's fixed cost vanish, few enough that blocks on
        their way between threads stay small.
    widest_row
        Entries of the widest row, which sizes a thread's workspace (28 bytes per entry).
    keep
        Most genes kept per cell.
    """

    block_rows: int
    widest_row: int
    keep: int


@dataclass(frozen=True)
class SortPlan:
    """One sort of ``width`` words, a power of two, by a fixed number of programs that share the cells of a bucket.

    Attributes
    ----------
    width, n_programs
        As above.
    rows
        The launch that reads rows of at most ``width`` entries, scores and sorts them.
    scored, settled
        The launches that sort entries that are scored already: what was selected, and what is sorted again.
    """

    width: int
    n_programs: int
    rows: Launch
    scored: Launch
    settled: Launch

    def constexprs(self, launch: Launch) -> dict[str, int]:
        """What the sort is compiled for: the width, and how many of its words a thread holds."""
        log_width, log_warps = self.width.bit_length() - 1, launch.num_warps.bit_length() - 1
        return {"LOG_N": log_width, "LOG_EACH": max(0, log_width - log_warps - 5)}


_WARPS_1, _WARPS_4, _WARPS_8 = (Launch(num_warps=n, num_stages=1, enable_fp_fusion=False) for n in (1, 4, 8))


@dataclass(frozen=True)
class DevicePlan:
    """Launches on a GPU.

    Attributes
    ----------
    sorts
        From narrow to wide, each twice as wide as the one before; a cell goes to the first that its row fits in.
    select_above
        Cells of rows with more entries are cut to the genes that are kept before they are sorted.
    n_select_programs, n_score_programs
        Programs that share these cells where they are selected, and all hard cells where they are scored and summed.
    settle_small
        Index in ``sorts`` of the one that rows up to its width take where they are sorted again; wider ones take the
        widest.
    list_block, list_rows
        Cells that a program lists by bucket, and blocks of them whose numbers it adds up at once.
    score_block, sum_block, select_block, place_block
        Entries, or tokens, that a program takes at once.
    repeats_tile
        Pairs of columns compared at once.
    listing, score, sum, select, place, repeats
        The launches of the kernels that count and list cells by bucket, and of those of these names.
    """

    sorts: tuple[SortPlan, ...]
    select_above: int
    n_select_programs: int
    n_score_programs: int
    settle_small: int
    list_block: int = 256
    list_rows: int = 64
    score_block: int = 512
    sum_block: int = 128
    select_block: int = 2048
    place_block: int = 1024
    repeats_tile: tuple[int, int] = (32, 64)
    listing: Launch = _WARPS_4
    score: Launch = _WARPS_4
    sum: Launch = _WARPS_1
    select: Launch = _WARPS_8
    place: Launch = _WARPS_4
    repeats: Launch = _WARPS_4

    @property
    def log_first(self) -> int:
        """The narrowest sort takes this power of two."""
        return self.sorts[0].width.bit_length() - 1

    def sort_of_selected(self, keep: int) -> SortPlan:
        """The sort of cells that were selected first: as wide as what is kept, or the widest, slab after slab."""
        return next((sort for sort in self.sorts if sort.width >= keep), self.sorts[-1])


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    is_cpu = target.kind == "cpu"
    numba = Candidate(
        Impl.NUMBA,
        is_cpu and dtype == "float64",
        "compiled loop per cell: a fast sort, close values compared exactly in float64"
        if is_cpu
        else "the compiled loop runs on the CPU only",
    )
    where = "on the CPU: Apple's devices have no float64" if target.kind == "mps" else "any device"
    reference = Candidate(Impl.REFERENCE, True, f"stable sorts in plain torch, {where}")
    triton = triton_candidate(OP, dtype, target, "one sort per cell, exact in float64")
    return (numba, reference, triton) if is_cpu else (triton, reference, numba)


def plan(*, widest_row: int, keep: int) -> RankPlan:
    """The sizes of one launch of the compiled loop.

    Blocks of 1,024 cells: a call's fixed cost of about 0.1 ms is 2 % of ranking 1,024 cells of 700 entries (2026-11-21,
    EPYC), and such a block of CSR is 6 MB, 120 MB if every cell had 10,000 entries.

    Raises
    ------
    ValueError
        A row is too wide, or nothing is to be kept.
    """
    if widest_row > MAX_ENTRIES_PER_ROW:
        raise ValueError(f"a row has {widest_row} entries; ranking takes at most {MAX_ENTRIES_PER_ROW}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    return RankPlan(block_rows=1024, widest_row=widest_row, keep=keep)


# Width -> warps: 8 words per thread, so that three of the exchange distances stay inside a thread, and 64 registers, so
# that 1,024 threads share a multiprocessor. Without the bound the compiler takes up to 128 of them. Where rows are
# scored too, those words leave too few registers (up to 124 bytes of them spilled on sm_90): there it is 16 words and
# 128 registers for half as many threads, which is as many words on a multiprocessor, and at most 60 bytes (sm_86).
_WARPS = {512: 2, 1024: 4, 2048: 8, 4096: 16, 8192: 32}


def device_plan(target: Target) -> DevicePlan:
    """The launches on a GPU (or in Triton's interpreter).

    A sort passes its words through shared memory, 8 bytes each; Turing's 64 KB would just hold 8,192, but nothing else.
    For Volta the compiler spills at 64 registers, and threads of the widest sort cannot have more. Two rounds of
    programs per multiprocessor even out the end.
    """
    is_cpu = target.kind == "cpu"
    is_volta = target.kind == "cuda" and target.sm < 75
    widths = [width for width in _WARPS if is_cpu or 10 * width <= target.smem_bytes]
    widths = [width for width in widths if not is_volta or _WARPS[width] <= 16]
    sorts = []
    for width in widths:
        n_warps = _WARPS[width]
        scored = Launch(num_warps=n_warps, num_stages=1, enable_fp_fusion=False, max_registers=112 if is_volta else 64)
        rows = replace(scored, num_warps=n_warps // 2, max_registers=224 if is_volta else 128)
        # Rarely needed, so it may take what registers it likes.
        settled = replace(scored, max_registers=None)
        sorts.append(SortPlan(width, 1 if is_cpu else target.n_sms * 64 // n_warps, rows, scored, settled))
    return DevicePlan(
        tuple(sorts),
        select_above=widths[-1],
        n_select_programs=1 if is_cpu else target.n_sms * 8,
        n_score_programs=1 if is_cpu else target.n_sms * 16,
        settle_small=widths.index(2048),
    )


class _CountCase(NamedTuple):
    """Dtypes that entries come in, and whether scores are quotients."""

    counts: str
    n_counts: str
    is_division: bool
    indices: str

    @property
    def problem(self) -> str:
        """A text that tells it from the others."""
        how = f"{self.n_counts} n_counts{', division' if self.is_division else ''}"
        return f"{self.counts} counts, {how}, {self.indices} columns"

    @property
    def is_single(self) -> bool:
        """Whether the first steps of the score round to float32."""
        return self.n_counts == "float32" and self.counts in NARROW_COUNTS

    @property
    def is_rounded(self) -> bool:
        """Whether sums of counts round to float32."""
        return self.counts in ("float16", "float32")


def _count_cases() -> Iterator[_CountCase]:
    for case in itertools.product(COUNT_DTYPES, ("float64", "float32"), (False, True), ("int32", "int64")):
        yield _CountCase(*case)


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel as some call launches it on this target.

    The kernels that score exist per dtype of counts and arithmetic. For the one that also sorts this is every case at
    its smallest width, and at others those of :data:`USUAL_COUNTS`. The rest see scores only, whatever they came from.
    Ranking as a whole counts as float64, whose order it gives.
    """
    launches = device_plan(target)
    cases: list[KernelCase] = []

    def add(kernel: str, problem: str, launch: Launch, arguments: str, constexprs: dict) -> None:
        signature = {}
        for argument in arguments.split():
            name, _, kind = argument.partition(":")
            signature[name] = kind if kind == "i32" else pointer(kind)
        pointers = frozenset(name for name in signature if name.endswith("_ptr"))
        cases.append(KernelCase(OP, kernel, problem, "float64", signature, constexprs, launch, pointers))

    shared = "shared_x_ptr:float64 shared_ranks_ptr:int32"
    columns = "codes_ptr:int32 weights_ptr:float64"
    results = "sizes_ptr:int32 status_ptr:int32"
    scratch = "bits_ptr:int64 ranks_ptr:int32"
    items = "items_ptr:int32 bounds_ptr:int32"
    cells = f"{scratch} indptr_ptr:int64 {results} {items} offsets_ptr:int64 values_ptr:int64"
    output = "keep:i32 first:i32 rank_bits:i32 capacity:i32"
    for is_hard in (False, True):
        which = "hard cells" if is_hard else "all cells"
        buckets = {"IS_HARD": is_hard, "LOG_FIRST": launches.log_first, "N_SORTS": len(launches.sorts),
                   "BLOCK": launches.list_block}  # fmt: skip
        numbers = "n_cells:i32 n_entries:i32 select_above:i32"
        add(
            "rank_genes_count_kernel", which, launches.listing,
            f"indptr_ptr:int64 {results} counts_ptr:int32 {numbers}", buckets,
        )  # fmt: skip
        add(
            "rank_genes_list_kernel", which, launches.listing,
            f"indptr_ptr:int64 status_ptr:int32 counts_ptr:int32 {items} {numbers} n_blocks:i32",
            {**buckets, "ROWS": launches.list_rows},
        )  # fmt: skip
    for case in _count_cases():
        entries = f"indptr_ptr:int64 indices_ptr:{case.indices} data_ptr:{case.counts} n_counts_ptr:{case.n_counts}"
        arithmetic = {"IS_SINGLE": case.is_single, "IS_DIVISION": case.is_division}
        add(
            "rank_genes_score_kernel", case.problem, launches.score,
            f"{entries} {columns} {items} {scratch} {shared} {results} n_shared_ptr:int32 n_columns:i32"
            " last_bucket:i32",
            {**arithmetic, "BLOCK": launches.score_block},
        )  # fmt: skip
        for i_sort, sort in enumerate(launches.sorts):
            # Wide sorts take up to minutes to compile, and what differs between cases is not how they sort.
            is_usual = case.indices == "int32" and case.n_counts == "float64" and case.counts in USUAL_COUNTS
            if i_sort > 0 and not (is_usual and (case.counts == "float32" or not case.is_division)):
                continue
            for has_shared in (False, True) if i_sort == 0 and is_usual else (True,):
                for out in ("int32", "int64") if i_sort == 0 and is_usual else ("int32",):
                    problem = f"{sort.width} words, {case.problem}, {'padded' if out == 'int64' else 'packed'}"
                    add(
                        "rank_genes_cells_kernel", problem + ("" if has_shared else ", no shared genes"), sort.rows,
                        f"{entries} {columns} tokens_ptr:int32 classes_ptr:int32 {items} {shared} bits_ptr:int64"
                        f" {results} out_ptr:{out} n_columns:i32 {output} last:i32 padded_length:i32 i_bucket:i32",
                        {**arithmetic, "IS_ROUNDED": case.is_rounded, "HAS_SHARED": has_shared,
                         **sort.constexprs(sort.rows)},
                    )  # fmt: skip
    for n_counts, is_single in (("float64", False), ("float32", False), ("float32", True)):
        for is_division in (False, True):
            for is_rounded in (False, True):
                if is_rounded and n_counts == "float32" and not is_single:
                    continue  # float32 counts over float32 totals take float32 steps
                add(
                    "rank_genes_sum_kernel",
                    f"{'float32' if is_rounded else 'other'} counts, {n_counts} n_counts{', division' * is_division}"
                    f"{', float32 steps' * is_single}",
                    launches.sum,
                    f"indptr_ptr:int64 n_counts_ptr:{n_counts} weights_ptr:float64 {items} {shared} n_shared_ptr:int32"
                    f" {scratch} {results} last_bucket:i32",
                    {"IS_SINGLE": is_single, "IS_DIVISION": is_division, "IS_ROUNDED": is_rounded,
                     "BLOCK": launches.sum_block},
                )  # fmt: skip
    tile = dict(zip(("BLOCK_I", "BLOCK_J"), launches.repeats_tile, strict=True))
    for index in ("int32", "int64"):
        add(
            "rank_genes_repeats_kernel", f"{index} columns", launches.repeats,
            f"indptr_ptr:int64 indices_ptr:{index} status_ptr:int32", tile,
        )  # fmt: skip
    add(
        "rank_genes_place_kernel", "packed cells", launches.place,
        "staged_ptr:int32 indptr_ptr:int64 sizes_ptr:int32 offsets_ptr:int64 values_ptr:int64"
        " keep:i32 first:i32 last:i32 capacity:i32",
        {"BLOCK": launches.place_block},
    )  # fmt: skip
    for sort in launches.sorts:
        add(
            "rank_genes_select_kernel", f"slabs of {sort.width}", launches.select,
            f"{cells} {output} i_bucket:i32 needed:i32", {"WIDTH": sort.width, "BLOCK": launches.select_block},
        )  # fmt: skip
        add(
            "rank_genes_sort_kernel", f"{sort.width} words", sort.scored,
            f"{cells} tokens_ptr:int32 classes_ptr:int32 {output} last:i32 i_bucket:i32",
            sort.constexprs(sort.scored),
        )  # fmt: skip
        add(
            "rank_genes_settle_kernel", f"{sort.width} words", sort.settled,
            f"{cells} tokens_ptr:int32 {output} first_bucket:i32 last_bucket:i32 is_selected:i32",
            sort.constexprs(sort.settled),
        )  # fmt: skip
    return tuple(cases)
