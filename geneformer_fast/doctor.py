"""What is installed, what the machine has, and which implementation of every operation would run here and why."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from geneformer_fast import __version__, families

if TYPE_CHECKING:
    from geneformer_kernels.target import Target

# Distribution -> what it is for here.
REQUIRED = {
    "torch": "tensors, matrix products",
    "numpy": "arrays",
    "numba": "compiled ranking of genes",
    "scipy": "sparse counts, collapsing of genes",
    "anndata": "AnnData in memory",
    "h5py": "reading .h5ad, 10x .h5 and .loom",
    "pyarrow": "token folders",
    "safetensors": "model files",
    "pydantic": "schemas of the JSON files that are read",
    "tqdm": "progress bars",
    "psutil": "memory figures",
    "triton": "kernels on NVIDIA cards",
    "nvidia-ml-py": "driver and energy figures of NVIDIA cards",
}
OPTIONAL = {
    "zarr": ("zarr", "reading .zarr"),
    "transformers": ("hf", "comparing with Hugging Face models, quickstart"),
    "datasets": ("hf", "opening token folders with load_from_disk"),
    "matplotlib": ("plot", "pictures, quickstart"),
    "umap-learn": ("plot", "embed --plot, quickstart"),
    "scikit-learn": ("train", "scores of fine-tuning"),
    "pandas": ("train", "tables of training runs"),
    "pytest": ("dev", "tests"),
}
ENVIRONMENT = (
    *("GENEFORMER_KERNELS_IMPL", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TRITON_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF"),
)


@dataclass(frozen=True)
class Package:
    """An installed or missing distribution; ``extra`` is the extra that brings it, None for a required one."""

    name: str
    version: str | None
    purpose: str
    extra: str | None = None


@dataclass(frozen=True)
class Operation:
    """Which implementation of an operation runs on a device, and why; ``impl`` is None where none can."""

    name: str
    impl: str | None
    reason: str


@dataclass(frozen=True)
class Device:
    """One device, the dtype that ``dtype="auto"`` takes there, and the choice made for every operation.

    ``int8_layers``: what becomes of layers of scheme int8 of some widths, integer products or widened weights.
    """

    name: str
    kind: str
    facts: dict[str, Any]
    auto_dtype: str
    operations: list[Operation]
    int8_layers: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class FamilyOfModels:
    """A family of models that is known here, and what cannot be done with it: command to reason.

    ``reads``: ``"ranked genes"`` or ``"values of genes"``.
    """

    name: str
    title: str
    licence: str
    reads: str
    presets: list[str]
    refused: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything the doctor saw. ``problems`` is empty on a healthy machine."""

    geneformer_fast: str
    python: str
    system: str
    packages: list[Package]
    environment: dict[str, str]
    devices: list[Device] = field(default_factory=list)
    families: list[FamilyOfModels] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def examine() -> Report:
    """Look at the installation and the machine.

    Returns
    -------
    Report
        Never raises for what is missing: that is written into ``problems``, or for optional packages left to be seen.
    """
    packages = [Package(name, _version(name), purpose) for name, purpose in REQUIRED.items()]
    packages += [Package(name, _version(name), purpose, extra) for name, (extra, purpose) in OPTIONAL.items()]
    report = Report(
        geneformer_fast=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=platform.platform(),
        packages=packages,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report.families.extend(_families())
    report.problems.extend(str(warning.message) for warning in said)
    try:
        report.devices.extend(_devices())
    except ImportError as error:
        report.problems.append(f"torch cannot be imported: {error}")
    report.problems[:0] = [
        f"{package.name} is not installed ({package.purpose}): pip install {package.name}"
        for package in packages
        if package.version is None and _is_needed(package, report.devices)
    ]
    for device in report.devices:
        for operation in device.operations:
            if operation.impl is None:
                report.problems.append(f"{operation.name} cannot run on {device.name}: {operation.reason}")
    return report


def _families() -> list[FamilyOfModels]:
    return [
        FamilyOfModels(
            each.name,
            each.title,
            each.licence,
            "ranked genes" if each.layouts else "values of genes",
            list(each.presets),
            dict(each.refused),
        )
        for each in families.all_families()
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_needed(package: Package, devices: Sequence[Device]) -> bool:
    """Whether the package must be here. Triton serves cards: beside a torch for CPUs, conda brings none."""
    if package.name == "triton":
        return any(device.kind == "cuda" for device in devices)
    return package.extra is None


def _devices() -> list[Device]:
    import torch
    from geneformer_kernels.target import target_of

    devices = [_device("cpu", target_of("cpu"), _cpu_facts())]
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(index)
        target = target_of(name)
        facts = {
            "model": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "n_sms": target.n_sms,
            "smem_bytes": target.smem_bytes,
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "driver": _driver(),
        }
        devices.append(_device(name, target, facts))
    if torch.backends.mps.is_available():
        devices.append(_device("mps", target_of("mps"), {"model": platform.processor()}))
    return devices


def _cpu_facts() -> dict[str, Any]:
    import torch
    from geneformer_kernels.target import cpu_features, cpu_name

    # A container or a batch system may lend fewer cores than the machine has.
    n_lent = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": cpu_name(),
        "n_cores": os.cpu_count(),
        "n_cores_available": n_lent,
        "torch_threads": torch.get_num_threads(),
        "features": sorted(cpu_features()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _driver() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _device(name: str, target: Target, facts: dict[str, Any]) -> Device:
    return Device(name, target.kind, facts, target.fastest_dtype, operations_on(target), int8_layers_on(target))


def operations_on(target: Target) -> list[Operation]:
    """For every operation, what would run on a target, real or made up, and why."""
    from geneformer_kernels.dispatch import OPERATIONS, ImplUnavailableError, choose

    operations = []
    for name in OPERATIONS:
        # Ranking is float64 arithmetic on every target: its exactness is the point.
        dtype = "float64" if name == "rank_genes" else target.fastest_dtype
        try:
            choice = choose(name, dtype, target)
        except ImplUnavailableError as error:
            operations.append(Operation(name, None, str(error)))
        else:
            operations.append(Operation(name, str(choice.impl), choice.reason))
    return operations


def int8_layers_on(target: Target) -> list[Operation]:
    """How layers with int8 weights are multiplied on a target, by width, and what was measured."""
    from geneformer_kernels.ops.int8_linear.modes import mode_here

    modes = ((width, mode_here(width, 3 * width, target.fastest_dtype, target)) for width in (256, 768))
    return [Operation(f"width {width}", mode, reason) for width, (mode, reason) in modes]


def as_text(report: Report) -> str:
    """The report as lines for people."""
    lines = [f"geneformer-fast {report.geneformer_fast}", f"Python {report.python} on {report.system}", ""]
    lines.append("Packages")
    for package in report.packages:
        if package.version is not None:
            state = package.version
        elif package.extra is not None:
            state = f"not installed: pip install 'geneformer-fast[{package.extra}]'"
        else:
            state = "MISSING" if _is_needed(package, report.devices) else "not needed"
        lines.append(f"  {package.name:<14} {state:<14} {package.purpose}")
    lines += ["", "Families of models"]
    for family in report.families:
        lines.append(f"  {family.title}, of {family.reads}: {', '.join(family.presets) or 'no presets'}")
        lines += [f"    not {command}: {reason}" for command, reason in family.refused.items()]
    if report.environment:
        lines += ["", "Environment", *(f"  {name}={value}" for name, value in report.environment.items())]
    for device in report.devices:
        lines += ["", f"Device {device.name}: {device.facts['model']}"]
        lines += [f"  {_fact(name, value)}" for name, value in device.facts.items() if name != "model" and value]
        lines.append(f'  dtype="auto" means {device.auto_dtype} here')
        lines.append("  operation           runs as    because")
        for operation in device.operations:
            lines.append(f"  {operation.name:<19} {operation.impl or 'nothing':<10} {operation.reason}")
        lines.append("  int8 layers         mode       because")
        for layer in device.int8_layers:
            lines.append(f"  {layer.name:<19} {layer.impl:<10} {layer.reason}")
    if not any(device.kind in ("cuda", "hip", "mps") for device in report.devices):
        lines += ["", "No GPU is visible to torch: everything runs on the CPU."]
    lines += ["", *(f"PROBLEM: {problem}" for problem in report.problems)]
    if not report.problems:
        lines.append("No problems found.")
    return "\n".join(lines)


def _fact(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        size = f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**10:.0f} KiB"
        return f"{name.removesuffix('_bytes').replace('_', ' ')}: {size}"
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"{name.removeprefix('n_').replace('_', ' ')}: {value}"
