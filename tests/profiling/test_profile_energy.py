"""Energy against a made-up driver and a made-up tree of Linux: every absence and every error is a reason."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from geneformer_fast.profiling.figures import Energy, Missing
from geneformer_fast.profiling.meters import cards, counters, energy
from geneformer_fast.profiling.meters.cards import Card, find_card, in_words
from geneformer_fast.profiling.meters.counters import (
    CardCounter,
    CardPower,
    Rapl,
    ZeusCounter,
    find_card_counter,
    find_rapl,
)
from geneformer_fast.profiling.meters.energy import Meter, energy_meter
from geneformer_fast.profiling.meters.sampling import Sampler

UUID = "d7f3a5c1-0000-1111-2222-333344445555"


class NVMLError(Exception):
    """As the driver's binding raises it."""


class Nvml(ModuleType):
    """A driver of made-up cards. ``fails`` names functions that raise, and with what."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.fails: dict[str, str] = {}
        self.handles = {f"GPU-{UUID}": "card 2", "GPU-other": "card 0"}
        self.watts, self.joules_at = 300.0, 1000.0
        self.n_open, self.throttle, self.slices = 0, 0, False
        self.began = time.perf_counter()
        self.energy: Callable[[], float] = lambda: self.joules_at + 300.0 * (time.perf_counter() - self.began)

    def said(self, name: str, value: Any) -> Any:
        if name in self.fails:
            raise NVMLError(self.fails[name])
        return value

    def nvmlInit(self) -> None:
        self.said("nvmlInit", None)
        self.n_open += 1

    def nvmlShutdown(self) -> None:
        self.n_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.handles:
            raise NVMLError("Not Found")
        return self.handles[uuid]

    def nvmlDeviceGetCount(self) -> int:
        return len(self.handles)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.handles.values())[index]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "card 2"
        return self.said("nvmlDeviceGetTotalEnergyConsumption", round(self.energy() * 1e3))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self.said("nvmlDeviceGetPowerUsage", round(self.watts * 1e3))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.said("nvmlDeviceGetClockInfo", 1980 if kind == 1 else 2619)

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1995

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return self.said("nvmlDeviceGetTemperature", 61)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self.said("nvmlDeviceGetEnforcedPowerLimit", 700_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self.said("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=97, memory=40))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.said("nvmlDeviceGetCurrentClocksThrottleReasons", self.throttle)

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return self.said("nvmlDeviceGetMigMode", [int(self.slices), 0])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvml]:
    driver = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 12345)
    yield driver
    assert driver.n_open == 0, "NVML was not let go"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of hundredths of a second are long enough."""
    monkeypatch.setattr(energy, "LEAST_WINDOW_S", 0.01)


def card_of(nvml: Nvml) -> Card:
    nvml.nvmlInit()
    return Card(nvml, "card 2", "card 2", is_slice=False)


def measured(seconds: float = 0.2, n_cells: int = 10, device: str = "cuda") -> Energy:
    meter = energy_meter(device)
    try:
        meter.start()
        time.sleep(seconds)
        return meter.stop(n_cells)
    finally:
        meter.close()


def test_figures_of_a_card(nvml: Nvml, quick: None) -> None:
    """300 W by the counter: joules, watts, and per cell, by hand. The card is found whatever its number is here."""
    found = measured()
    assert found.counter == "NVML energy counter"
    assert found.watts == pytest.approx(300, rel=0.05)
    assert found.joules == pytest.approx(300 * found.window_s, rel=0.05)
    assert found.joules_per_cell == pytest.approx(found.joules / 10)
    assert found.cells_per_kwh == pytest.approx(3.6e6 / found.joules_per_cell)
    assert found.kwh_per_million_cells == pytest.approx(1e6 / found.cells_per_kwh)
    assert found.idle_watts == Missing("idle power was not measured")
    assert found.state == {
        "sm_mhz": 1980.0,
        "sm_mhz_at_most": 1995.0,
        "memory_mhz": 2619.0,
        "temperature_celsius": 61.0,
        "power_limit_watts": 700.0,
        "time_with_kernels_percent": 97.0,
        "time_with_memory_traffic_percent": 40.0,
        "throttle_reasons": "none",
    }


def test_idle_power_and_what_was_seen_over_time(nvml: Nvml, quick: None) -> None:
    meter = energy_meter("cuda:0")
    assert meter.idle(0.1) == pytest.approx(300, rel=0.05)
    meter.start()
    time.sleep(0.25)
    found = meter.stop(1)
    meter.close()
    assert found.idle_watts == pytest.approx(300, rel=0.05)
    series = meter.series
    assert len(series.time_s) >= 2
    assert set(series.values["power_watts"]) == {300.0}
    assert set(series.values["memory_bytes"]) == {12345.0}
    assert set(series.values) == {
        "power_watts",
        "memory_bytes",
        "time_with_kernels_percent",
        "sm_mhz",
        "temperature_celsius",
    }


def test_a_window_that_is_too_short_has_no_energy(nvml: Nvml) -> None:
    found = measured(0.01)
    assert found.joules == Missing("the window was 0.0 s; counters need 2 s")
    assert found.watts == found.joules_per_cell == found.kwh_per_million_cells == found.joules
    assert found.window_s < 2


@pytest.mark.parametrize(
    ("counter", "said"),
    [(lambda: 1000.0, "stood still"), (lambda: 2e9 - time.perf_counter(), "went back")],
)
def test_a_counter_that_cannot_be_right(counter: Callable[[], float], said: str, nvml: Nvml, quick: None) -> None:
    nvml.energy = counter
    assert said in str(measured(0.05).joules)


def test_without_a_counter_power_is_integrated(nvml: Nvml, quick: None) -> None:
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = "Not Supported"
    found = measured(0.3)
    assert found.counter == "NVML power, integrated"
    assert found.joules == pytest.approx(300 * found.window_s, rel=0.05)


def test_power_that_changes_is_integrated_by_trapezoids(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 W for 2 s, to 300 W within a second, 300 W for 1 s: 200 + 200 + 300 J."""
    now = iter([0.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(counters.time, "perf_counter", lambda: next(now))
    nvml.watts = 100.0
    counter = CardPower(card_of(nvml))
    counter.watts()
    counter.watts()
    nvml.watts = 300.0
    counter.watts()
    assert counter.joules() == pytest.approx(700)
    counter.card.close()


def test_a_counter_that_fails_later(nvml: Nvml, quick: None) -> None:
    meter = energy_meter("cuda")
    meter.start()
    time.sleep(0.05)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = "GPU is lost"
    assert meter.stop(3).joules == Missing("NVML: GPU is lost")
    meter.close()


def test_what_a_driver_does_not_tell_is_said_value_by_value(nvml: Nvml, quick: None) -> None:
    nvml.fails = {
        "nvmlDeviceGetClockInfo": "Not Supported",
        "nvmlDeviceGetCurrentClocksThrottleReasons": "Insufficient Permissions",
        "nvmlDeviceGetUtilizationRates": "Not Supported",
    }
    found = measured(0.05)
    assert found.joules == pytest.approx(300 * found.window_s, rel=0.1)
    assert found.state["sm_mhz"] == found.state["memory_mhz"] == Missing("NVML: Not Supported")
    assert found.state["throttle_reasons"] == Missing("NVML: Insufficient Permissions")
    assert found.state["time_with_kernels_percent"] == Missing("NVML: Not Supported")
    assert found.state["temperature_celsius"] == 61.0


def test_what_held_the_clocks_down_at_any_time_is_named(nvml: Nvml, quick: None) -> None:
    meter = energy_meter("cuda")
    meter.start()
    nvml.throttle = 0x04
    time.sleep(0.25)
    nvml.throttle = 0x40
    found = meter.stop(1)
    meter.close()
    assert found.state["throttle_reasons"] == "power limit, temperature, by the hardware"
    assert in_words(0x01) == in_words(0) == "none"
    assert in_words(0x8000) == "others (0x8000)"


@pytest.mark.parametrize("why", ["NVML Shared Library Not Found", "Driver Not Loaded", "Insufficient Permissions"])
def test_nvml_that_does_not_start(why: str, nvml: Nvml) -> None:
    nvml.fails["nvmlInit"] = why
    found = measured(0.01)
    assert found.counter == ""
    assert found.joules == Missing(f"NVML does not start: {why}")
    assert found.idle_watts == Missing("idle power was not measured")
    assert found.state["throttle_reasons"] == found.joules
    assert found.window_s > 0


def test_without_the_library(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = energy_meter("cuda:0")
    assert meter.idle() == Missing("nvidia-ml-py is not installed")  # and nobody waits for it
    meter.start()
    assert meter.stop(5).joules == Missing("nvidia-ml-py is not installed")
    meter.close()


def test_a_card_that_tells_nothing(nvml: Nvml) -> None:
    nvml.fails = {
        "nvmlDeviceGetTotalEnergyConsumption": "Not Supported",
        "nvmlDeviceGetPowerUsage": "Insufficient Permissions",
    }
    why = str(measured(0.01).joules)
    assert "neither energy (Not Supported) nor power (Insufficient Permissions)" in why


def test_a_card_that_counts_and_does_not_say_its_power(nvml: Nvml, quick: None) -> None:
    nvml.fails["nvmlDeviceGetPowerUsage"] = "Not Supported"
    found = measured(0.1)
    assert found.counter == "NVML energy counter"
    assert found.watts == pytest.approx(300, rel=0.05)


def test_slices_of_a_card(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own number, as a card divided, and with a driver that knows of none."""
    nvml.slices = True
    assert "slices (MIG)" in str(measured(0.01).joules)
    nvml.slices = False
    nvml.handles = {f"MIG-{UUID}": "slice", "GPU-other": "card 0"}
    monkeypatch.setattr(nvml, "nvmlDeviceIsMigDeviceHandle", lambda handle: handle == "slice", raising=False)
    monkeypatch.setattr(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", lambda _: "card 0", raising=False)
    card = find_card(torch.device("cuda", 0))
    assert isinstance(card, Card)
    assert (card.handle, card.whole, card.is_slice) == ("slice", "card 0", True)
    found = measured(0.01)
    assert "slices (MIG)" in str(found.joules)
    assert found.state["sm_mhz"] == 1980.0  # of the whole card
    card.close()


def test_cards_are_found_by_their_own_number(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.handles = {"GPU-other": "card 0"}
    assert measured(0.01).joules == Missing(f"NVML does not know GPU-{UUID}: Not Found")
    # A torch that does not tell numbers: good enough where there is one card.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    card = find_card(torch.device("cuda", 0))
    assert isinstance(card, Card)
    assert card.handle == "card 0"
    card.close()
    nvml.handles = {"a": "card 0", "b": "card 1"}
    assert "which of the machine's 2 cards" in str(measured(0.01).joules)
    assert cards.find_card(torch.device("cuda", 0)) == Missing(
        "this torch does not tell which of the machine's 2 cards it uses"
    )


class Zeus:
    """A monitor that has measured 50 J in every window."""

    def __init__(self) -> None:
        self.open: list[str] = []

    def begin_window(self, name: str) -> None:
        self.open.append(name)

    def end_window(self, name: str) -> Any:
        self.open.remove(name)
        return SimpleNamespace(gpu_energy={3: 50.0})


def test_zeus_where_it_is_installed(nvml: Nvml, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def monitor(**options: Any) -> Zeus:
        asked.append(options)
        return Zeus()

    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=monitor))
    found = measured(0.05, device="cuda:3")
    assert found.counter == "zeus"
    assert found.joules == 50.0
    assert asked == [{"gpu_indices": [3], "cpu_indices": []}]
    # One that does not start is none.
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=None))
    assert measured(0.05).counter == "NVML energy counter"
    card = card_of(nvml)
    assert isinstance(find_card_counter(card, 0), CardCounter)
    with pytest.raises(counters.CounterError, match="zeus"):
        ZeusCounter(None, card).joules()
    card.close()


def tree(folder: Path, **zones: tuple[str, int, int]) -> Path:
    for zone, (name, now, most) in zones.items():
        path = folder / zone.replace("__", ":")
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{now}\n")
        (path / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_packages_of_a_processor(tmp_path: Path) -> None:
    """Two packages; memory and cores are parts of them, or others'. A counter at its end begins again."""
    tree(
        tmp_path,
        **{"intel-rapl__0": ("package-0", 900, 1000), "intel-rapl__1": ("package-1", 10, 10**9)},
        **{"intel-rapl__0__0": ("core", 5, 100), "intel-rapl__2": ("psys", 7, 100)},
    )
    (tmp_path / "dtpm").mkdir()
    found = find_rapl(tmp_path)
    assert isinstance(found, Rapl)
    assert found.joules() == 0
    tree(tmp_path, **{"intel-rapl__0": ("package-0", 50, 1000), "intel-rapl__1": ("package-1", 2_000_010, 10**9)})
    assert found.joules() == pytest.approx(2.00015)
    assert found.watts() is None  # nothing to compare with
    tree(tmp_path, **{"intel-rapl__1": ("package-1", 5_000_010, 10**9)})
    time.sleep(0.05)
    assert 0 < found.watts() < 3 / 0.05
    assert found.joules() == pytest.approx(5.00015)


def test_a_processor_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "virtual machines seldom have one" in str(find_rapl(tmp_path / "nothing"))
    tree(tmp_path, **{"intel-rapl__0": ("package-0", 900, 1000)})
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("nonsense")
    assert "energy_uj cannot be read: invalid literal" in str(find_rapl(tmp_path))

    def refuse(self: Path, **_: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(self, encoding="ascii")

    original = Path.read_text
    monkeypatch.setattr(Path, "read_text", refuse)
    assert str(find_rapl(tmp_path)) == f"not available (only root may read {tmp_path / 'intel-rapl:0' / 'energy_uj'})"


def test_a_cpu_has_the_same_report(quick: None) -> None:
    found = measured(0.05, device="cpu")
    if found.counter:
        assert found.counter == "RAPL"
    else:
        assert isinstance(found.joules, Missing)
        assert found.joules == found.watts == found.joules_per_cell
    assert 0 <= found.state["cores_busy_percent"] <= 110
    assert set(found.state) == {"cores_busy_percent", "processor_mhz", "throttle_reasons"}


def test_heat_of_a_processor(tmp_path: Path) -> None:
    counts = tmp_path / "cpu0" / "thermal_throttle" / "package_throttle_count"
    counts.parent.mkdir(parents=True)
    counts.write_text("3\n")
    state = energy._ProcessorState(tmp_path)
    meter = Meter(Missing("no counter"), state)
    meter.start()
    assert meter.stop(1).state["throttle_reasons"] == "none"
    meter.start()
    counts.write_text("5\n")
    assert meter.stop(1).state["throttle_reasons"] == "temperature, by the hardware"
    meter.close()
    assert isinstance(energy._ProcessorState(tmp_path / "none").end(meter.series)["throttle_reasons"], Missing)


def test_devices_of_other_makers() -> None:
    meter = energy_meter("mps")
    meter.start()
    assert meter.stop(1).joules == Missing("no counter of energy is known for mps")
    meter.close()


def test_no_cells_have_no_energy_each(nvml: Nvml, quick: None) -> None:
    found = measured(0.05, n_cells=0)
    assert found.joules_per_cell == Missing("the number of cells is 0")


def test_a_meter_that_was_not_started() -> None:
    meter = energy_meter("cpu")
    with pytest.raises(RuntimeError, match="before it was started"):
        meter.stop(1)
    meter.close()


def test_samples_are_bounded_and_evenly_apart() -> None:
    asked = []
    sampler = Sampler({"n": lambda: asked.append(1) or float(len(asked))}, interval_s=0.001, most_points=16).start()
    while len(asked) < 200:
        time.sleep(0.001)
    series = sampler.stop()
    assert 8 <= len(series.time_s) <= 16
    steps = {b - a for a, b in zip(series.values["n"], series.values["n"][1:], strict=False)}
    assert len(steps) == 1  # of those that are kept, the same number of looks apart
    assert steps.pop() >= 16
    assert series.time_s == sorted(series.time_s)


def test_a_reader_that_fails_does_not_stop_the_others() -> None:
    sampler = Sampler({"bad": lambda: 1 / 0, "none": lambda: None, "nan": lambda: float("nan"), "good": lambda: 2.0})
    sampler.interval_s = 0.001
    sampler.start()
    time.sleep(0.05)
    series = sampler.stop()
    assert set(series.values["bad"]) == set(series.values["none"]) == set(series.values["nan"]) == {None}
    assert set(series.values["good"]) == {2.0}


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    sampler = Sampler({"x": lambda: 1.0}).start()
    sampler.start()  # again
    assert threading.active_count() == before + 1
    start = time.perf_counter()
    sampler.stop()
    assert time.perf_counter() - start < 5
    assert threading.active_count() == before
    assert sampler.stop().time_s  # still there
