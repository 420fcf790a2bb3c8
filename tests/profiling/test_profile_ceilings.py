"""Ceilings are measured once, as the device is now, and what a device does not have is a reason."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from geneformer_kernels.target import Target

from geneformer_fast.profiling import ceilings, datasheets
from geneformer_fast.profiling.ceilings import copy_ceiling, measure_ceilings, product_ceiling
from geneformer_fast.profiling.datasheets import DATASHEETS, datasheet_of, with_precision
from geneformer_fast.profiling.figures import Missing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and copies of milliseconds, remembered for one test."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_found", {})


def test_ceilings_are_finite_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_ceilings("cpu", ("float32", "bfloat16"), seconds=0.01)
    for figure in (*found.products.values(), found.copy_gbps):
        assert not isinstance(figure, Missing)
        assert 0 < figure < 1e6
        assert math.isfinite(figure)
    assert found.datasheet is None
    monkeypatch.setattr(ceilings, "_seconds_of", lambda *_: pytest.fail("measured again"))
    assert measure_ceilings("cpu", ("bfloat16", "float32")).products == found.products
    assert copy_ceiling("cpu") == found.copy_gbps


def test_the_best_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 in 1 us and 128 in 16 us: the smaller one was twice as fast."""
    times = iter([1e-6, 16e-6])
    monkeypatch.setattr(ceilings, "_seconds_of", lambda *_: next(times))
    assert product_ceiling("cpu", "float32") == 2 * 64**3 / 1e-6 / 1e12


def test_slow_products_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_seconds_of", lambda *_: 10.0)
    assert product_ceiling("cpu", "float16") == 2 * 64**3 / 10 / 1e12


def test_the_run_notices_nothing() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        product_ceiling("cpu", "float32", seconds=0.01)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_products_are_in_the_dtype_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's autocast says."""
    seen: list[torch.dtype] = []
    stock = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (result := stock(a, b), seen.append(result.dtype))[0])
    with torch.autocast("cpu", torch.bfloat16):
        product_ceiling("cpu", "float32", seconds=0.01)
    assert set(seen) == {torch.float32}


def test_threads_and_precision_make_another_ceiling() -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        keys = set()
        for n, how in ((1, "highest"), (2, "highest"), (2, "high")):
            torch.set_num_threads(n)
            torch.set_float32_matmul_precision(how)
            keys.add(ceilings._key(CPU))
        assert len(keys) == 3
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_int8_on_a_cpu_is_the_product_our_models_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    stock = ceilings.int8_linear
    monkeypatch.setattr(
        ceilings, "int8_linear", lambda x, *a, **o: (modes.append((x.dtype, o["mode"])), stock(x, *a, **o))[1]
    )
    figure = product_ceiling("cpu", "int8", seconds=0.01)
    if ceilings.target_of(CPU).int8_instructions is None:
        assert isinstance(figure, Missing) or figure > 0
        return
    assert not isinstance(figure, Missing)
    assert figure > 0
    assert set(modes) == {(torch.int8, "dynamic")}


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("int8", "refused"), ("fp8", "refused"), ("float99", "no products of float99"), ("int32", "no products of int32")],
)
def test_what_a_device_does_not_have_is_a_reason(dtype: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "target_of", lambda device: Target.cpu())
    figure = measure_ceilings("cpu", (dtype,), seconds=0.01).product(dtype)
    assert isinstance(figure, Missing)
    assert said in str(figure)


def test_a_product_that_fails_is_a_reason_and_a_larger_one_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(most: int) -> Any:
        def seconds(device: torch.device, run: Any, seconds: float) -> float:
            n = len(run())
            if n > most:
                raise RuntimeError("out of memory\nand more")
            return 1e-6

        return seconds

    monkeypatch.setattr(ceilings, "_seconds_of", fails(64))
    assert product_ceiling("cpu", "float32") == 2 * 64**3 / 1e-6 / 1e12
    monkeypatch.setattr(ceilings, "_found", {})
    monkeypatch.setattr(ceilings, "_seconds_of", fails(0))
    assert str(product_ceiling("cpu", "float32")).endswith("cannot run here (out of memory))")


def test_other_devices_have_none() -> None:
    assert "not on meta" in str(product_ceiling("meta", "float32"))
    assert "not on meta" in str(copy_ceiling("meta"))


def test_datasheets_are_dense_and_say_where_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({sheet.name for sheet in DATASHEETS.values()}) == 19
    for name, sheet in DATASHEETS.items():
        products = sheet.products
        assert "NVIDIA" in sheet.document, name
        assert 200 < sheet.memory_gbps < 5000
        assert products["float32"] < products["float16"]
        assert products.get("bfloat16", products["float16"]) == products["float16"]
        for eight_bits in (products.get("int8"), products.get("fp8")):
            ratio = 2.0 if eight_bits is None else eight_bits / products["float16"]
            assert ratio == pytest.approx(4.0 if "RTX" in name and eight_bits == products["int8"] else 2.0, rel=0.02)
        # Turing and Volta have no bfloat16 at all, Volta none of int8.
        assert ("bfloat16" in products) == ("V100" not in name and "T4" not in name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert datasheet_of(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert datasheet_of(torch.device("cuda")) == DATASHEETS["NVIDIA H200"]
    assert datasheet_of(CPU) is None


def test_float32_promises_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = DATASHEETS["NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(datasheets.torch, "get_float32_matmul_precision", lambda: "high")
    rounded = with_precision(sheet)
    assert rounded is not None
    assert rounded.products["float32"] == 494.5
    assert sheet.products["float32"] == 67
    assert with_precision(DATASHEETS["Tesla T4"]) == DATASHEETS["Tesla T4"]


def test_a_card_is_measured_by_its_events_and_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(samples=lambda run, n: [1.0, 2.0, 30.0][:n], wait=lambda: None)
    monkeypatch.setattr(ceilings, "clock_of", lambda device, has_lead: clock)
    assert ceilings._seconds_of(torch.device("cuda"), lambda: None, 0.0) == 2e-3
    assert ceilings._seconds_of(CPU, lambda: None, 0.0) == 1e-3
