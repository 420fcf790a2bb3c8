"""The embed command from counts to file and picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from pictures import n_colors, pixels

from geneformer_fast import Encoder, embed, load, save, tokenize
from geneformer_fast.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with counts, their tokens, and a model with its vocabulary."""
    folder = tmp_path_factory.mktemp("embed")
    words = toys.vocabulary()
    adata = toys.cells(30, empty=(3,))
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(folder / "cells.h5ad")
    save(toys.encoder(words), folder / "model")
    words.save(folder / "model")
    words.save(folder / "dictionary")
    tokenize(adata, folder / "tokens", dictionary=words, obs=["kind", "score"])
    return folder


@pytest.fixture(autouse=True)
def _pictures_without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    toys.draw_without_umap(monkeypatch)


def run(workplace: Path, source: str, out: Path, *arguments: str) -> int:
    return main(["embed", str(workplace / source), "--model", str(workplace / "model"), "--out", str(out), *arguments])


def test_counts_to_h5ad_with_a_picture(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.h5ad", tmp_path / "umap.png"
    arguments = ["--dtype", "float32", "--plot", str(picture), "--color", "kind", "--key-added", "X_emb"]
    assert run(workplace, "cells.h5ad", out, *arguments) == 0
    assert str(out) in capsys.readouterr().out
    adata = anndata.read_h5ad(workplace / "cells.h5ad")
    expected = embed(adata, load(workplace / "model"), dictionary=workplace / "dictionary", copy=True)
    result = anndata.read_h5ad(out)
    np.testing.assert_allclose(result.obsm["X_emb"], expected.obsm["X_geneformer"], atol=2e-6)
    assert result.uns["X_emb"]["pool"] == "cls"
    image = pixels(picture)
    assert min(image.shape[:2]) > 500
    assert n_colors(image) >= 3, "three kinds of cells have three colours"
    said = json.loads((tmp_path / "out.h5ad.json").read_text())
    assert said["layer"] == "penultimate"
    assert said["vocabulary"] == "toy"


def test_options_reach_the_result(workplace: Path, tmp_path: Path) -> None:
    model = load(workplace / "model", dtype="float32")
    arguments = ["--pool", "mean", "--layer", "last", "--dtype", "float32", "--token-budget", "64"]
    arguments += ["--obs", "kind", "--obs", "score", "--counts-layer", "counts", "--device", "cpu"]
    arguments += ["--dictionary", str(workplace / "dictionary")]
    assert run(workplace, "cells.h5ad", tmp_path / "out.arrow", *arguments) == 0
    with pa.memory_map(str(tmp_path / "out.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert {"kind", "score", "source_row", "embedding"} <= set(table.column_names)
    expected = embed(workplace / "tokens", model, pool="mean", layer="last")
    np.testing.assert_allclose(np.array(table.column("embedding").to_pylist()), expected, atol=2e-6)
    assert run(workplace, "tokens", tmp_path / "genes.npy", "--pool", "gene", "--layer", "0") == 0
    assert np.load(tmp_path / "genes.npy").shape == (toys.vocabulary().n_tokens, 32)


def test_picture_of_tokens_coloured_by_a_number(workplace: Path, tmp_path: Path) -> None:
    arguments = ["--plot", str(tmp_path / "umap.png"), "--color", "score"]
    assert run(workplace, "tokens", tmp_path / "out.npy", *arguments) == 0
    # Shades of a colour bar: numbers that came through a token folder are still numbers.
    assert n_colors(pixels(tmp_path / "umap.png")) > 50


def test_overwrite(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npy"
    out.write_text("precious")
    assert run(workplace, "tokens", out) == 2
    assert "error:" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert run(workplace, "tokens", out, "--overwrite") == 0
    assert np.load(out).shape == (29, 32)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("nowhere.h5ad", [], "nowhere.h5ad"),
        ("tokens", ["--layer", "-1"], "no layer '-1'"),
        ("tokens", ["--plot", "picture.xyz"], "pictures end in"),
        ("tokens", ["--plot", "p.png", "--color", "colour"], "'colour'"),
        ("cells.h5ad", ["--counts-layer", "raw_counts"], "raw_counts"),
        ("cells.h5ad", ["--gene-column", "my_ids"], "my_ids"),
        ("cells.h5ad", ["--obs", "celltype"], "celltype"),
        ("cells.h5ad", ["--dictionary", "no-such-folder"], "no-such-folder"),
        ("cells.h5ad", ["--dtype", "int3"], "int3"),
        ("tokens", ["--device", "abacus"], "no device is called 'abacus'"),
        ("tokens", ["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    source: str, arguments: list[str], message: str, workplace: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # argparse takes a value that begins with a dash only behind an equals sign.
    joined = [f"{name}={value}" for name, value in zip(arguments[::2], arguments[1::2], strict=True)]
    assert run(workplace, source, tmp_path / "out.npy", *joined) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_and_damaged_tokens(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(workplace, tmp_path / "broken")
    for path in (broken / "model" / "model.safetensors", next((broken / "tokens").glob("data-*.arrow"))):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert run(broken, "cells.h5ad", tmp_path / "a.npy") == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    shutil.copytree(workplace / "model", broken / "model", dirs_exist_ok=True)
    assert run(broken, "tokens", tmp_path / "a.npy") == 2
    error = capsys.readouterr().err
    assert ".arrow is damaged" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.npy"))
    assert run(broken, "tokens", tmp_path / "a.npy", "--no-verify") == 0
    assert np.load(tmp_path / "a.npy").shape[0] == 29


def test_a_model_that_is_not_there(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(workplace / "tokens"), "--model", "nowhere", "--out", str(tmp_path / "o.npy")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_ctrl_c(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(self: Encoder, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "forward", forward)
    out = tmp_path / "out.npy"
    assert run(workplace, "cells.h5ad", out) == 130
    said = capsys.readouterr().err
    assert f"interrupted: {out} is not written, and nothing half-written is left; run the same command again" in said
    assert not list(tmp_path.iterdir())
    out.write_text("precious")
    assert run(workplace, "cells.h5ad", out, "--overwrite") == 130
    assert f"interrupted: {out} is as it was before" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]
    monkeypatch.undo()
    monkeypatch.setattr("geneformer_fast.extract.run.plot_umap", forward)
    assert run(workplace, "cells.h5ad", out, "--overwrite", "--plot", str(tmp_path / "p.png")) == 130
    assert f"interrupted: {out} is complete; {tmp_path / 'p.png'} is not written" in capsys.readouterr().err
    assert np.load(out).shape == (30, 32)


def test_columns_and_names_of_cells_from_the_command_line(workplace: Path, tmp_path: Path) -> None:
    arguments = ["--obs", "barcode=index", "--obs", "cell_type=kind"]
    assert run(workplace, "cells.h5ad", tmp_path / "z.npy", *arguments) == 0
    table = pq.read_table(tmp_path / "z.cells.parquet")
    adata = anndata.read_h5ad(workplace / "cells.h5ad")
    assert table.column("barcode").to_pylist() == table.column("obs_names").to_pylist() == adata.obs_names.tolist()
    assert table.column("cell_type").to_pylist() == adata.obs["kind"].tolist()
    assert np.load(tmp_path / "z.npy").shape[0] == table.num_rows == 30
    assert run(workplace, "tokens", tmp_path / "t.csv", "--obs", "cell=obs_names") == 0
    frame = pd.read_csv(tmp_path / "t.csv")
    assert frame["cell"].tolist() == adata.obs_names.delete(3).tolist()
    assert list(frame)[:3] == ["cell", "kind", "score"]
