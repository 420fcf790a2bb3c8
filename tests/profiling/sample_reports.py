"""Reports for tests of what is made of reports: rich and bare ones, long, hostile and wild ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from geneformer_fast.profiling.figures import (
    Alive,
    Ceilings,
    Cells,
    Datasheet,
    Energy,
    Figure,
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


def rich_report() -> Report:
    """A training run of V2-104M on a card, made up: every plot has something to show, and every rule its finding."""
    rng = np.random.default_rng(0)
    padded = [[32, int(real), 65_536] for real in rng.normal(38_000, 6_000, 48)]
    n_real, n_positions = (sum(batch[i] for batch in padded) for i in (1, 2))
    seconds = np.arange(0, 24.0, 0.1)
    ramp = np.clip(seconds / 1.5, 0, 1)
    power = 92 + ramp * 540 + rng.normal(0, 9, len(seconds))
    memory = 2.1e9 + 9.6e9 * ramp + 2.2e9 * (np.arange(len(seconds)) % 5 > 2)
    stock = dataclasses.replace(_rich_run("transformers", 1.0), findings=[])
    return dataclasses.replace(
        _rich_run("geneformer_fast", 2.31),
        tokens=Tokens(n_real, n_positions, n_real / n_positions, padded),
        operations=_rich_operations(),
        blocks=[float(each) for each in 11.8 + rng.normal(0, 0.15, 12)],
        series=Series(
            seconds.tolist(),
            {
                "power_watts": power.tolist(),
                "memory_bytes": memory.tolist(),
                "gpu_busy_percent": (ramp * 97 + rng.normal(0, 1, len(seconds))).clip(0, 100).tolist(),
                "sm_mhz": [None if 50 < i < 60 else 1980.0 - 15 * (i % 7) for i in range(len(seconds))],
            },
        ),
        findings=[
            Finding(
                "padding",
                "42 % of computed positions were padding: sort cells by length or use accelerate().",
                {"padding_share": 0.42, "n_positions": n_positions, "attention_of_padding_share": 0.61}, 1.72,
            ),
            Finding(
                "data",
                "The device waited 9 % of the time for batches: use more workers, or a folder on a faster disk.",
                {"data_share": 0.09, "data_s": 2.2}, 1.1,
            ),
            Finding(
                "memory",
                "118 GB of memory were never used: a budget of 131,072 tokens fits and was 4 % faster.",
                {"free_bytes": 1.18e11, "best_token_budget": 131_072}, 1.04,
            ),
            Finding("energy", "Idle power was 15 % of the energy.", {"idle_share": 0.15}),
        ],
        compared=[stock],
        sweep=[
            *(Setting(2**power, rate, 1.5e9 + 1.9e5 * 2**power, 1.395e11 - 1.9e5 * 2**power, note)
              for power, rate, note in (
                  (13, 1150.0, ""), (14, 1722.0, ""), (15, 2110.0, ""), (16, 2290.0, ""), (17, 2382.0, "best"),
                  (18, 2371.0, ""))),
            Setting(2**19, Missing("out of memory"), Missing("out of memory"), Missing("out of memory"), "failed"),
        ],
    )  # fmt: skip


def _rich_run(engine: str, factor: float) -> Report:
    wall_s = 24.0 / factor
    share = {"forward": 0.27, "backward": 0.49, "optimizer": 0.06, "data": 0.09, "copies": 0.02, "host_gaps": 0.05}
    parts: dict[str, Figure] = {name: wall_s * each for name, each in share.items()}
    parts |= {"communication": Missing("one process does not communicate"), "other": wall_s * 0.02}
    return Report(
        subject=Subject(
            "train", "/models/Geneformer-V2-104M", engine, 104_417_792,
            {"n_layers": 12, "width": 768, "n_heads": 12, "ffn_width": 3072, "n_positions": 4096, "activation": "relu"},
            "bfloat16", "cuda:0", "made-up lengths, uniform from 300 to 4,096",
            {"token_budget": 65_536, "workers": 4, "learning_rate": 1e-4, "recompute": False, "trace": "trace.json.gz"},
        ),
        machine={
            "machine": "Intel Xeon Platinum 8480C", "n_cores": 16, "memory_gib": 125.8,
            "instructions": ["amx_bf16", "amx_int8", "avx2", "avx512_vnni"],
            "gpu": {"name": "NVIDIA H200", "sm": 90, "memory_gib": 139.8, "driver": "570.86.15"},
            "system": "Linux 6.8.0", "python": "3.12.3",
            "packages": {"geneformer-fast": "0.1.0", "torch": "2.13.0", "triton": "3.5.0", "transformers": "5.2.0"},
            "commit": "0123456789ab", "is_dirty": False, "date": "2026-11-30", "load_1min": 1.62,
        },
        ceilings=Ceilings(
            {"float32": 49.1, "bfloat16": 702.0, "float16": 711.0, "int8": 1190.0, "fp8": Missing("not measured")},
            3920.0, Datasheet("NVIDIA H200", {"bfloat16": 989.0, "float16": 989.0, "int8": 1979.0}, 4800.0),
        ),
        time=Timing(
            48, 3, wall_s, 31.0 / factor, 8.4,
            Spread(490 / factor, 498 / factor, 531 / factor), parts,
        ),
        cells=Cells(1536, 1536 / wall_s, 1_824_000 / wall_s, Spread(690.0, 2201.0, 3710.0)),
        tokens=Tokens(1_824_000, 3_145_728, 0.58, [[32, 38_000, 65_536]] * 48),
        flops=Flops(
            1.29e15, 2.31e15, 8.4e11, 0.0765 * factor, 0.137 * factor, 0.0543 * factor, 0.0973 * factor, "bfloat16",
            "formula", "from the cells' lengths; training is three forward passes",
        ),
        memory=Memory(
            {"weights": 4.18e8, "gradients": 4.18e8, "optimizer": 8.35e8, "activations": 1.02e10, "logits": 1.3e9,
             "workspace": 3.1e8, "other": 4.1e8},
            1.389e10, 1.54e10, 0.098, 3.4e9,
            [Alive("blocks.0 activations", 8.2e8), Alive("logits", 13 * 10**8), Alive("embeddings.tokens", 62_300_160)],
        ),
        energy=Energy(
            "NVML energy counter", wall_s, 618.0 * wall_s, 618.0, 92.0, 618.0 * wall_s / 1536,
            3.6e6 * 1536 / 618.0 / wall_s, 618.0 * wall_s / 1536 / 3.6,
            {"sm_mhz": 1935.0, "memory_mhz": 3201.0, "celsius": 63.0, "throttle_reasons": "none",
             "gpu_busy_percent": 96.0, "fan_percent": Missing("this card has no fan")},
        ),
    )  # fmt: skip


def _rich_operations() -> list[Operation]:
    rows = [
        ("feed_forward backward", 24, 158.0, 0.31, 6.6e13, 6.1e10, 0.60),
        ("varlen_attention backward", 24, 96.0, 0.19, 1.6e13, 1.9e10, 0.24),
        ("feed_forward", 24, 81.0, 0.16, 3.3e13, 3.4e10, 0.58),
        ("linear backward", 48, 52.0, 0.10, 2.2e13, 5.2e10, 0.60),
        ("varlen_attention", 24, 41.0, 0.08, 6.5e12, 8.0e9, 0.23),
        ("linear", 48, 25.0, 0.05, 1.1e13, 2.6e10, 0.63),
        ("cross_entropy backward", 2, 9.0, 0.018, 1.9e12, 3.4e9, 0.30),
        ("add_layer_norm backward", 48, 8.1, 0.016, 3.1e10, 2.4e10, 0.76),
        ("add_layer_norm", 48, 4.9, 0.010, 1.6e10, 1.6e10, 0.83),
        ("embed_layer_norm", 2, 0.9, 0.002, 5.0e8, 9.0e8, 0.26),
    ]
    unknown = Missing("torch says nothing of it")
    return [
        *(Operation(*row) for row in rows),
        Operation("aten::_foreach_addcmul_", 2, 11.0, 0.022, unknown, unknown, unknown),
        Operation("aten::index", 96, 3.0, 0.006, Missing("no product"), 2.0e9, 0.17),
    ]


def bare_report() -> Report:
    """A loop of somebody's own on a CPU of which as good as nothing could be told."""
    why = Missing("no counter of energy can be read: /sys/class/powercap is for root only")
    unknown = Missing("not a model whose operations are known")
    return Report(
        subject=Subject("loop", "MyModel", "torch", None, None, None, "cpu", "", {}),
        machine={},
        ceilings=Ceilings({}, Missing("was not to be measured")),
        time=Timing(1, 0, 0.02, Missing("not read"), Missing("not timed"), Spread(20.0, 20.0, 20.0), {}),
        cells=Cells(0, Missing("no cells were named"), Missing("no tokens were named"), None),
        tokens=Tokens(0, 0, Missing("neither lengths nor an attention mask were given"), []),
        flops=Flops(*[unknown] * 7, ceiling_dtype=None, basis="unknown", note="not a model whose operations are known"),
        memory=Memory({}, *[Missing("was not watched")] * 4, at_peak=[]),
        energy=Energy("", *[why] * 7, state={}),
    )


def long_report(n_batches: int = 10_000) -> Report:
    """As many batches, moments and operations as there may be."""
    batches = [[8, 7000 + 13 * (i % 60), 8192] for i in range(n_batches)]
    real, positions = (sum(batch[i] for batch in batches) for i in (1, 2))
    moments = list(range(2000))
    return dataclasses.replace(
        rich_report(),
        tokens=Tokens(real, positions, real / positions, batches),
        series=Series(
            [i / 10 for i in moments],
            {"power_watts": [500.0 + i % 90 for i in moments], "memory_bytes": [1e10 + 1e6 * i for i in moments]},
        ),
        operations=[Operation(f"aten::op_{i}", 3, 1.0 + i, 0.002, 1e9 * (i + 1), 1e8, 0.5) for i in range(400)],
        blocks=[10.0 + i / 10 for i in range(48)],
    )


#: Names that would be something else on a page, in XML, in a formula or to the reader.
HOSTILE = (
    "<script>document.title='taken'</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{0}$ {{ 7 * 7 }} {% include 'x' %}",
    "nul\x00 escape\x1b[31m gnp\u202etxt.exe half\ud800 ]]> --> </svg></style>",
    "https://example.com/" + "long" * 60,
    "細胞 клетка 🧬 &amp; &#x41;",
)


def hostile_report() -> Report:
    """A report all of whose names were chosen by an enemy."""
    one, two, three, four, five, six = HOSTILE
    rich = rich_report()
    parts: dict[str, Figure] = {one: 1.0, "forward": 5.0, six: Missing(two)}
    stock = dataclasses.replace(rich.compared[0], subject=dataclasses.replace(rich.subject, engine=three))
    return dataclasses.replace(
        rich,
        subject=Subject(one, two, three, 3, {four: five}, six, "cuda:" + one, four, {five: six, one: [two, four]}),
        machine={
            "gpu": {"name": three},
            "machine": four, one: two, "packages": {five: four}, "date": one, six: {two: [three]},
        },
        ceilings=Ceilings({six: 500.0, one: Missing(two)}, 3000.0, Datasheet(four, {six: 800.0, two: 1.0}, 4000.0)),
        time=dataclasses.replace(rich.time, parts=parts),
        flops=dataclasses.replace(rich.flops, ceiling_dtype=six, basis=one, note=two),
        memory=dataclasses.replace(
            rich.memory, parts={four: 5e9, three: 2e9}, at_peak=[Alive(each, 5) for each in HOSTILE]
        ),
        energy=dataclasses.replace(rich.energy, counter=one, state={two: three, four: Missing(five), six: 3.0}),
        operations=[Operation(each, 1, 5.0, 0.1, 1e12, 1e9, 0.4) for each in HOSTILE],
        series=Series([0.0, 1.0, 2.0], {each: [1.0, None, 2.0] for each in (*HOSTILE, "power_watts", "memory_bytes")}),
        findings=[Finding(one, each, {three: 1.0, four: 2.0}, 2.0) for each in HOSTILE],
        compared=[stock],
        sweep=[Setting(1024, 3.0, 1e9, 2e9, one), Setting(2048, Missing(two), Missing(four), Missing(five), six)],
    )  # fmt: skip


def wild_report() -> Report:
    """Figures that no run should come to: not numbers, infinite, negative, nothing, more than everything."""
    rich = rich_report()
    nan, inf = float("nan"), float("inf")
    return dataclasses.replace(
        rich,
        time=Timing(0, 0, 0.0, nan, inf, Spread(nan, nan, nan), {"forward": nan, "data": -1.0, "other": inf}),
        cells=Cells(0, inf, nan, Spread(nan, 0.0, inf)),
        tokens=Tokens(5, 0, nan, [[0, 0, 0], [1, 5, 5], [2, 9, 4], [1]]),
        memory=dataclasses.replace(rich.memory, parts={"weights": nan, "logits": -5.0, "other": 0.0}, peak_bytes=0.0),
        ceilings=Ceilings({"bfloat16": 0.0}, nan),
        operations=[
            Operation("zero", 0, 0.0, 0.0, 0.0, 0.0, 0.0), Operation("nan", 1, nan, nan, nan, nan, nan),
            Operation("good", 1, 1e-9, 7.0, 1e30, 1e-9, 9.0), Operation("tiny", 1, 1e9, -1.0, 1.0, 1e30, 0.0),
        ],
        blocks=[nan, 0.0, inf],
        series=Series([0.0, 1.0, nan], {"power_watts": [nan, inf, None], "memory_bytes": [0.0, 0.0], "none": []}),
        findings=[Finding("nan", "Something is wrong.", {"share": nan}, inf)],
        sweep=[Setting(0, 1.0, nan, inf), Setting(-1, nan, 1.0, 1.0)],
    )  # fmt: skip
