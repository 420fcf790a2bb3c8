"""What a report says of time in which nothing is computed: waiting, copies, idle cores, clocks held down."""

from __future__ import annotations

from geneformer_fast.profiling.figures import Finding
from geneformer_fast.profiling.findings.shares import is_known, number, percent, share_of, share_of_time, told
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import written

# Above which share of its whole something is worth a word.
WAITING, GAPS, IDLE = 0.1, 0.1, 0.5
# Processors are said to be idle where so many cores were never used.
_IDLE_CORES = 0.6


def data(report: Report) -> Finding | None:
    """The device waited for a batch."""
    share = share_of_time(report, "data")
    if share is None or share < WAITING:
        return None
    return Finding(
        "data", f"{percent(share)} of the time went by waiting for the next batch: let more workers read ahead "
        "(workers=, num_workers=), or keep tokens on a faster disk",
        {"data_share": share}, told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def gaps(report: Report) -> Finding | None:
    """The device had nothing to do."""
    share = share_of_time(report, "host_gaps")
    if share is None or share < GAPS:
        return None
    return Finding(
        "host_gaps", f"for {percent(share)} of the time the device had nothing to do while a step went on: give it "
        "larger batches, or torch.compile the model, so that the host has less to hand over",
        {"gap_share": share}, told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def copies(report: Report) -> Finding | None:
    """Copies between host and device."""
    share = share_of_time(report, "copies")
    if share is None or share < WAITING:
        return None
    return Finding(
        "copies", f"{percent(share)} of the time went into copies between host and device: pin the memory of batches, "
        "copy with non_blocking=True, and leave results on the device until they are needed",
        {"copy_share": share}, told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def communication(report: Report) -> Finding | None:
    """Processes that exchange what they have, or wait for each other."""
    share = share_of_time(report, "communication")
    if share is None or share < WAITING:
        return None
    return Finding(
        "communication", f"{percent(share)} of the time went into communication between processes: larger steps, of "
        "pieces that are accumulated (model.no_sync()), exchange gradients less often",
        {"communication_share": share}, told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def idle_power(report: Report) -> Finding | None:
    """Power drawn for doing nothing."""
    idle, drawn = report.energy.idle_watts, report.energy.watts
    share = share_of(idle, drawn)
    if share is None or share < IDLE:
        return None
    return Finding(
        "idle_power", f"{percent(min(share, 1.0))} of the power ({written(number(idle), 'W')} of "
        f"{written(number(drawn), 'W')}) is drawn by the idle device as well: the faster cells go through, the less "
        "of it each one costs; larger batches, or several jobs at a time",
        {"idle_share": share},
    )  # fmt: skip


def throttling(report: Report) -> Finding | None:
    """Clocks held down."""
    reasons = report.energy.state.get("throttle_reasons")
    if not isinstance(reasons, str) or reasons.strip().lower() in ("", "none", "0x0", "idle", "gpu idle"):
        return None
    clocks = {
        name: float(value) for name, value in report.energy.state.items()
        if isinstance(value, int | float) and name.endswith(("mhz", "celsius", "watts", "mhz_at_most"))
    }  # fmt: skip
    said = ", ".join(f"{name} {written(value)}" for name, value in clocks.items())
    return Finding(
        "throttling", f"clocks were held down ({reasons}){f' at {said}' if said else ''}: better cooling or "
        "a higher power limit makes it faster, and figures taken like this differ from day to day",
        clocks,
    )  # fmt: skip


def threads(report: Report) -> Finding | None:
    """Cores that nobody used."""
    cpu_s, wall_s, n_cores = report.time.cpu_s, report.time.wall_s, report.machine.get("n_cores")
    if not report.subject.device.startswith("cpu") or not is_known(cpu_s) or not isinstance(n_cores, int):
        return None
    used = cpu_s / wall_s if wall_s else 0.0
    if n_cores < 2 or not 0 < used < _IDLE_CORES * n_cores:
        return None
    is_tokenizing = report.subject.mode == "tokenize"  # by workers: what torch has is of no account
    n_threads = report.subject.settings.get("workers" if is_tokenizing else "threads")
    what = "worker" if is_tokenizing else "torch thread"
    told, how = "", f"--threads {n_cores}" + ("" if is_tokenizing else f" (torch.set_num_threads({n_cores}))")
    if isinstance(n_threads, int):
        told = f" with {n_threads} {what}{'s' * (n_threads != 1)}"
        if n_threads >= n_cores:
            how = "there are enough of them, so look for other programs on the machine, and for waiting on the disk"
    return Finding(
        "threads", f"{written(used)} of {n_cores} cores worked{told}: {how}",
        {"cores_used": used, "n_cores": float(n_cores)},
    )  # fmt: skip
