"""Cost against size: exponents of made-up costs, which sizes are measured, and the real curves on small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import cost, report
from bench.compare import readings
from bench.cost import Job, NoRoom, embedding, measured, perturbing, said
from bench.scaling import draw, fitted
from bench.tile import tile_h5ad
from bench.token_folders import perturbable_folder, token_folder
from geneformer_fast import Encoder, EncoderConfig, open_tokens, save
from geneformer_fast.profiling.clock import WallClock

SIZES = (10, 100, 1_000, 10_000, 100_000)


@pytest.mark.parametrize(("fixed", "factor", "exponent"), [(2.0, 3e-3, 1.0), (0.0, 1e-6, 2.0), (5.0, 1e-2, 1.25)])
def test_exponents_are_found_beside_a_fixed_part(fixed: float, factor: float, exponent: float) -> None:
    growth = fitted(SIZES, [fixed + factor * size**exponent for size in SIZES])
    assert growth is not None
    assert growth.exponent == pytest.approx(exponent, abs=1e-3)
    assert growth.fixed_s == pytest.approx(fixed, abs=1e-3)
    assert growth.seconds(10**6) == pytest.approx(fixed + factor * 10 ** (6 * exponent), rel=0.01)
    assert growth.exponent_low <= growth.exponent <= growth.exponent_high
    assert growth.is_near(exponent)
    assert not growth.is_near(exponent + 0.2)


def test_noise_makes_the_range_wider_and_not_the_exponent_wrong() -> None:
    noisy = np.random.default_rng(0).uniform(0.95, 1.05, len(SIZES))
    growth = fitted(SIZES, [(0.5 + 2e-3 * size) * share for size, share in zip(SIZES, noisy, strict=True)])
    assert growth is not None
    assert growth.exponent == pytest.approx(1.0, abs=0.05)
    assert growth.exponent_high - growth.exponent_low > 1e-3
    assert 0.005 < growth.largest_error < 0.1


def test_what_has_no_fixed_part_may_fall() -> None:
    growth = fitted(SIZES, [7.0 * size**-0.3 for size in SIZES], has_fixed=False)
    assert growth is not None
    assert growth.exponent == pytest.approx(-0.3)
    assert fitted(SIZES[:3], [1.0, 2.0, 3.0]) is None


class Time(WallClock):
    """A clock that runs only while something is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def samples(self, run: Any, n: int, *, lead_ms: float = 0.0) -> list[float]:
        found = []
        for _ in range(n):
            begin = self.now
            run()
            found.append((self.now - begin) * 1e3)
        return found

    def taking(self, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds

        return run


def test_sizes_that_would_take_too_long_are_predicted_and_say_so() -> None:
    time = Time()

    def prepare(size: int) -> Any:
        time.now += 1e6  # making files does not count
        return time.taking(1.0 + 1e-3 * size)

    job = Job("cost_x", "x", "cells", (10, 100, 1_000, 10_000, 100_000, 1_000_000), prepare, 1.0)
    curve = measured(job, seconds=500.0, rounds=3, clock=time)
    assert [point["at"] for point in curve["points"]] == [10, 100, 1_000, 10_000, 100_000]
    assert curve["points"][2]["seconds"] == {"min": 2.0, "median": 2.0, "max": 2.0}
    assert curve["left_out"] == {"1000000": "4 runs would take 4,040 s"}
    assert curve["predicted"] == [{"at": 1_000_000, "seconds": 1001.0}]
    assert curve["growth"]["exponent"] == pytest.approx(1.0, abs=1e-3)
    assert curve["is_as_expected"]
    assert "exponent 1.00 (1.00 to 1.00 without one of the sizes), as it should be; fixed part 1 s" in said(curve)
    few = measured(job, seconds=10.0, clock=time)
    assert few["growth"] is None
    assert few["predicted"] == []
    assert "say nothing of exponents" in said(few)


def test_a_cost_that_is_not_linear_says_so_and_a_full_disk_is_a_reason() -> None:
    time = Time()

    def prepare(size: int) -> Any:
        if size > 1_000:
            raise NoRoom("its files take about 12 GB")
        return time.taking(1e-6 * size**2)

    job = Job("cost_x", "x", "cells", (100, 200, 400, 1_000, 10_000), prepare, 1.0)
    curve = measured(job, seconds=1e6, rounds=1, clock=time)
    assert curve["left_out"] == {"10000": "its files take about 12 GB"}
    assert not curve["is_as_expected"]
    assert "exponent 2.00" in said(curve)
    assert "should be 1.00" in said(curve)


def test_time_per_cell_and_what_compare_reads_of_it() -> None:
    time = Time()
    job = Job(
        "cost_x", "x", "tokens per cell", (64, 128, 256, 512), lambda size: time.taking(2.0), 1.0,
        per_cell=lambda size: 1024 // size, has_fixed=False,
    )  # fmt: skip
    curve = measured(job, rounds=1, clock=time)
    assert [point["seconds"]["median"] for point in curve["points"]] == [0.125, 0.25, 0.5, 1.0]
    assert curve["growth"]["exponent"] == pytest.approx(1.0)
    curve["predicted"] = [{"at": 1024, "seconds": 2.0}]
    assert [*readings(curve)] == [f"points[{size}].seconds" for size in job.sizes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EncoderConfig.preset("geneformer-v2-104m", n_layers=2, width=16, n_heads=2, ff_width=16, max_len=64)
    return Path(save(Encoder(config).eval(), tmp_path_factory.mktemp("model") / "small"))


@pytest.mark.parametrize(
    ("kind", "sizes", "runs"),
    [("cells", (2, 4, 8, 16), "cells"), ("length", (8, 16, 32, 64, 128), "tokens per cell"),
     ("batch", (64, 128, 256, 512), "tokens per batch")],
)  # fmt: skip
def test_embeddings_are_measured(kind: str, sizes: tuple[int, ...], runs: str, model: Path, tmp_path: Path) -> None:
    """The real thing, small: cells of a V2 model on the CPU."""
    job = embedding(kind, model, tmp_path, sizes=sizes, n_tokens=256)
    assert (job.size, job.case) == (runs, f"cost_{kind}_small_cpu")
    curve = measured(job, rounds=1)
    assert [point["at"] for point in curve["points"]] == [size for size in sizes if size <= 64 or kind == "batch"]
    assert curve["growth"]["exponent_low"] <= curve["growth"]["exponent_high"]
    if kind == "length":
        assert 1.0 < job.expected < 2.0


@pytest.mark.parametrize(
    ("kind", "sizes", "runs"),
    [("perturb-length", (8, 16, 32, 64, 128), "tokens per perturbed cell"), ("perturb-genes", (4, 8, 16, 32), "genes")],
)
def test_perturbed_cells_are_measured(
    kind: str, sizes: tuple[int, ...], runs: str, model: Path, tmp_path: Path
) -> None:
    job = perturbing(kind, model, tmp_path, sizes=sizes, n_tokens=256)
    assert (job.size, job.case) == (runs, f"cost_{kind}_small_cpu")
    asked = [size for size in sizes if size <= 64]
    for size in asked[-2:]:  # a value of every perturbed cell, whose number divides the time
        found = job.prepare(size)()
        assert len(found) == (job.per_cell(size) if job.per_cell else size)
        assert found["value"].notna().all()
    if kind == "perturb-length":
        assert [job.per_cell(size) for size in asked] == [32, 16, 8, 4]
        assert 1.0 < job.expected < 2.0
    else:
        assert (job.expected, job.has_fixed) == (1.0, True)


def test_made_up_cells_are_those_of_the_model(tmp_path: Path) -> None:
    for family, ends in (("v1", False), ("v2", True)):
        name = next(name for name in ("geneformer-v1-10m", "geneformer-v2-104m") if family in name)
        config = EncoderConfig.preset(name)
        with open_tokens(token_folder(tmp_path / family, [5, 9], config)) as folder:
            values, bounds = folder.read(range(2))
        assert [*np.diff(bounds)] == [5, 9]
        assert values.max() < config.vocab_size
        assert ({*values[bounds[:-1]]} == {2}) is ends
        assert ({*values[bounds[1:] - 1]} == {3}) is ends


def test_made_up_cells_share_some_genes_and_have_none_twice(tmp_path: Path) -> None:
    config = EncoderConfig.preset("geneformer-v2-104m")
    path, genes = perturbable_folder(tmp_path / "tokens", [40, 12], config, 6)
    with open_tokens(path) as folder:
        values, bounds = folder.read(range(2))
    assert [*np.diff(bounds)] == [40, 12]
    for cell in np.split(values, bounds[1:-1]):
        assert (cell[0], cell[-1], len(set(cell))) == (2, 3, len(cell))
        places = [[*cell].index(gene) for gene in genes]
        assert places == sorted(places)
        assert places[-1] - places[0] >= len(cell) // 2


def test_the_last_repeat_of_a_file_may_be_cut(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    from scipy.sparse import csr_matrix

    counts = csr_matrix(np.random.default_rng(0).poisson(0.5, (7, 11)).astype(np.float32))
    source = anndata.AnnData(counts)
    source.obs["kind"] = [*"abcabca"]
    source.obs["kind"] = source.obs["kind"].astype("category")
    source.obs["n"] = np.arange(7)
    source.write_h5ad(tmp_path / "source.h5ad")
    for n_cells, is_exact, n_found in ((3, True, 3), (7, True, 7), (17, True, 17), (17, False, 21)):
        path = tile_h5ad(tmp_path / "source.h5ad", tmp_path / f"{n_found}.h5ad", n_cells=n_cells, is_exact=is_exact)
        found = anndata.read_h5ad(path)
        rows = np.arange(n_found) % 7
        assert found.shape == (n_found, 11)
        np.testing.assert_array_equal(found.X.toarray(), counts.toarray()[rows])
        assert [*found.obs["kind"]] == [source.obs["kind"].iloc[row] for row in rows]
        assert found.obs_names.is_unique


def test_the_command_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sizes = (1_000, 2_000, 4_000, 8_000, 10**15)
    jobs = [
        Job("cost_a", "a", "cells", sizes, lambda size: lambda: sum(range(size)), 1.0),
        Job("cost_b", "b", "tokens per batch", sizes[:4], lambda size: lambda: None, 0.0, has_fixed=False),
    ]
    monkeypatch.setattr(cost, "jobs", lambda *arguments: jobs)
    tmp_path = tmp_path / "results" / "some-machine"
    assert cost.main(["--out", str(tmp_path), "--rounds", "1", "--seconds", "100", "cells", "batch"]) == 0
    assert "a, by cells: exponent" in capsys.readouterr().out
    found = json.loads((tmp_path / "cost_a.json").read_text())
    assert found["provenance"]["machine"]
    assert [point["at"] for point in found["predicted"]] == [10**15]
    assert "b, exponent" in (tmp_path / "cost.svg").read_text()
    # The tables of the README.
    lines = report.render(tmp_path.parent).splitlines()
    assert any(line.startswith("| a, by cells | 1,000 to 8,000 | ") and f"{10**15:,}: " in line for line in lines)
    for bad in (["speed"], ["--rounds", "0"], ["--sizes", "1,2"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            cost.main(bad)


def test_drawings_have_a_panel_for_each_kind_of_size(tmp_path: Path) -> None:
    curve = {
        "name": "x", "size": "cells", "growth": {"fixed_s": 1.0, "factor": 1e-3, "exponent": 1.0},
        "points": [{"at": at, "seconds": {"median": 1 + at / 1e3}} for at in (10, 100)],
        "predicted": [{"at": 1000, "seconds": 2.0}],
    }  # fmt: skip
    one = draw([curve], tmp_path / "one.svg").read_text()
    two = draw([curve, {**curve, "size": "tokens per cell", "growth": None, "predicted": []}], tmp_path / "two.svg")
    assert one.count('id="axes_') == 1
    assert two.read_text().count('id="axes_') == 2
