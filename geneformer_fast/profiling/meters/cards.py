"""What NVIDIA's driver says of a card: which one of the machine's it is, its power, energy, clocks and state."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from geneformer_fast.profiling.figures import Missing

#: What holds clocks down, by NVML's bits (nvml.h, "Clocks Event Reasons"). An idle card is no hindrance.
THROTTLE_REASONS = {
    0x02: "clocks set by an application",
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "clocks kept equal among cards",
    0x20: "temperature, by the driver",
    0x40: "temperature, by the hardware",
    0x80: "power brake",
    0x100: "clocks of the display",
}
_IDLE = 0x01


class Card:
    """One card, as NVML knows it.

    Parameters
    ----------
    nvml
        The module ``pynvml``, or what stands in for it.
    handle
        NVML's, of the card, or of a slice of one (MIG).
    whole
        Of the card that a slice belongs to; the same where there are no slices.
    is_slice
        Whether others may compute on the same card, in slices of their own.
    """

    def __init__(self, nvml: Any, handle: Any, whole: Any, *, is_slice: bool) -> None:
        self.nvml, self.handle, self.whole, self.is_slice = nvml, handle, whole, is_slice

    def millijoules(self) -> int:
        """Since the driver was loaded."""
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def watts(self) -> float:
        """Drawn now; by cards from Ampere on, on an average over a second."""
        return float(self.nvml.nvmlDeviceGetPowerUsage(self.handle)) / 1e3

    def sm_mhz(self) -> float:
        """Clock of the multiprocessors."""
        return float(self.nvml.nvmlDeviceGetClockInfo(self.whole, self.nvml.NVML_CLOCK_SM))

    def memory_mhz(self) -> float:
        """Clock of the memory."""
        return float(self.nvml.nvmlDeviceGetClockInfo(self.whole, self.nvml.NVML_CLOCK_MEM))

    def sm_mhz_at_most(self) -> float:
        """The highest clock of the multiprocessors."""
        return float(self.nvml.nvmlDeviceGetMaxClockInfo(self.whole, self.nvml.NVML_CLOCK_SM))

    def celsius(self) -> float:
        """Of the chip."""
        return float(self.nvml.nvmlDeviceGetTemperature(self.whole, self.nvml.NVML_TEMPERATURE_GPU))

    def limit_watts(self) -> float:
        """Power that is enforced."""
        return float(self.nvml.nvmlDeviceGetEnforcedPowerLimit(self.whole)) / 1e3

    def kernels_percent(self) -> float:
        """Share of time in which at least one kernel ran, however little of the card it used."""
        return float(self.nvml.nvmlDeviceGetUtilizationRates(self.whole).gpu)

    def memory_traffic_percent(self) -> float:
        """Share of time in which memory was read or written."""
        return float(self.nvml.nvmlDeviceGetUtilizationRates(self.whole).memory)

    def throttle_bits(self) -> int:
        """What holds the clocks down now."""
        asked = getattr(self.nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((asked or self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self.whole))

    def close(self) -> None:
        """Let NVML go."""
        try:
            self.nvml.nvmlShutdown()
        except self.nvml.NVMLError:
            return


def find_card(device: torch.device) -> Card | Missing:
    """The card that torch calls ``device``, which CUDA_VISIBLE_DEVICES may have numbered anew; or why there is none."""
    try:
        import pynvml
    except ImportError:
        return Missing("nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Missing(f"NVML does not start: {error}")
    found = _handle_of(pynvml, device)
    if isinstance(found, Missing):
        pynvml.nvmlShutdown()
        return found
    if _asked(pynvml, "nvmlDeviceIsMigDeviceHandle", found):
        whole = _asked(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", found)
        return Card(pynvml, found, found if whole is None else whole, is_slice=True)
    mode = _asked(pynvml, "nvmlDeviceGetMigMode", found)
    return Card(pynvml, found, found, is_slice=mode is not None and mode[0] == 1)


def _asked(nvml: Any, name: str, handle: Any) -> Any:
    """What a function says that older drivers, libraries and cards do not have: None there."""
    try:
        return getattr(nvml, name)(handle)
    except (nvml.NVMLError, AttributeError):
        return None


def _handle_of(nvml: Any, device: torch.device) -> Any:
    """NVML's handle by the card's own number, which does not depend on who sees which cards."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return _only_one(nvml)
    number = str(uuid)
    # A slice of a card has a number of its own.
    names = [number] if number.startswith(("GPU-", "MIG-")) else [f"GPU-{number}", f"MIG-{number}"]
    why = ""
    for name in names:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError as error:
            why = why or str(error)
    return Missing(f"NVML does not know {names[0]}: {why}")


def _only_one(nvml: Any) -> Any:
    """The card where there is one, for a torch that does not tell numbers."""
    try:
        n_cards = nvml.nvmlDeviceGetCount()
        if n_cards == 1 and not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError as error:
        return Missing(f"NVML lists no cards: {error}")
    return Missing(f"this torch does not tell which of the machine's {n_cards} cards it uses")


def in_words(bits: int) -> str:
    """What holds clocks down; ``"none"`` where nothing does."""
    named = [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
    unknown = bits & ~sum(THROTTLE_REASONS) & ~_IDLE
    return ", ".join([*named, *([f"others ({unknown:#x})"] if unknown else [])]) or "none"


def reading(card: Card, read: Callable[[], float]) -> float | Missing:
    """A value, or why the driver does not give it."""
    try:
        return read()
    except (card.nvml.NVMLError, AttributeError) as error:
        return Missing(f"NVML: {error}")
