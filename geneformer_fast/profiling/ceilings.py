"""What a device reaches at most, measured here and now: large matrix products by dtype, and a large copy.

So no table of cards is needed, and a share of a ceiling means the same everywhere: of what a good library's product
reaches on this device, with these threads, at the clocks it holds today.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from geneformer_kernels import int8_linear, quantize_rows
from geneformer_kernels.target import target_of

from geneformer_fast.profiling.clock import Run, clock_of
from geneformer_fast.profiling.datasheets import datasheet_of
from geneformer_fast.profiling.figures import Ceilings, Figure, Missing

#: Matrices are square, of the sizes from the first to the second, doubled, as far as the time goes.
SIZES = {"cuda": (2048, 8192), "cpu": (512, 4096)}
#: Bytes that are copied: more than any cache holds, and a small part of a card's or a machine's memory.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
LEAST_REPEATS = 3

_found: dict[tuple[object, ...], Figure] = {}


def measure_ceilings(device: torch.device | str, dtypes: Iterable[str], *, seconds: float = 0.5) -> Ceilings:
    """Ceilings of a device, each measured once per process and number of threads.

    Parameters
    ----------
    device
        An idle one: what else runs there lowers them.
    dtypes
        Names as torch has them, ``"int8"`` and ``"fp8"``.
    seconds
        About how long each is measured.

    Returns
    -------
    Ceilings
        Missing, with the reason, for dtypes whose products this device does not have. A copy takes 512 MB of memory on
        a CPU for a moment, and 2 GiB on a card.
    """
    place = torch.device(device)
    products = {dtype: product_ceiling(place, dtype, seconds=seconds) for dtype in dict.fromkeys(dtypes)}
    return Ceilings(products, copy_ceiling(place, seconds=seconds), datasheet_of(place))


def product_ceiling(device: torch.device | str, dtype: str, *, seconds: float = 0.5) -> Figure:
    """10**12 operations/s of large products of one dtype: the best of a few sizes."""
    place = torch.device(device)
    key = ("product", dtype, *_key(place))
    if key not in _found:
        _found[key] = _measured(lambda: _best_product(place, dtype, seconds), place)
    return _found[key]


def copy_ceiling(device: torch.device | str, *, seconds: float = 0.5) -> Figure:
    """10**9 bytes/s, read and written, of a large copy."""
    place = torch.device(device)
    key = ("copy", *_key(place))
    if key not in _found:
        _found[key] = _measured(lambda: _copy(place, seconds), place)
    return _found[key]


def _key(device: torch.device) -> tuple[object, ...]:
    """What a ceiling depends on besides: the device, the threads of a CPU, and how float32 is multiplied."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return device.type, index, threads, torch.get_float32_matmul_precision()


def _measured(measure: Callable[[], Figure], device: torch.device) -> Figure:
    """Outside of the caller's autocast and gradients; on devices whose clock is known."""
    if device.type not in SIZES:
        return Missing(f"ceilings are measured on CPUs and CUDA cards, not on {device.type}")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return measure()


def _best_product(device: torch.device, dtype: str, seconds: float) -> Figure:
    try:
        make = _maker(device, dtype)
    except (AttributeError, RuntimeError) as error:
        return Missing(_first_line(error))
    if isinstance(make, Missing):
        return make
    size, most = SIZES[device.type]
    best, begin = 0.0, time.perf_counter()
    while True:
        try:
            run = make(size)
            took_s = _seconds_of(device, run, seconds / 3)
        except (RuntimeError, NotImplementedError) as error:  # no such product here, or no room for a larger one
            return best / 1e12 if best else Missing(f"products of {dtype} cannot run here ({_first_line(error)})")
        best = max(best, 2.0 * size**3 / took_s)
        size *= 2
        # The next one takes eight times as long, and three runs at least.
        is_over = time.perf_counter() - begin + LEAST_REPEATS * 8 * took_s > 2 * seconds
        if size > most or is_over:
            return best / 1e12


def _maker(device: torch.device, dtype: str) -> Callable[[int], Run] | Missing:
    """What makes a product of a size, ready to run."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's random numbers
    target = target_of(device)

    def drawn(n: int) -> torch.Tensor:  # products of zeros would run faster
        return torch.randn(n, n, device=device, generator=generator)

    def integers(n: int) -> torch.Tensor:
        return torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device, generator=generator)

    if dtype == "int8":
        if not target.has_int8_product and not (target.kind == "cpu" and target.int8_instructions):
            return Missing("refused: this device has no product of int8; weights of eight bits are widened")
        if device.type == "cuda":
            return lambda n: _bound(torch._int_mm, integers(n), integers(n).T)
        return lambda n: _int8_on_cpu(drawn(n), drawn(n), torch.bfloat16 if target.has_fast_bf16 else torch.float32)
    if dtype == "fp8":
        if not target.has_fp8_product:
            return Missing("refused: this device has no product of float8; weights of eight bits are widened")
        scale = torch.ones((), device=device)
        return lambda n: _bound(
            torch._scaled_mm, *(drawn(n).to(torch.float8_e4m3fn), drawn(n).to(torch.float8_e4m3fn).T),
            scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16,
        )  # fmt: skip
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        return Missing(f"there are no products of {dtype}")
    if dtype == "bfloat16" and target.kind == "cuda" and target.sm < 80:
        return Missing(f"{target.name} has no bfloat16")
    return lambda n: _bound(torch.mm, drawn(n).to(found), drawn(n).to(found).T)


def _bound(function: Callable[..., object], *arguments: object, **options: object) -> Run:
    return lambda: function(*arguments, **options)


def _int8_on_cpu(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> Run:
    """The product our quantized models run on: rows of int8, sums scaled into the compute dtype."""
    (rows, row_scale), (weight_q, weight_scale) = quantize_rows(x), quantize_rows(weight)
    return lambda: int8_linear(rows, weight_q, weight_scale, x_scale=row_scale, mode="dynamic", out_dtype=out_dtype)


def _copy(device: torch.device, seconds: float) -> Figure:
    n_bytes = COPY_BYTES[device.type]
    try:
        source = torch.full((n_bytes // 8,), 1, dtype=torch.int64, device=device)
        target = torch.zeros_like(source)
        return 2 * n_bytes / _seconds_of(device, lambda: target.copy_(source), seconds) / 1e9
    except RuntimeError as error:
        return Missing(f"a copy of {n_bytes >> 20} MiB cannot run here ({_first_line(error)})")


def _seconds_of(device: torch.device, run: Run, seconds: float) -> float:
    """Seconds of one run: on a card the median, because clocks sink under load; elsewhere the best, for neighbours."""
    clock = clock_of(device, has_lead=False)
    for _ in range(2):
        run()
    clock.wait()
    first = clock.samples(run, LEAST_REPEATS)
    n_more = int(seconds * 1e3 / max(float(np.median(first)), 1e-3)) - LEAST_REPEATS
    times = first + clock.samples(run, int(np.clip(n_more, 0, 100)))
    return float(np.median(times) if device.type == "cuda" else min(times)) / 1e3


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
