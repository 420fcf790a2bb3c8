"""A report with something in every field, for tests of what is made of reports."""

from __future__ import annotations

from geneformer_fast.profiling.figures import (
    Alive,
    Ceilings,
    Cells,
    Datasheet,
    Energy,
    Finding,
    Flops,
    Memory,
    Missing,
    Operation,
    Series,
    Setting,
    Spread,
    Subject,
    Timing,
    Tokens,
)
from geneformer_fast.profiling.report import Report

NO_ENERGY = Missing("no counter of energy can be read here")


def sample_report(*, has_energy: bool = False, compared: bool = True) -> Report:
    """A small CPU run of V1-10M, made up."""
    energy = Energy("", *[NO_ENERGY] * 7, state={"cpu_mhz": 2100.0, "throttle_reasons": NO_ENERGY})
    if has_energy:
        state = {"sm_mhz": 1980.0, "celsius": 61.0, "throttle_reasons": "none"}
        energy = Energy("NVML energy counter", 10.0, 6000.0, 600.0, 75.0, 0.5, 7.2e6, 0.139, state)
    return Report(
        subject=Subject(
            "embed", "geneformer-v1-10m", "geneformer_fast" if compared else "transformers", 10_288_896,
            {"n_layers": 6, "width": 256}, "bfloat16", "cpu", "pbmc.tokens: 512 of 2,700 cells",
            {"token_budget": 8192, "threads": 2},
        ),
        machine={"machine": "Example CPU", "n_cores": 2, "packages": {"torch": "2.13.0"}, "date": "2026-11-30"},
        ceilings=Ceilings(
            {"float32": 0.11, "bfloat16": 0.63, "int8": Missing("torch has no int8 product here")}, 21.5,
            Datasheet("Example", {"bfloat16": 0.9}, 40.0),
        ),
        time=Timing(
            20, 3, 12.5, 24.1, 1.9, Spread(590.0, 620.0, 700.0),
            {"data": 0.4, "forward": 11.2, "host_gaps": Missing("a CPU has none"), "other": 0.9},
        ),
        cells=Cells(512, 40.96, 51_200.0, Spread(420.0, 1100.0, 2048.0)),
        tokens=Tokens(640_000, 656_000, 0.9756, [[26, 32_000, 32_800]] * 20),
        flops=Flops(5.1e12, 5.3e12, 1e10, 0.65, 0.67, 0.45, 0.47, "bfloat16", "formula", "from the cells' lengths"),
        memory=Memory(
            {"weights": 2.1e7, "activations": 3e7, "gradients": 0.0, "logits": 0.0, "workspace": 1e7, "other": 2.7e8},
            3.31e8, Missing("a CPU has no reserving allocator"), Missing("a CPU has none"), 3.31e8,
            [Alive("blocks.0.qkv.weight", 393_216), Alive("hidden units", 8_388_608)],
        ),
        energy=energy,
        operations=[
            Operation("varlen_attention", 120, 4800.0, 0.43, 2.2e12, 1e10, 0.61),
            Operation("feed_forward", 120, 3900.0, 0.35, 2.4e12, 2e10, 0.93),
            Operation("aten::index", 40, 120.0, 0.01, Missing("unknown"), Missing("unknown"), Missing("unknown")),
        ],
        blocks=[1800.0, 1790.0, 1810.0, 1805.0, 1795.0, 1800.0],
        series=Series([0.0, 0.1, 0.2], {"memory_bytes": [3e8, 3.2e8, 3.3e8], "power_watts": [None, None, None]}),
        findings=[
            Finding("padding", "2 % of computed positions were padding", {"padding_share": 0.0244}, 1.02),
            Finding("attention", "43 % of the time is attention <in long cells>", {"share": 0.43}),
        ],
        compared=[sample_report(compared=False)] if compared else [],
        sweep=[Setting(4096, 38.0, 3.1e8, 2.0e10), Setting(8192, 41.0, 3.3e8, 1.99e10, "best")],
    )  # fmt: skip
