"""How ranking is launched on a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from geneformer_kernels.dispatch import Candidate, Impl, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer
from geneformer_kernels.target import Target

OP = "rank_genes"

#: The compiled loop keeps an entry's position in the 22 low bits of a word.
MAX_ENTRIES_PER_ROW = 1 << 22
#: Bits of a word that hold a gene's rank on a GPU; with more the proof in kernel.py does not hold.
MAX_RANK_BITS = 18
#: Bits of a cell's status on a GPU that make its result no result, in the order in which they are told.
WRONG_INDPTR, WRONG_COLUMN, WRONG_TOTAL, REPEATED_COLUMN = 1, 2, 4, 16
#: And the one of a cell that one sort leaves undecided.
IS_OPEN = 64

#: Dtypes of counts the GPU kernels load; what they do not know is widened to one that holds it.
COUNT_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")
WIDENED_COUNTS = {"bool": "uint8", "uint32": "int64", "uint64": "float64", "bfloat16": "float32"}
#: Counts whose score rounds to float32 at first where n_counts is float32: numpy's rules of promotion.
NARROW_COUNTS = frozenset(("float32", "float16", "int8", "uint8", "int16", "uint16", "bool"))


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
    """One sort of ``width`` words, a power of two, by a fixed number of programs that share the cells of a bucket."""

    width: int
    n_programs: int
    launch: Launch
    settle_launch: Launch

    @property
    def constexprs(self) -> dict[str, int]:
        """What the sort is compiled for: the width, and how many of its words a thread holds."""
        log_width, log_warps = self.width.bit_length() - 1, self.launch.num_warps.bit_length() - 1
        return {"LOG_N": log_width, "LOG_EACH": max(0, log_width - log_warps - 5)}


_WARPS_1, _WARPS_4, _WARPS_8 = (Launch(num_warps=n, num_stages=1, enable_fp_fusion=False) for n in (1, 4, 8))


@dataclass(frozen=True)
class DevicePlan:
    """Launches on a GPU.

    Attributes
    ----------
    sorts
        From narrow to wide, each twice as wide as the one before; a cell goes to the first it fits in.
    select_above
        Cells of more entries are cut to the genes that are kept before they are sorted.
    n_select_programs
        Programs that share these cells.
    settle_small
        Index in ``sorts`` of the one that cells up to its width take where they are sorted again; wider ones take the
        widest.
    score_block, sum_block, select_block
        Entries a program takes at once.
    repeats_tile
        Pairs of columns compared at once.
    score, sum, select, repeats
        The launches of the kernels of these names.
    """

    sorts: tuple[SortPlan, ...]
    select_above: int
    n_select_programs: int
    settle_small: int
    score_block: int = 512
    sum_block: int = 128
    select_block: int = 2048
    repeats_tile: tuple[int, int] = (32, 64)
    score: Launch = _WARPS_4
    sum: Launch = _WARPS_1
    select: Launch = _WARPS_8
    repeats: Launch = _WARPS_4

    def sort_of_selected(self, keep: int) -> SortPlan:
        """The sort of cells that were selected first: as wide as what is kept, or the widest, slab after slab."""
        return next((sort for sort in self.sorts if sort.width >= keep), self.sorts[-1])


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    is_cpu = target.kind == "cpu"
    numba = Candidate(
        Impl.NUMBA,
        is_cpu and dtype == "float64",
        "compiled loop per cell, radix sort with exact float64 settlement"
        if is_cpu
        else "the compiled loop runs on the CPU only",
    )
    reference = Candidate(Impl.REFERENCE, True, "stable sorts in plain torch, any device")
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
# that 1,024 threads share a multiprocessor. Without the bound the compiler takes up to 128 of them.
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
        launch = Launch(
            num_warps=_WARPS[width], num_stages=1, enable_fp_fusion=False, max_registers=112 if is_volta else 64
        )
        # Rarely needed, so it may take what registers it likes.
        settle_launch = replace(launch, max_registers=None)
        sorts.append(SortPlan(width, 1 if is_cpu else target.n_sms * 64 // _WARPS[width], launch, settle_launch))
    return DevicePlan(
        tuple(sorts),
        select_above=widths[-1],
        n_select_programs=1 if is_cpu else target.n_sms * 8,
        settle_small=widths.index(2048),
    )


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel as some call launches it on this target.

    The entries' kernels exist per dtype of counts and arithmetic; the sorts see scores only, whatever they came from.
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

    scratch = "bits_ptr:int64 ranks_ptr:int32"
    for counts in COUNT_DTYPES:
        for n_counts in ("float64", "float32"):
            is_single = n_counts == "float32" and counts in NARROW_COUNTS
            for is_division in (False, True):
                arithmetic = {"IS_SINGLE": is_single, "IS_DIVISION": is_division}
                how = f"{n_counts} n_counts{', division' if is_division else ''}"
                for index in ("int32", "int64"):
                    add(
                        "rank_genes_score_kernel", f"{counts} counts, {how}, {index} columns", launches.score,
                        f"indptr_ptr:int64 indices_ptr:{index} data_ptr:{counts} n_counts_ptr:{n_counts}"
                        f" codes_ptr:int32 weights_ptr:float64 {scratch} shared_x_ptr:float64 shared_ranks_ptr:int32"
                        " sizes_ptr:int32 n_shared_ptr:int32 status_ptr:int32 n_entries:i32 n_columns:i32",
                        {**arithmetic, "BLOCK": launches.score_block},
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
                    "indptr_ptr:int64 n_counts_ptr:" + n_counts + " weights_ptr:float64 shared_x_ptr:float64"
                    f" shared_ranks_ptr:int32 n_shared_ptr:int32 {scratch} sizes_ptr:int32 status_ptr:int32",
                    {"IS_SINGLE": is_single, "IS_DIVISION": is_division, "IS_ROUNDED": is_rounded,
                     "BLOCK": launches.sum_block},
                )  # fmt: skip
    tile = dict(zip(("BLOCK_I", "BLOCK_J"), launches.repeats_tile, strict=True))
    for index in ("int32", "int64"):
        add(
            "rank_genes_repeats_kernel", f"{index} columns", launches.repeats,
            f"indptr_ptr:int64 indices_ptr:{index} status_ptr:int32", tile,
        )  # fmt: skip
    cells = "indptr_ptr:int64 sizes_ptr:int32 items_ptr:int64 bounds_ptr:int64 offsets_ptr:int64"
    for sort in launches.sorts:
        add(
            "rank_genes_select_kernel", f"slabs of {sort.width}", launches.select,
            f"{scratch} {cells} values_ptr:int64 keep:i32 first:i32 rank_bits:i32 capacity:i32 i_bucket:i32",
            {"WIDTH": sort.width, "BLOCK": launches.select_block},
        )  # fmt: skip
        add(
            "rank_genes_sort_kernel", f"{sort.width} words", sort.launch,
            f"{scratch} {cells} status_ptr:int32 tokens_ptr:int32 classes_ptr:int32 values_ptr:int64 keep:i32 first:i32"
            " last:i32 rank_bits:i32 capacity:i32 i_bucket:i32 is_selected:i32",
            dict(sort.constexprs),
        )  # fmt: skip
        add(
            "rank_genes_settle_kernel", f"{sort.width} words", sort.settle_launch,
            f"{scratch} {cells} tokens_ptr:int32 values_ptr:int64 keep:i32 first:i32 rank_bits:i32 capacity:i32"
            " first_bucket:i32 last_bucket:i32 is_selected:i32",
            dict(sort.constexprs),
        )  # fmt: skip
    return tuple(cases)
