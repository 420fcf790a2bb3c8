"""The tables of results: rendering of made-up ones, and that those of the README and docs/results.md are current."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import front, report
from bench.gpu import report as gpu_report

ROOT = Path(__file__).resolve().parent.parent
PROVENANCE = {
    "machine": "Imaginary 9000", "n_cores": 4, "memory_gib": 15.6, "instructions": ["avx2", "amx_bf16"],
    "system": "Linux 6.0", "python": "3.12.1", "packages": {"numpy": "2.1.0", "torch": "2.9.0"},
    "commit": "0123456789ab", "is_dirty": False, "date": "2030-01-02", "load_1min": 0.25,
}  # fmt: skip


def candidate(what: str, speed: float, *, is_ours: bool = False, layer: str = "last") -> dict:
    spread = {"p10": speed * 0.9, "p50": speed, "p90": speed * 1.1}
    return {
        "what": what, "layer": layer, "is_ours": is_ours, "batch_size": None if is_ours else 8,
        "seconds": spread, "cells_per_s": spread, "tokens_per_s": spread, "agreement": {}, "peak_bytes": 512_000_000,
    }  # fmt: skip


EMBED = {
    "case": "embed_v1-10m_all-threads", "provenance": PROVENANCE, "geometry": "v1-10m", "n_cells": 160,
    "lengths": {"p10": 400.0, "p50": 650.0, "p90": 1200.0}, "threads": 4, "rounds": 5, "default_attention": "sdpa",
    "candidates": {
        "ours": candidate("this project", 123.4, is_ours=True, layer="penultimate"),
        "ours-last": candidate("this project, last layer", 100.0, is_ours=True),
        "extractor": candidate("as the extractor does: padded", 9.87, layer="penultimate"),
        "stock-bfloat16": candidate("best stock parts: padded", 50.0),
    },
    "ratios": {"ours / extractor": 12.5, "ours / stock-bfloat16": 2.5, "ours-last / stock-bfloat16": 2.0},
    "goals": {"ours / extractor": 10, "ours / stock-bfloat16": 7.7},
}  # fmt: skip
TRAIN = {
    "case": "train_v1-10m_all-threads", "provenance": PROVENANCE, "geometry": "v1-10m", "lengths": EMBED["lengths"],
    "padded_share": 0.123, "threads": 4, "rounds": 5, "n_steps": 8, "cells_per_step": 12, "dropout": 0.02,
    "candidates": {
        "ours": candidate("this project, bfloat16", 24.6, is_ours=True),
        "trainer": candidate("transformers' Trainer: padded", 1.234),
    },
    "ratios": {"ours / trainer": 19.9}, "goals": {"ours / trainer": 4},
    "curve": {"n_steps": 40, "largest_difference_from_trainer": {"ours": 0.00123, "trainer": 0.0}},
}  # fmt: skip
FLOAT32 = {
    **EMBED, "case": "embed_v1-10m_2-threads_avx2", "held_to": "AVX2", "ceiling_tflops": 0.1234,
    "candidates": {
        "float32": {**candidate("this project, float32", 12.3, is_ours=True), "share_of_ceiling": 0.812},
        "stock-float32": {**candidate("best stock parts, float32", 7.89), "share_of_ceiling": 0.471},
    },
    "ratios": {"float32 / stock-float32": 1.56}, "goals": {"float32 / stock-float32": 1.6}, "least_share": 0.75,
}  # fmt: skip
TOKENIZE = {
    "case": "tokenize_v2", "provenance": {**PROVENANCE, "is_dirty": True}, "what": "a file to a folder",
    "n_cells": 100_000, "n_tokens": 7, "goal": 200, "ratio": 314.15,
    "ours": {"cells_per_s": 54_321.0, "fresh_process": {"peak_bytes": 345_000_000}},
    "rival": {"how": "a line", "measured": [{"n_cells": 3_774}, {"n_cells": 18_870}], "at_n_cells": {"wall_s": 400.0}},
}  # fmt: skip
RANK = {
    "case": "rank_genes_pbmc_facs_v1", "provenance": PROVENANCE, "what": "ranking",
    "tokens_per_s": 81.6e6, "entries_per_s": 99e6, "goal": 60e6,
}  # fmt: skip
MEMORY = {
    "case": "memory_tokenize", "provenance": PROVENANCE, "what": "memory", "goal_peak_bytes": 10**9,
    "by_n_cells": {"1000000": {"peak_bytes": 516_452_352, "wall_s": 26.7}},
}  # fmt: skip
VERIFY = {
    "case": "verify_tokens", "provenance": PROVENANCE, "what": "opening a folder", "n_bytes": 288_000_000, "ratio": 4.5,
    "wall_s": {"without": {"median": 0.05}, "with": {"median": 0.23}},
}  # fmt: skip


def measure(name: str, quantized: float) -> dict:
    return {"name": name, "exact": 1.0 if "F1" not in name else 0.81234, "quantized": quantized}


ACCURACY = {
    "case": "quantize_real", "provenance": PROVENANCE, "asked": {"cells": 1234}, "training": {"n_steps": 4321},
    "rows": {
        "trained, int8": {
            "plain": {"measures": [measure("cosine of embeddings, least", 0.999871), measure("model, MB", 10.0)]},
            "calibrated": {"measures": [measure("15 nearest neighbours shared", 0.9871)]},
        },
        "classifier, int8": {"plain": {"measures": [measure("type: macro-F1", 0.80987)]}},
    },
}  # fmt: skip


def score_row(macro_f1: float, rare: float) -> dict:
    found = {key: {"mean": macro_f1, "sd": 0.0123, "folds": []} for key in ("macro_f1", "accuracy", "roc_auc")}
    by_class = {"f1_by_class": {"T": 0.9, "B": 0.8, "DC": rare}, "n_by_class": {"T": 700, "B": 250, "DC": 50}}
    return {**found, **by_class, "cpu_s": 1.0}


FINETUNE = {
    "case": "finetune_real", "provenance": PROVENANCE, "what": "cell types", "n_parameters": 1_234_567,
    "size": {
        "max_len": 64, "n_layers": 2, "width": 96, "pretraining_steps": 1600, "steps": 300, "batch_cells": 16,
    },
    "pretraining": {"losses": [{"step": 100.0, "loss": 7.654}, {"step": 1600.0, "loss": 6.543}]},
    "sets": {
        "blood": {
            "label": "type",
            "rows": {
                "PCA + logistic regression": score_row(0.912, 0.5), "plain": score_row(0.811, 0.1),
                "focal": {"error": "step 3: the loss is nan"},
            },
        }
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "imaginary-9000-4-cores"
    folder.mkdir(parents=True)
    for result in (EMBED, FLOAT32, TRAIN, TOKENIZE, RANK, MEMORY, VERIFY, ACCURACY, FINETUNE):
        (folder / f"{result['case']}.json").write_text(json.dumps(result))
    return tmp_path / "results"


def rows_of(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_number_lands_in_its_row(results: Path) -> None:
    text = report.render(results)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["**this project**"] == ["123 (111 to 136)", "", "", "512 MB"]
    assert rows["as the extractor does: padded, batches of 8"] == ["9.9 (8.9 to 10.9)", "12.5x", "", "512 MB"]
    assert rows["**this project, float32**"] == ["12.3 (11.1 to 13.5)", "", "81%", "512 MB"]
    assert rows["best stock parts, float32, batches of 8"] == ["7.9 (7.1 to 8.7)", "1.56x", "47%", "512 MB"]
    assert "everything held to AVX2" in text
    assert "reach 123 GFLOP/s here" in text
    assert "Goals: float32 against stock-float32 1.6x, 75% of what large products reach." in text
    # The last layer is compared with the last one, not with the one before it; and so are goals.
    assert rows["best stock parts: padded, batches of 8"] == ["50.0 (45.0 to 55.0)", "2.0x", "", "512 MB"]
    assert "7.7x" not in text
    assert rows["**this project, bfloat16**"] == ["24.6 (22.1 to 27.1)", "24.6", "", "", "", "512 MB"]
    assert rows["transformers' Trainer: padded, 8 cells at once"] == [
        "1.2 (1.1 to 1.4)",
        "1.2",
        "19.9x",
        "",
        "",
        "512 MB",
    ]
    assert "by more than 0.0012 (this project, bfloat16) nats" in text
    assert "12% of a padded batch" in text
    assert rows["Geneformer V2"] == ["100,000", "54,321", "250", "314x", "200x", "345 MB"]
    assert rows["pbmc_facs, Geneformer V1"] == ["82", "99", "60"]
    assert rows["`geneformer-fast tokenize`"] == ["1,000,000", "516 MB", "1,000 MB", "27"]
    assert rows["opening a folder"] == ["288 MB", "0.05 s", "0.23 s", "4.50"]
    assert rows["trained, int8, plain"] == ["0.99987", "", "", ""]
    assert rows["trained, int8, calibrated"] == ["", "0.987", "", ""]
    assert rows["classifier, int8, plain"] == ["", "", "", "0.8099 (0.8123)"]
    assert "trained for 4,321 steps" in text
    by_way = {row[1]: [row[0], *row[2:]] for row in rows_of(text) if len(row) == 6}
    assert by_way["PCA + logistic regression"] == [
        "blood, type, 1,000 cells", "**0.912 ± 0.012**", "0.912 ± 0.012", "0.912 ± 0.012", "0.500"
    ]  # fmt: skip
    assert by_way["encoder, plain"] == ["", "0.811 ± 0.012", "0.811 ± 0.012", "0.811 ± 0.012", "0.100"]
    assert by_way["encoder, focal"] == ["", *["training failed"] * 4]
    assert "masked-gene loss 7.65 after 100 steps, 6.54 at the end" in text
    assert "### Imaginary 9000, 4 cores, 16 GiB, amx_bf16" in text
    assert "400 / 650 / 1200 tokens" in text
    assert "4 threads" in text
    assert "10x against as the extractor does" in text
    assert "`0123456789ab` with uncommitted changes" in text
    assert "torch 2.9.0" in text
    assert "2030-01-02" in text


def test_tables_are_well_formed(results: Path) -> None:
    for block in report.render(results).split("\n\n"):
        widths = {len(row) for row in rows_of(block)}
        assert len(widths) <= 1, f"rows of different width:\n{block}"
    heads = re.findall(r"^\|(?: ---:? \|)+$", report.render(results), re.MULTILINE)
    assert len(heads) == 9


ROW = front.Row(
    "embed cells", "imaginary-9000-4-cores/embed_v1-10m_all-threads", "ours-last", "stock-bfloat16", "stock"
)
CARD = {
    "case": "encoder_10m_inference", "suite": "gpu", "provenance": {**PROVENANCE, "gpu": {"name": "Imaginary card"}},
    "variants": {
        "uniform": {
            "what": "inference, 512 cells", "work": {"cells": 512},
            "rows": {
                "ours": {"is_ours": True, "ms": {"p50": 40.0}, "cells_per_s": 12_800.0, "peak_bytes": 700_000_000},
                "ours-graph": {"is_ours": True, "ms": {"p50": 20.0}, "cells_per_s": 25_600.0, "peak_bytes": 1},
                "stock": {
                    "what": "transformers", "is_ours": False, "is_same": True, "ms": {"p50": 64.0},
                    "cells_per_s": 8_000.0, "peak_bytes": 1_250_000_000,
                },
                "wrong": {
                    "what": "another", "is_ours": False, "is_same": False, "ms": {"p50": 1.0}, "cells_per_s": 1.0,
                    "peak_bytes": 1,
                },
            },
        },
    },
}  # fmt: skip


def test_rows_of_the_readme_are_made_of_results(results: Path) -> None:
    (results / "card").mkdir()
    (results / "card" / "encoder_10m_inference.json").write_text(json.dumps(CARD))
    rows = (
        ROW,
        front.Row("tokenize", "imaginary-9000-4-cores/tokenize_v2", "", "", "one by one"),
        front.Row("embed on a card", "card/encoder_10m_inference", "uniform", "", "transformers"),
        front.Row("not measured", "imaginary-9000-4-cores/nothing", "", "", "nobody"),
    )
    found = rows_of(front.render(results, rows))
    machine = "Imaginary 9000, 4 cores, amx_bf16"
    assert found[2:] == [
        ["embed cells", machine, "100 cells/s", "stock", "50.0 cells/s", "2.0x", "512 MB / 512 MB"],
        ["tokenize", machine, "54,321 cells/s", "one by one", "250 cells/s", "314x", "345 MB / not measured"],
        [
            *("embed on a card", "Imaginary card", "25,600 cells/s", "transformers", "8,000 cells/s", "3.2x"),
            "700 MB / 1,250 MB",
        ],
    ]
    assert front.render(results / "nowhere") == front.NOTHING


def test_the_committed_table_has_six_rows_of_like_with_like() -> None:
    table = rows_of(front.render(ROOT / "bench" / "results"))
    assert len(table) == 2 + 6
    for row in front.ROWS:
        result = json.loads((ROOT / "bench" / "results" / f"{row.place}.json").read_text())
        if "candidates" in result and "layer" in result["candidates"][row.ours]:
            assert result["candidates"][row.ours]["layer"] == result["candidates"][row.rival]["layer"], row.task


def test_pages_are_rewritten_and_checked(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    for path in (readme, page):
        path.write_text(f"# before\n\n{report.BEGIN}\nold numbers\n{report.END}\n\nafter\n")
    arguments = ["--readme", str(readme), "--page", str(page), "--results", str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert "README.md and results.md: stale" in capsys.readouterr().out
    assert "old numbers" in readme.read_text()
    assert report.main(arguments) == 0
    for path, number in ((readme, front.NOTHING), (page, "54,321")):
        text = path.read_text()
        assert text.startswith("# before\n\n")
        assert text.endswith("\n\nafter\n")
        assert "old numbers" not in text
        assert number in text
    assert report.main([*arguments, "--check"]) == 0
    (results / "imaginary-9000-4-cores" / "tokenize_v2.json").unlink()
    assert report.main([*arguments, "--check"]) == 1
    assert "\nresults.md: stale" in "\n" + capsys.readouterr().out


def test_no_results_and_no_markers(tmp_path: Path) -> None:
    nothing = f"{report.NOTHING}\n\n{gpu_report.NOTHING}"
    assert report.render(tmp_path / "nowhere") == nothing
    (tmp_path / "empty-machine").mkdir()
    assert report.render(tmp_path) == nothing
    with pytest.raises(ValueError, match="once each"):
        report.replaced("no markers", "tables")


def test_the_committed_pages_are_not_stale() -> None:
    assert report.main(["--check"]) == 0, "run python -m bench.report and commit the README and docs/results.md"


def test_every_case_of_the_suite_is_a_test_that_exists() -> None:
    from bench.__main__ import SUITES

    for cases in SUITES.values():
        for case, test in cases.items():
            path, _, function = test.partition("::")
            name = function.split("[")[0]
            assert f"def {name}(" in (ROOT / path).read_text(), case


def test_every_measurement_is_a_case_of_the_suite() -> None:
    from bench.__main__ import SUITES

    in_suite = {test.split("[")[0] for test in SUITES["cpu"].values()}
    files = sorted((ROOT / "bench" / "cpu").glob("test_bench_*.py"))
    assert files
    for file in files:
        for function in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE):
            assert f"bench/cpu/{file.name}::{function}" in in_suite, "python -m bench cpu would leave it out"
