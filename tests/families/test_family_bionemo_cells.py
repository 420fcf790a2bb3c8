"""BioNeMo's cells: tokens, dictionaries inside archives, and every command on a small model."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import bionemo_files as files
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import toys
from typed_bionemo import N_PADDED, archive, model_state, write_dictionaries

import geneformer_fast as gf
from geneformer_fast import families
from geneformer_fast.cli import main
from geneformer_fast.errors import VocabularyError
from geneformer_fast.extract.pooling import MEANS, Place, pools_of
from geneformer_fast.tokenization.bundled import has_dictionaries


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``dictionaries``, ``model.nemo``, ``cells.h5ad`` and ``tokens``."""
    folder = tmp_path_factory.mktemp("bionemo")
    write_dictionaries(folder / "dictionaries")
    archive(folder / "model.nemo", folder / "dictionaries")
    adata = toys.cells(41)
    extra = sp.csr_matrix(np.full((41, 2), 50, dtype=np.float32))  # of no gene in the vocabulary
    names = [*adata.var_names, "ENSG99999999998", "ENSG99999999999"]
    adata = anndata.AnnData(sp.hstack([adata.X, extra]).tocsr(), obs=adata.obs, var=pd.DataFrame(index=names))
    adata.write_h5ad(folder / "cells.h5ad")
    gf.tokenize(
        folder / "cells.h5ad", folder / "tokens", dictionary=folder / "dictionaries", obs=["kind"], progress=False
    )
    return folder


def test_cells_are_cls_and_genes_by_their_share_of_the_vocabulary(home: Path) -> None:
    words = gf.Vocabulary.from_folder(home / "dictionaries")
    assert (words.family, words.cls_id, words.mask_id, words.pad_id, words.eos_id) == ("bionemo", 0, 1, 2, None)
    adata = anndata.read_h5ad(home / "cells.h5ad")
    counts = adata.X.toarray()[:, : toys.N_GENES].astype(np.float64)  # totals over the vocabulary
    medians = np.array([words.medians[gene] for gene in adata.var_names[: toys.N_GENES]])
    ids = np.array([words.token_ids[gene] for gene in adata.var_names[: toys.N_GENES]])
    with gf.open_tokens(home / "tokens") as folder:
        found, bounds = folder.read(np.arange(folder.n_cells))
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        value = counts[row] / counts[row].sum() * 10_000 / medians
        there = np.flatnonzero(counts[row])
        order = there[np.argsort(-value[there], kind="stable")]
        assert found[start] == 0
        np.testing.assert_array_equal(found[start + 1 : stop], ids[order])


def test_long_cells_lose_their_last_genes_and_no_end_is_put_there(home: Path, tmp_path: Path) -> None:
    gf.tokenize(home / "cells.h5ad", tmp_path / "short", dictionary=home / "dictionaries", max_len=5, progress=False)
    with gf.open_tokens(tmp_path / "short") as short, gf.open_tokens(home / "tokens") as whole:
        for cell in range(short.n_cells):
            first, _ = short.read(np.array([cell]))
            np.testing.assert_array_equal(first, whole.read(np.array([cell]))[0][:5])


def test_both_rules_of_pooling_are_those_of_the_reference() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "bionemo_geneformer_tiny_DERIVED.json"
    if not path.is_file():
        pytest.skip("numeric references are not here")
    reference = json.loads(path.read_text())
    mask = torch.tensor(reference["attention_mask"])
    tokens = gf.Ragged.from_padded(torch.tensor(reference["input_ids"]), mask)
    hidden = torch.tensor(reference["hidden"], dtype=torch.float64)[mask.bool()]
    place = Place(tokens, special_ids=range(5))
    for rule in ("bionemo1", "bionemo2"):
        weights = MEANS[rule](place).double()
        lengths = tokens.lengths.long()
        sums = torch.segment_reduce(hidden * weights[:, None], "sum", lengths=lengths)
        means = sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]
        expected = torch.tensor(reference[f"embedding_{rule}"], dtype=torch.float64)
        torch.testing.assert_close(means, expected, atol=1e-9, rtol=0)


def test_embeddings_are_read_where_their_authors_read_them(home: Path) -> None:
    model = gf.load(home / "model.nemo", device="cpu", dtype="float64")
    assert {"cls", "mean", "gene", "bionemo1", "bionemo2"} <= set(pools_of(model.config))
    found = {
        pool: gf.embed(home / "tokens", model, pool=pool, progress=False)
        for pool in (None, "mean", "bionemo1", "bionemo2")
    }
    with gf.open_tokens(home / "tokens") as folder:
        values, bounds = folder.read(np.arange(folder.n_cells))
    cells = [torch.from_numpy(values[a:b].astype(np.int64)) for a, b in itertools.pairwise(bounds)]
    with torch.inference_mode():
        hidden = [model(gf.Ragged.from_cells([cell])).values for cell in cells]
    first = np.stack([states[1:].mean(0).numpy() for states in hidden])
    second = np.stack([states[1:-1].mean(0).numpy() for states in hidden])
    for pool in (None, "mean", "bionemo1"):
        np.testing.assert_allclose(found[pool], first, atol=2e-6)
    np.testing.assert_allclose(found["bionemo2"], second, atol=2e-6)
    assert np.abs(first - second).max() > 1e-3
    assert families.family_reading(model.config).layer == "last"


def test_dictionaries_are_found_inside_models(home: Path, tmp_path: Path) -> None:
    inside = gf.Vocabulary.from_folder(home / "model.nemo")
    words = gf.Vocabulary.from_folder(home / "dictionaries")
    assert inside.fingerprint == words.fingerprint
    assert inside.name == "model/geneformer.vocab"
    expected = gf.embed(home / "tokens", home / "model.nemo", device="cpu", dtype="float32", progress=False)
    found = gf.embed(home / "cells.h5ad", home / "model.nemo", device="cpu", dtype="float32", progress=False)
    np.testing.assert_array_equal(found, expected)
    gf.tokenize(home / "cells.h5ad", tmp_path / "tokens", dictionary=home / "model.nemo", progress=False)
    with gf.open_tokens(tmp_path / "tokens") as again, gf.open_tokens(home / "tokens") as before:
        np.testing.assert_array_equal(again.read(np.arange(41))[0], before.read(np.arange(41))[0])
    folder = files.nemo2_folder(tmp_path / "nemo2", lambda at: files.write_sharded(at, files.stacked(model_state())))
    assert not has_dictionaries(folder)
    for path in (home / "dictionaries").iterdir():
        (folder / "context" / f"0a1b_{path.name}").write_bytes(path.read_bytes())
    assert gf.Vocabulary.from_folder(folder).fingerprint == words.fingerprint
    np.testing.assert_allclose(
        gf.embed(home / "cells.h5ad", folder, device="cpu", dtype="float32", progress=False), expected, atol=1e-6
    )
    bare = files.nemo1_archive(tmp_path / "bare.nemo", model_state())
    with pytest.raises(VocabularyError, match=r"bare.nemo holds no list of tokens with their medians"):
        gf.Vocabulary.from_folder(bare)
    with pytest.raises(VocabularyError, match="is a file"):
        gf.Vocabulary.from_folder(home / "cells.h5ad")
    (folder / "context" / "0a1b_medians.json").write_text("[]")
    with pytest.raises(VocabularyError) as caught:
        gf.Vocabulary.from_folder(folder)
    assert str(folder) in str(caught.value)


def test_rows_beyond_the_vocabulary_are_kept(home: Path, tmp_path: Path) -> None:
    model = gf.load(home / "model.nemo", device="cpu")
    words = gf.Vocabulary.from_folder(home / "dictionaries")
    assert model.config.vocab_size == words.n_tokens + N_PADDED
    gf.save(model, tmp_path / "ours")
    again = gf.load(tmp_path / "ours", device="cpu")
    assert torch.equal(again.token_table, model.token_table)
    hidden = again(gf.Ragged.from_cells([torch.tensor([0, 7, 9])]))
    assert again.logits(hidden).shape == (3, words.n_tokens + N_PADDED)


def short_recipe() -> Any:
    import dataclasses

    from geneformer_fast.finetuning.recipes import CELLS

    return dataclasses.replace(
        CELLS, epochs=1, batch_cells=8, learning_rate=1e-3, token_budget=2048, eval_every=3, save_every=3,
        progress=False,
    )  # fmt: skip


def test_classifiers_are_tuned_and_predict(home: Path, tmp_path: Path) -> None:
    made = gf.finetune_cells(home / "tokens", home / "model.nemo", "kind", tmp_path / "tuned", recipe=short_recipe())
    classifier = gf.load(made.model, device="cpu")
    assert classifier.config.family == "bionemo"
    table = gf.predict(home / "tokens", made.model, device="cpu", progress=False)
    assert len(table) == 41
    counted = gf.predict(home / "cells.h5ad", made.model, device="cpu", progress=False)
    pd.testing.assert_frame_equal(
        table.select_dtypes("number").reset_index(drop=True)[["kind_probability"]],
        counted.select_dtypes("number").reset_index(drop=True)[["kind_probability"]],
    )


@pytest.mark.parametrize("is_loaded", [True, False])
def test_weights_of_eight_bits_are_made_of_an_archive(home: Path, tmp_path: Path, is_loaded: bool) -> None:
    model = gf.load(home / "model.nemo", device="cpu") if is_loaded else home / "model.nemo"
    out = gf.quantize(model, tmp_path / "int8")
    quantized = gf.load(out, device="cpu")
    assert quantized.quantization is not None
    assert quantized.config.family == "bionemo"
    expected = gf.embed(home / "tokens", home / "model.nemo", device="cpu", dtype="float32", progress=False)
    found = gf.embed(home / "tokens", out, device="cpu", dtype="float32", progress=False)
    cosines = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.parametrize("mode", ["cls", "cell"])
def test_genes_are_deleted_and_put_first(home: Path, mode: str) -> None:
    words = gf.Vocabulary.from_folder(home / "dictionaries")
    model = gf.load(home / "model.nemo", device="cpu", dtype="float64")
    gene = toys.gene_ids()[0]
    token = words.token_ids[gene]
    with gf.open_tokens(home / "tokens") as folder:
        values, bounds = folder.read(np.arange(folder.n_cells))
    cells = [torch.from_numpy(values[a:b].astype(np.int64)) for a, b in itertools.pairwise(bounds)]

    def states(cell: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(gf.Ragged.from_cells([cell]), layer="last").values

    for kind in ("delete", "overexpress"):
        found = gf.perturb(
            home / "tokens", model, None, kind=kind, genes=[gene], mode=mode, layer="last", max_cells=6,
            dictionary=home / "dictionaries", progress=False,
        ).set_index("cell")["value"]  # fmt: skip
        assert len(found) == 6
        for cell in found.index:
            before = cells[cell]
            others = before[(before != token) & (before != 0)]
            after = (
                torch.cat([before[:1], others])
                if kind == "delete"
                else torch.cat([before[:1], torch.tensor([token]), others])
            )
            if mode == "cls":
                a, b = states(before)[0], states(after)[0]
                expected = torch.nn.functional.cosine_similarity(a, b, dim=0)
            else:
                a = states(before)[(before != token) & (before != 0)]
                b = states(after)[(after != token) & (after != 0)]
                expected = torch.nn.functional.cosine_similarity(a, b, dim=1).mean()
            assert abs(float(expected) - found[cell]) < 1e-6


def test_a_profile_of_it_counts_its_work(home: Path) -> None:
    model = gf.load(home / "model.nemo", device="cpu", dtype="float32")
    tokens = gf.Ragged.from_cells([torch.arange(5, 30), torch.arange(5, 17)])
    with (
        gf.profile(model, n_warmup=1, n_steps=2, n_active=0, ceilings=False, energy=False) as run,
        torch.inference_mode(),
    ):
        for _ in range(5):
            model(tokens)
            run.step()
    assert run.report is not None
    assert run.report.tokens.n_real == 37 * 2


def test_the_command_line_takes_an_archive_for_a_model_and_for_dictionaries(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, cells = str(home / "model.nemo"), str(home / "cells.h5ad")
    quiet = ["--quiet"]
    assert main(["tokenize", cells, "--out", str(tmp_path / "tokens"), "--dictionary", model, *quiet]) == 0
    out = tmp_path / "two.npy"
    asked = ["--pool", "bionemo2", "--layer", "last", "--dtype", "float32", "--device", "cpu"]
    assert main(["embed", str(tmp_path / "tokens"), "--model", model, "--out", str(out), *asked, *quiet]) == 0
    expected = gf.embed(
        home / "tokens", model, pool="bionemo2", layer="last", device="cpu", dtype="float32", progress=False
    )
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    assert main(["quantize", model, "--out", str(tmp_path / "int8"), *quiet]) == 0
    assert gf.load(tmp_path / "int8", device="cpu").quantization is not None
    assert "Traceback" not in capsys.readouterr().err
