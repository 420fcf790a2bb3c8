"""Where a number was measured is said with it; a card's state is read as far as the driver tells; clocks keep time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from geneformer_fast.profiling import clock, machine
from geneformer_fast.profiling.clock import EventClock, WallClock, clock_of, percentiles
from geneformer_fast.profiling.machine import card, machine_slug, provenance, slug, state

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card, as far as it is asked here, on a machine without."""
    at = SimpleNamespace(
        name="NVIDIA Imaginary X1", major=9, minor=0, multi_processor_count=10, total_memory=80 << 30,
        L2_cache_size=1 << 20, uuid="00000000-1111-2222-3333-444444444444",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: at)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


class Event:
    """Tells the host's time."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


def in_a_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", root)
    monkeypatch.delenv(machine.COMMIT, raising=False)


def test_provenance_names_machine_versions_and_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_a_place(tmp_path, monkeypatch)
    found = provenance()
    assert found["machine"]
    assert found["n_cores"] >= 1
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert len(found["date"]) == 10
    assert "gpu" not in found
    assert machine_slug({"machine": "Intel(R) Xeon(R) @ 2.1GHz", "n_cores": 2}) == "intel-r-xeon-r-2-1ghz-2-cores"
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_the_commit_is_that_of_the_packages_own_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that is installed within somebody else's checkout has none."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    in_a_place(tmp_path, monkeypatch)
    found = provenance()
    assert len(found["commit"]) == 12
    assert found["is_dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance()["is_dirty"] is True
    within = tmp_path / "lib" / "site-packages"
    within.mkdir(parents=True)
    in_a_place(within, monkeypatch)
    assert "commit" not in provenance()
    monkeypatch.setenv(machine.COMMIT, "told")
    assert provenance()["commit"] == "told"


def nvml(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    class NVMLError(Exception):
        pass

    module = ModuleType("pynvml")
    values: dict[str, object] = {
        "NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1980 if kind == 1 else 3201,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetPowerUsage": lambda handle: 654_321, "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, kind: 55,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1],
    }  # fmt: skip
    for name, value in (values | changes).items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_the_state_of_a_card_is_read_as_far_as_the_driver_tells(
    cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvml(monkeypatch)
    found = state(CARD)
    assert (found["sm_mhz"], found["memory_mhz"], found["power_w"], found["celsius"]) == (1980, 3201, 654.3, 55)
    assert "nvmlDeviceGetCurrentClocksThrottleReasons" in found["throttle_reasons"]  # this driver has no such call
    assert state(CPU) == {}
    # Without the library, by the program; without that, nothing.
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "1980 MHz, 3201 MHz, 100.00 W, 700.00 W, 41"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert state(CARD)["clocks.mem"] == "3201 MHz"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert state(CARD) == {}


def test_a_card_is_named(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "query", lambda device, names: {"driver_version": "590.1"})
    found = provenance(CARD)["gpu"]
    assert (found["name"], found["sm"], found["memory_gib"], found["driver"]) == (
        "NVIDIA Imaginary X1",
        90,
        80,
        "590.1",
    )
    assert card(CPU) == {"name": "cpu"}


def test_events_are_kept_around_each_repetition_with_work_in_front(cuda: None) -> None:
    timer = EventClock(CPU)
    flushes: list[int] = []
    timer._buffer = SimpleNamespace(zero_=lambda: flushes.append(1))  # type: ignore[assignment]
    timer._flush_ms = 2.0
    found = timer.samples(lambda: time.sleep(0.002), 3, lead_ms=5.0)
    assert len(found) == 3
    assert min(found) > 1.9
    assert len(flushes) == 9
    flushes.clear()
    timer.samples(lambda: None, 2, lead_ms=1e9)
    assert len(flushes) == 2 * clock.MOST_LEAD_MS / 2
    flushes.clear()
    assert timer.host_ms(lambda: time.sleep(0.002)) >= 2
    assert flushes == []
    bare = EventClock(CPU, has_lead=False)
    assert not hasattr(bare, "_buffer")
    assert len(bare.samples(lambda: None, 2, lead_ms=5.0)) == 2


def test_a_cpu_has_the_hosts_clock() -> None:
    timer = clock_of(CPU)
    assert isinstance(timer, WallClock)
    assert min(timer.samples(lambda: time.sleep(0.002), 3)) >= 2
    assert timer.host_ms(lambda: time.sleep(0.002)) >= 2
    assert percentiles([1, 2, 3]) == {"p10": 1.2, "p50": 2.0, "p90": 2.8}
