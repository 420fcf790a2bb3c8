"""What is wrong with arguments is said at once: before anything heavy is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys

import geneformer_fast as gf
from geneformer_fast import cli
from geneformer_fast.cli import places
from geneformer_fast.errors import UnsupportedError

PROBE = """
import json, sys
from geneformer_fast.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, [name for name in ("torch", "anndata", "numba", "pandas", "umap") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells, tokens, a vocabulary, a model, and outputs that are there already."""
    folder = tmp_path_factory.mktemp("place")
    words = toys.vocabulary()
    toys.cells(5).write_h5ad(folder / "cells.h5ad")
    gf.tokenize(folder / "cells.h5ad", folder / "tokens", dictionary=words, obs=["kind"], progress=False)
    words.save(folder / "vocabulary")
    gf.save(toys.encoder(words), folder / "model")
    (folder / "there.npy").write_text("x")
    (folder / "there.csv").write_text("x")
    for name, file in (("run", "run.json"), ("tuned", "finetune.json"), ("report", "report.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    (folder / "classes.csv").write_text("gene,class\n")
    write_perturbations(folder / "perturbed")
    with pytest.raises(ZeroDivisionError):
        write_perturbations(folder / "half", is_killed=True)
    (folder / "said").mkdir()
    (folder / "said" / "statistics.json").write_text("{}")
    return folder


def write_perturbations(folder: Path, *, is_killed: bool = False) -> None:
    """One value of one cell; a run that is killed was to hold two more."""
    from geneformer_fast.perturbation.rows import CellRows
    from geneformer_fast.perturbation.store import PerturbationWriter, RunCells

    cells = np.arange(3 if is_killed else 1)
    # So many rows that each cell has a file of its own.
    with PerturbationWriter(folder, RunCells(cells, cells + 1, cells + 20_000), plan={}) as writer:
        writer.append(0, CellRows.of([[5]], [0.5]))
        if is_killed:
            writer.append(1, CellRows.of([[5]], [0.5]))
            raise ZeroDivisionError
        writer.finish()


GOOD = {
    "tokenize": "cells.h5ad --dictionary vocabulary --out new",
    "medians": "cells.h5ad --out new",
    "embed": "tokens --model model --out new.npy",
    "predict": "cells.h5ad --model model --out new.csv",
    "pretrain": "tokens --out new",
    "finetune cells": "tokens --model model --label kind --out new",
    "finetune genes": "tokens --model model --classes classes.csv --out new",
    "perturb": "tokens --model model --out new",
    "perturb-stats": "perturbed --out new",
    "quantize": "model --out new",
    "profile": "--model model --tokens tokens --out new",
    "quickstart": "--cells 60 --out new",
}
#: Command, what is put in the place of what, and what is said then.
BAD = [
    ("tokenize", "cells.h5ad", "absent.h5ad", "absent.h5ad: no such file or folder"),
    ("tokenize", "vocabulary", "absent", "absent: no such folder; give the folder that holds the gene dictionaries"),
    ("tokenize", "--out new", "--out tokens", "tokens holds finished tokens"),
    ("tokenize", "--out new", "--out model", "model exists and is no token folder"),
    ("tokenize", "--out new", "--out new --resume --overwrite", "resume and overwrite exclude each other"),
    ("tokenize", "--out new", "--out new --obs =x", "write --obs NAME"),
    ("medians", "cells.h5ad", "absent*", "nothing matches it as a pattern"),
    ("medians", "--out new", "--out vocabulary", "holds a vocabulary already"),
    ("embed", "tokens", "absent", "absent: no such file or folder"),
    ("embed", "--model model", "--model tokens", "tokens has no config.json"),
    ("embed", "new.npy", "there.npy", "there.npy exists already"),
    ("embed", "new.npy", "new.txt", "the name must end in one of .npy"),
    ("embed", "new.npy", "new.npy --allow-float", "allow_float (--allow-float) is about reading counts"),
    ("embed", "new.npy", "new.h5ad", "an .h5ad output is a copy of an .h5ad input"),
    ("embed", "new.npy", "new.npy --plot there.npy", "there.npy exists already"),
    ("embed", "new.npy", "new.npy --color kind", "color (--color) colours a picture"),
    ("embed", "new.npy", "new.npy --layer -1", 'no layer \'-1\': use "last", "penultimate", "embeddings" or 0 to 2 '),
    ("embed", "new.npy", "new.npy --layer 9", "no layer 9:"),
    ("embed", "new.npy", "new.npy --layer lsat", "no layer 'lsat'"),
    ("embed", "new.npy", "new.npy --memory-budget lots", "must be a size such as 2GB, 1.5GiB or 500MB"),
    ("embed", "new.npy", "new.npy --heatmap h.png", "name it with color (--color)"),
    ("embed", "new.npy", "new.npy --heatmap h.png --plot h.png --color kind", "both are to be h.png"),
    ("predict", "new.csv", "new.csv --memory-budget lots", "must be a size such as 2GB, 1.5GiB or 500MB"),
    ("predict", "--model model", "--model absent", "absent is not a folder; pass a local checkpoint folder"),
    ("predict", "new.csv", "there.csv", "there.csv exists already"),
    ("predict", "new.csv", "new.npy", "the name must end in one of .parquet"),
    ("pretrain", "tokens", "absent", "absent: no such token folder"),
    ("pretrain", "--out new", "--out run", "run holds a run already"),
    ("pretrain", "--out new", "--out model", "model holds files that are no training run"),
    ("pretrain", "--out new", "--out new --learning-rate -1", "learning_rate must be above 0"),
    ("pretrain", "--out new", "--out new --recipe best", "no recipe named 'best'"),
    ("pretrain", "--out new", "--out new --init absent", "absent is not a folder"),
    ("pretrain", "--out new", "--out new --eval-column kind", "write COLUMN=VALUE"),
    ("finetune cells", "--label kind", "--label kind=x", "the weight must be a number"),
    ("finetune cells", "--label kind", "--label donor", "no column 'donor' for the label; it carries kind. Carry it"),
    ("finetune cells", "--label kind", "--label kind=2 --label length", "no column 'length' for the label"),
    ("finetune cells", "--out new", "--out tuned", "tuned holds a fine-tuning already"),
    ("finetune cells", "tokens", "absent", "absent: no such token folder"),
    ("finetune cells", "--out new", "--out new --where kind", "write COLUMN=VALUE"),
    ("finetune genes", "classes.csv", "absent.csv", "--classes absent.csv: there is no such file"),
    ("finetune genes", "--model model", "--model absent", "absent is not a folder"),
    ("perturb", "tokens", "absent", "absent: no such token folder"),
    ("perturb", "--model model", "--model absent", "absent is not a folder"),
    ("perturb", "--out new", "", "say with --out where the values go"),
    ("perturb", "--out new", "--out model", "model exists and holds no perturbations"),
    ("perturb", "--out new", "--out new --resume --overwrite", "resume and overwrite exclude each other"),
    ("perturb", "--out new", "--out new --dictionary absent", "absent: no such folder"),
    ("perturb", "--out new", "--out new --genes absent.txt", "--genes absent.txt: there is no such file"),
    ("perturb", "--out new", "--out new --genes ,", "genes (--genes) must name a gene"),
    ("perturb", "--out new", "--out new --genes A,B,A", "gene 'A' is in a list twice"),
    ("perturb", "--out new", "--out new --together", "say which with genes (--genes)"),
    ("perturb", "--out new", "--out new --genes A,B --anchor B", "must not be one of them (--genes)"),
    ("perturb", "--out new", "--out new --sets absent.gmt", "--sets absent.gmt: there is no such file"),
    ("perturb", "--out new", "--out new --sets there.csv", "the set 'x' has no genes"),
    ("perturb", "--out new", "--out new --kind swap", "exchanges two genes: ask for pairs (--pairs)"),
    ("perturb", "--out new", "--out new --kind inhibit", "say which with doses (--doses)"),
    ("perturb", "--out new", "--out new --doses 0.5", "takes no doses (--doses)"),
    ("perturb", "--out new", "--out new --kind activate --doses a", "write numbers between commas"),
    ("perturb", "--out new", "--out new --counts cells.h5ad", "--counts is about --kind counts"),
    ("perturb", "--out new", "--out new --kind counts --doses 2 --counts no.h5ad", "no.h5ad: no such file or folder"),
    ("perturb", "--out new", "--out new --states kind", "write COLUMN=START,GOAL"),
    ("perturb", "--out new", "--out new --states kind=a", "write COLUMN=START,GOAL"),
    ("perturb", "--out new", "--out new --states kind=a,b,a", "'a' is named twice"),
    ("perturb", "--out new", "--out new --state-embeddings there.npy", "say which with --states"),
    ("perturb", "--out new", "--out new --seed 3", "--seed is of the draw of cells"),
    ("perturb", "--out new", "--out new --window 3", "write START:STOP"),
    ("perturb", "--out new", "--out new --window 3:3", "the window holds no cell"),
    ("perturb", "--out new", "--out new --shard 3/2", "shard (--shard) is i/N"),
    ("perturb", "--out new", "--out new --best 5", "best (--best) is of a screen"),
    ("perturb", "--out new", "--out new --screen gradient --best 0", "best (--best) must be at least 1"),
    ("perturb", "--out new", "--out new --screen gradient --kind swap --pairs", "of deletions or overexpressions"),
    ("perturb", "--out new", "--out new --screen gradient --genes A", "leave genes and lists out"),
    ("perturb", "--out new", "--out new --layer 9", "no layer 9:"),
    ("perturb-stats", "perturbed", "absent", "absent: there is no such folder; name one that perturb wrote"),
    ("perturb-stats", "perturbed", "model", "model: it holds no perturbations"),
    ("perturb-stats", "perturbed", "half", "half is unfinished: 1 of 3 files are complete"),
    ("perturb-stats", "--out new", "--out model", "which is no part of statistics"),
    ("perturb-stats", "--out new", "--out said", "said holds statistics already"),
    ("perturb-stats", "--out new", "--out there.csv", "there.csv is a file; name a folder"),
    ("perturb-stats", "--out new", "--out new --mode vs_null", "give its folder as null (--null)"),
    ("perturb-stats", "--out new", "--out new --null model", "model: it holds no perturbations"),
    ("perturb-stats", "--out new", "--out new --compare absent", "absent: there is no such folder"),
    ("perturb-stats", "--out new", "--out new --anchor G", "ask for one of them"),
    ("perturb-stats", "--out new", "--out new --genes G", "ask for one of them"),
    ("perturb-stats", "--out new", "--out new --fdr 2", "fdr (--fdr) is a share above 0 and below 1, not 2.0"),
    ("perturb-stats", "--out new", "--out new --min-cells 0", "min_cells (--min-cells) must be at least 1"),
    ("perturb-stats", "--out new", "--out new --dictionary absent", "absent: no such folder"),
    ("perturb-stats", "--out new", "--out new --embeddings absent.npy", "--embeddings absent.npy: there is no such"),
    ("perturb-stats", "--out new", "--out new --color kind", "color (--color) colours the cells of embeddings"),
    ("quantize", "--out new", "--out model", "model is, holds or lies in the folder of the model"),
    ("quantize", "--out new", "--out run", "run holds files and no model"),
    ("quantize", "--out new", "--out new --label kind", "--label is about comparing models"),
    ("quantize", "--out new", "--out new --check absent", "absent: no such token folder"),
    ("quantize", "--out new", "--out new --check tokens --label donor", "tokens has no column 'donor' for the label"),
    ("profile", "--out new", "--out report", "report exists already"),
    ("profile", "--tokens tokens", "--tokens absent", "absent: no such token folder"),
    ("profile", "--out new", "--out new --layer -1", "no layer '-1'"),
    ("profile", "--model model", "--model geneformer-v1-10m --layer 6", "or 0 to 5 "),
    ("profile", "--out new", "--out new --mode tokenize", "--model is about a model"),
    ("quickstart", "--cells 60", "--cells 9", "take 50 to 500 of them"),
    ("quickstart", "--out new", "--out there.csv", "there.csv is a file; name a folder with --out"),
    ("quickstart", "--out new", "--out model", "model holds files that quickstart did not make"),
    *(
        (name, "--out new", f"--out new --device {device}", f"no device is called '{device}'; use cpu, cuda, or cuda:N")
        for name in ("pretrain", "finetune cells", "finetune genes", "profile")
        for device in ("gpu", "cuda:one")
    ),
    ("embed", "new.npy", "new.npy --device gpu", "no device is called 'gpu'"),
    ("predict", "new.csv", "new.csv --device CUDA", "no device is called 'CUDA'"),
    ("quantize", "--out new", "--out new --calibrate tokens --device gpu", "no device is called 'gpu'"),
]


def words_of(command: str, old: str = "", new: str = "") -> list[str]:
    assert old in GOOD[command]
    return [*command.split(), *GOOD[command].replace(old, new, 1).split()]


@pytest.mark.parametrize(("command", "old", "new", "said"), BAD)
def test_what_is_said(
    command: str, old: str, new: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setattr(f"{cli.COMMANDS[command.split()[0]]}.run", pytest.fail)
    assert cli.main(words_of(command, old, new)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", GOOD)
def test_nothing_is_wrong_with_what_is_right(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    args = cli.parsed(words_of(command))
    assert args.check(args) is None


@pytest.mark.parametrize("command", GOOD)
def test_and_nothing_heavy_was_loaded_for_it(command: str, place: Path) -> None:
    """A process of its own for every command, with the fault that is found last."""
    given = [json.dumps(words_of(name, old, new)) for name, old, new, _ in BAD if name == command]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, given[-1]], cwd=place, capture_output=True, text=True, timeout=120,
        env=paths_of_this_checkout(),
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [2, []], done.stderr


@pytest.mark.parametrize("more", ["embed --layer -1", "embed --memory-budget lots", "embed --heatmap h.png"])
def test_nor_for_what_a_value_means(more: str, place: Path) -> None:
    command, *options = more.split()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([*words_of(command, "new.npy", "new.npy"), *options])], cwd=place,
        capture_output=True, text=True, timeout=120, env=paths_of_this_checkout(),
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [2, []], done.stderr


def paths_of_this_checkout() -> dict[str, str]:
    import os

    root = Path(gf.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}


@pytest.mark.parametrize(
    ("version", "files", "said"),
    [
        ("2.13.0+cpu", ["nvidia0"], "torch 2.13.0+cpu is built for CPUs"),
        ("2.13.0+cu130", [], "this machine has no card, or its driver is not loaded"),
        ("2.13.0+cu130", ["nvidia0"], None),
        ("2.13.0", ["kfd"], None),
    ],
)
def test_a_card_that_is_not_there(
    version: str, files: list[str], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(places, "_torch_version", lambda: version)
    monkeypatch.setattr(places, "_DEVICES", tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    for device in ("cuda", "cuda:1"):
        if said is None:
            places.check_device(device)
        else:
            with pytest.raises(UnsupportedError, match=re.escape(said)):
                places.check_device(device)
    for device in (None, "cpu", "mps", "xpu:1"):
        places.check_device(device)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrain t --out o --epochs 1 --steps 3", "not allowed with argument --epochs"),
        ("pretrain t --out o --batch-cells 1 --batch-tokens 3", "not allowed with argument --batch-cells"),
        ("pretrain t --out o --warmup-steps 1 --warmup-share 0.1", "not allowed with argument --warmup-steps"),
        ("finetune cells t --model m --label l --out o --warmup-steps 1 --warmup-share 0.1", "not allowed with"),
    ],
)
def test_options_that_contradict_each_other(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parsed(line.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("embed t --model m --out o.npy --bogus 3", "embed"),
        ("finetune cells t --model m --label l --out o --bogus", "finetune cells"),
        ("embed t --model m --out o.h5ad --key a --key-added b", "embed"),
    ],
)
def test_usage_is_that_of_the_command(line: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*line.split(), "--json"])
    assert stop.value.code == 2
    found = capsys.readouterr()
    assert f"usage: geneformer-fast {command} " in found.err
    assert f"geneformer-fast {command}: error: " in found.err
    said = json.loads(found.out)
    assert said["kind"] == "ArgumentError"
    assert said["error"] in found.err
