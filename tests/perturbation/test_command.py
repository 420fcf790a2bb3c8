"""geneformer-fast perturb: what it writes, says and leaves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

import geneformer_fast as gf
from geneformer_fast import cli
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.perturbation.compare import Comparison
from geneformer_fast.perturbation.kinds import KINDS

ROLES = "kind=a,b,c"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells, their tokens, and a model with its vocabulary."""
    folder = tmp_path_factory.mktemp("place")
    words = toys.vocabulary()
    toys.cells(9).write_h5ad(folder / "cells.h5ad")
    gf.tokenize(folder / "cells.h5ad", folder / "tokens", dictionary=words, obs="kind", progress=False)
    words.save(gf.save(toys.encoder(words), folder / "model"))
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command beside the cells, and gives its code, its words, and where the values are."""
    monkeypatch.chdir(place)

    def of(*options: str, out: str | None = "new") -> tuple[int, Any, Any]:
        where = [] if out is None else ["--out", str(tmp_path / out)]
        code = cli.main(["perturb", "tokens", "--model", "model", "--device", "cpu", *where, *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return of


def frame_of(folder: Path) -> Any:
    return gf.open_perturbations(folder).to_frame()


def tokens_of(*genes: str) -> list[int]:
    return [toys.vocabulary().token_ids[gene] for gene in genes]


def test_values_are_those_of_the_function(run: Any, tmp_path: Path, place: Path) -> None:
    code, said, _ = run("--states", ROLES, "--mode", "cls_and_gene", "--layer", "last", "--max-cells", "2")
    assert code == 0
    assert f"{tmp_path / 'new'}: perturbations of 2 cells in " in said
    roles = {"column": "kind", "start": "a", "goal": "b", "alternatives": ["c"]}
    wanted = gf.perturb(
        place / "tokens", place / "model", states=roles, mode="cls_and_gene", layer="last", max_cells=2, device="cpu",
        progress=False,
    )  # fmt: skip
    found = frame_of(tmp_path / "new")
    assert len(found) == len(wanted) > 0
    np.testing.assert_array_equal(found["value"].to_numpy(), wanted["value"].to_numpy())
    assert found["cell"].tolist() == wanted["cell"].tolist()
    assert set(found["state"].dropna()) == {"a", "b", "c"}


def test_the_plan_alone(run: Any, tmp_path: Path) -> None:
    code, said, _ = run("--dry-run", "--window", "0:3", out=None)
    assert code == 0
    assert said.splitlines()[0].startswith("3 cells of 9 (3 in the window)")
    code, said, _ = run("--dry-run", "--json", "--window", ":3")
    told = json.loads(said)
    assert (code, told["command"], told["n_cells"]) == (0, "perturb", 3)
    assert told["estimated_seconds"] >= 0
    assert not (tmp_path / "new").exists()


def test_one_object(run: Any, tmp_path: Path) -> None:
    genes = ",".join(toys.gene_ids()[:2])
    code, said, _ = run("--genes", genes, "--pairs", "--json", "--quiet")
    told = json.loads(said)
    assert (code, told["out"], told["n_cells"], told["n_variants"]) == (0, str(tmp_path / "new"), 9, 9)
    assert told["noise"]["largest"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_there(kind: str, run: Any, tmp_path: Path) -> None:
    genes = toys.gene_ids()[:2]
    how = {"inhibit": ["--doses", "0.2,0.9"], "activate": ["--doses", "1"], "counts": ["--doses", "0,50"]}
    code, _, error = run("--kind", kind, "--genes", ",".join(genes), "--together", *how.get(kind, []))
    assert code == 0, error
    found = frame_of(tmp_path / "new")
    n_doses = {"inhibit": 2, "counts": 2}.get(kind, 1)
    assert len(found) == 9 * n_doses
    assert {tuple(each) for each in found["tokens"]} == {tuple(tokens_of(*genes))}
    assert ("dose" in found) == (kind in how)
    if kind in how:
        assert sorted(set(found["dose"])) == pytest.approx(sorted(map(float, how[kind][1].split(","))))


def test_without_a_gene_by_counts_is_without_it_by_rank(run: Any, tmp_path: Path) -> None:
    """As long as nothing was cut off: the others keep their order."""
    assert run("--kind", "counts", "--doses", "0", out="counts")[0] == 0
    assert run(out="ranks")[0] == 0
    counts, ranks = frame_of(tmp_path / "counts"), frame_of(tmp_path / "ranks")
    np.testing.assert_allclose(counts["value"], ranks["value"], atol=2e-6)
    assert counts["cell"].tolist() == ranks["cell"].tolist()


def test_counts_in_memory_or_elsewhere(run: Any, place: Path, tmp_path: Path) -> None:
    ask = {"kind": "counts", "doses": [0.5, 20], "genes": toys.gene_ids()[:1], "device": "cpu", "progress": False}
    adata = toys.cells(9)
    found = gf.perturb(place / "tokens", place / "model", counts=adata, **ask)
    named = gf.perturb(place / "tokens", place / "model", **ask)
    assert found["value"].tolist() == named["value"].tolist()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/cells.h5ad").write_bytes((place / "cells.h5ad").read_bytes())
    genes = toys.gene_ids()[0]
    code, _, _ = run(
        "--kind", "counts", "--doses", "0.5,20", "--genes", genes, "--counts", str(tmp_path / "more/cells.h5ad"),
    )  # fmt: skip
    assert code == 0
    assert frame_of(tmp_path / "new")["value"].tolist() == found["value"].tolist()
    with pytest.raises(InputError, match="does not hold the counts"):
        gf.perturb(place / "tokens", place / "model", counts=toys.cells(9, seed=5), **ask)
    with pytest.raises(UnsupportedError, match="are of kind 'counts'"):
        gf.perturb(place / "tokens", place / "model", counts=adata, device="cpu")
    with pytest.raises(UnsupportedError, match="needs their gene dictionary"):
        gf.perturb(place / "tokens", toys.encoder(), **{**ask, "genes": tokens_of(genes), "device": None})


def test_counts_of_shards_are_those_of_the_whole(run: Any, tmp_path: Path) -> None:
    how = ("--kind", "counts", "--doses", "7", "--genes", toys.gene_ids()[0])
    assert run(*how, out="whole")[0] == 0
    for shard in ("1/2", "2/2"):
        assert run(*how, "--shard", shard, out=shard.replace("/", "of"))[0] == 0
    parts = gf.open_perturbations([tmp_path / "1of2", tmp_path / "2of2"]).to_frame()
    whole = frame_of(tmp_path / "whole")
    np.testing.assert_allclose(parts["value"], whole["value"], atol=1e-6)
    assert parts["cell"].tolist() == whole["cell"].tolist()


def test_sets_have_their_names(run: Any, tmp_path: Path) -> None:
    genes = toys.gene_ids()
    path = tmp_path / "sets.gmt"
    path.write_text("\n".join(["first\tabout\t" + "\t".join(genes[:2]), f"other\t\t{genes[0]}\tNOGENE"]))
    with pytest.warns(UserWarning, match="1 of 4 genes have no token and are left out, such as 'NOGENE'"):
        assert run("--sets", str(path))[0] == 0
    found = frame_of(tmp_path / "new")
    assert set(zip(found["set"], map(tuple, found["tokens"]), strict=True)) == {
        ("first", tuple(tokens_of(*genes[:2]))), ("other", tuple(tokens_of(genes[0]))),
    }  # fmt: skip


def test_genes_from_a_file(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("# two\n" + "\n".join(toys.gene_ids()[:2]) + "\n\n")
    assert run("--genes", str(path))[0] == 0
    assert {token for each in frame_of(tmp_path / "new")["tokens"] for token in each} == set(
        tokens_of(*toys.gene_ids()[:2])
    )


def test_it_goes_on_and_does_not_write_over(run: Any, tmp_path: Path) -> None:
    how = ("--genes", toys.gene_ids()[0])
    assert run(*how)[0] == 0
    code, _, said = run(*how)
    assert code == 2
    assert "holds finished perturbations" in said
    assert run(*how, "--resume")[0] == 0
    code, _, said = run("--genes", toys.gene_ids()[1], "--resume")
    assert code == 2
    assert run("--genes", toys.gene_ids()[1], "--overwrite")[0] == 0
    assert {tuple(each) for each in frame_of(tmp_path / "new")["tokens"]} == {tuple(tokens_of(toys.gene_ids()[1]))}


def test_what_is_there_after_an_interrupt(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("geneformer_fast.perturbation.store._ROWS_PER_FILE", 10)
    options = ["perturb", "tokens", "--model", "model", "--device", "cpu", "--token-budget", "200"]
    args = cli.parsed([*options, "--out", str(tmp_path / "new")])
    assert args.interrupted(args).endswith("is not written; run the same command again to begin")
    effects, n_calls = Comparison.effects, itertools.count()

    def until(*given: Any) -> Any:
        if next(n_calls) > 60:
            raise KeyboardInterrupt
        return effects(*given)

    monkeypatch.setattr(Comparison, "effects", until)
    with pytest.raises(KeyboardInterrupt):
        args.run(args)
    assert args.interrupted(args).endswith("keeps the cells that are complete; the same command with --resume goes on")
    monkeypatch.setattr(Comparison, "effects", effects)
    assert cli.main([*options, "--out", str(tmp_path / "new"), "--resume", "--quiet"]) == 0
    assert cli.main([*options, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    assert args.interrupted(args) == f"{tmp_path / 'new'} is complete"
    assert frame_of(tmp_path / "new").equals(frame_of(tmp_path / "whole"))
