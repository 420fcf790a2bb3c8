"""What embed refuses, and that the message names what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

import geneformer_fast as gf
from geneformer_fast import embed, tokenize
from geneformer_fast.errors import ArgumentError, InputError, OutputError, UnsupportedError, VocabularyError

V1_SIZE, V2_SIZE = 25_426, 20_275


def published(version: int, **changes: object):
    size = {1: V1_SIZE, 2: V2_SIZE}[version]
    words = toys.vocabulary(f"v{version}")
    return toys.encoder(
        words, vocab_size=size, vocabulary=f"geneformer-v{version}", vocabulary_fingerprint=None, **changes
    )


def saved_by_datasets(folder: Path, token_lists: list[list[int]]) -> Path:
    datasets = pytest.importorskip("datasets")
    lengths = [len(tokens) for tokens in token_lists]
    datasets.Dataset.from_dict({"input_ids": token_lists, "length": lengths}).save_to_disk(str(folder))
    return folder


def test_tokens_of_v1_to_a_v2_model_and_the_other_way(shared_dir: Path, tmp_path: Path) -> None:
    dictionaries = shared_dir / "data" / "dicts"
    cells = shared_dir / "data" / "pbmc_facs" / "pbmc_facs_test100.h5ad"
    for mine, other in ((1, 2), (2, 1)):
        tokenize(cells, tmp_path / f"v{mine}", dictionary=dictionaries, preset=f"v{mine}", progress=False)
        with pytest.raises(
            VocabularyError, match=f"made with geneformer-v{mine}, but the model reads geneformer-v{other}"
        ):
            embed(tmp_path / f"v{mine}", published(other))


def test_dictionary_of_another_version(shared_dir: Path, tmp_path: Path) -> None:
    """A folder that holds V1 only, given to a V2 model."""
    for path in (shared_dir / "data" / "dicts").glob("*gc30M.pkl"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(VocabularyError, match="made with geneformer-v1, but the model reads geneformer-v2"):
        embed(toys.cells(), published(2), dictionary=tmp_path)


def test_official_folders_show_by_their_cells_whose_they_are(tmp_path: Path) -> None:
    """The official tokenizer writes no name; CLS and EOS tell the versions apart."""
    v1 = saved_by_datasets(tmp_path / "v1", [[5, 9, 11], [7, 8]])
    v2 = saved_by_datasets(tmp_path / "v2", [[2, 9, 11, 3], [2, 8, 3]])
    assert embed(v1, published(1)).shape == embed(v2, published(2)).shape == (2, 32)
    with pytest.raises(VocabularyError, match=r"v1 does not say.*no CLS first.*model reads geneformer-v2"):
        embed(v1, published(2))
    with pytest.raises(VocabularyError, match=r"v2 does not say.*CLS first and EOS last.*model reads geneformer-v1"):
        embed(v2, published(1))
    bionemo = gf.Encoder(
        dataclasses.replace(published(1).config, vocabulary="bionemo", pad_id=2, vocab_size=25_472)
    ).eval()
    assert embed(saved_by_datasets(tmp_path / "nvidia", [[0, 9, 11], [0, 8]]), bionemo).shape == (2, 32)
    for wrong, found in ((v1, "no CLS first"), (v2, "CLS first and EOS last, as geneformer-v2 has them")):
        with pytest.raises(VocabularyError, match=rf"{found}, but the model reads bionemo"):
            embed(wrong, bionemo)


def test_official_folder_to_a_model_of_an_own_vocabulary(tmp_path: Path) -> None:
    tokens = saved_by_datasets(tmp_path / "tokens", [[2, 9, 11, 3]])
    with pytest.raises(VocabularyError, match="does not say which vocabulary"):
        embed(tokens, toys.encoder())


def test_token_ids_beyond_the_model(tmp_path: Path) -> None:
    tokens = saved_by_datasets(tmp_path / "tokens", [[2, V2_SIZE, 3]])
    with pytest.raises(VocabularyError, match=r"token id 20275 is outside the model's 20,275 tokens"):
        embed(tokens, published(2))


def test_same_name_but_other_medians(tmp_path: Path) -> None:
    words = toys.vocabulary()
    other = type(words).from_medians({gene: m * 2 for gene, m in words.medians.items()}, "v2", name="toy")
    tokenize(toys.cells(), tmp_path / "tokens", dictionary=other)
    with pytest.raises(VocabularyError, match="both say toy, but the dictionaries differ"):
        embed(tmp_path / "tokens", toys.encoder(words))


def test_cls_needs_a_cls_token(tmp_path: Path) -> None:
    words = toys.vocabulary("v1")
    with pytest.raises(UnsupportedError, match=r"toy has no CLS token.*mean"):
        embed(toys.cells(), toys.encoder(words), dictionary=words, pool="cls")
    # Left to choose, the mean is taken.
    result = embed(toys.cells(), toys.encoder(words), dictionary=words, copy=True)
    assert result.uns["X_geneformer"]["pool"] == "mean"


@pytest.mark.parametrize("layer", ["first", -1, 3, "-1", 2.0])
def test_unknown_layers(layer: object) -> None:
    words = toys.vocabulary()
    with pytest.raises((UnsupportedError, ArgumentError), match=r"no layer|layer must be str, int or None"):
        embed(toys.cells(), toys.encoder(words), dictionary=words, layer=layer)


def test_unknown_pool_and_budget() -> None:
    words = toys.vocabulary()
    with pytest.raises(UnsupportedError, match="pool must be one of cls, mean, gene, not 'max'"):
        embed(toys.cells(), toys.encoder(words), dictionary=words, pool="max")
    with pytest.raises(UnsupportedError, match="token_budget"):
        embed(toys.cells(), toys.encoder(words), dictionary=words, token_budget=0)


def test_counts_without_a_dictionary(tmp_path: Path) -> None:
    toys.cells().write_h5ad(tmp_path / "cells.h5ad")
    for data in (toys.cells(), tmp_path / "cells.h5ad"):
        with pytest.raises(VocabularyError, match=r"--dictionary.*toy"):
            embed(data, toys.encoder())


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.h5ad"):
        embed(tmp_path / "nowhere.h5ad", toys.encoder())
    with pytest.raises(VocabularyError, match="no-dictionaries"):
        embed(toys.cells(), toys.encoder(), dictionary=tmp_path / "no-dictionaries")


def test_unfinished_tokens(tmp_path: Path) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(), tmp_path / "tokens", dictionary=words)
    (tmp_path / "tokens" / "state.json").rename(tmp_path / "tokens" / "UNFINISHED.json")
    with pytest.raises(OutputError, match="unfinished"):
        embed(tmp_path / "tokens", toys.encoder(words))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.txt", r"\.npy, \.arrow, \.parquet, \.csv, \.h5ad"),
        ("missing/out.txt", "must end in one of"),
        ("out.h5ad", "copy of an .h5ad input"),
    ],
)
def test_outputs_that_cannot_be(out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, model = toys.vocabulary(), toys.encoder()
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("refused only after work was done"))
    with pytest.raises((OutputError, UnsupportedError), match=message):
        embed(toys.cells(), model, tmp_path / out, dictionary=words)
    assert not list(tmp_path.iterdir())


def test_genes_have_no_h5ad_output_and_no_picture(tmp_path: Path) -> None:
    words = toys.vocabulary()
    toys.cells().write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(
        UnsupportedError, match=r"rows of genes go into a table \(\.parquet, \.csv\), not into an \.h5ad"
    ):
        embed(tmp_path / "cells.h5ad", toys.encoder(words), tmp_path / "o.h5ad", dictionary=words, pool="gene")
    with pytest.raises(UnsupportedError, match="picture"):
        embed(tmp_path / "cells.h5ad", toys.encoder(words), dictionary=words, pool="gene", plot=tmp_path / "p.png")


def test_an_h5ad_of_before_anndata_07_is_not_written_into(tmp_path: Path) -> None:
    import h5py

    words = toys.vocabulary()
    toys.cells().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["obsm"]
        file["obsm"] = np.zeros(23, dtype=[("X_pca", "f4", (2,))])
    with pytest.raises(OutputError, match=r"obsm is stored as anndata before 0\.7 did"):
        embed(tmp_path / "cells.h5ad", toys.encoder(words), tmp_path / "o.h5ad", dictionary=words, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_cells_longer_than_the_model(tmp_path: Path) -> None:
    words = toys.vocabulary()
    tokenize(toys.cells(), tmp_path / "tokens", dictionary=words)
    with pytest.raises(VocabularyError, match="12"):
        embed(tmp_path / "tokens", toys.encoder(words, max_len=12))


def test_an_encoder_over_values() -> None:
    from geneformer_fast import Encoder, EncoderConfig

    torch.manual_seed(0)
    model = Encoder(EncoderConfig.preset("aido-cell-3m", n_layers=1, max_len=64))
    with pytest.raises(
        VocabularyError, match=r"ranks of toy, but the model reads cells of aido-cell.*--family aido-cell"
    ):
        embed(toys.cells(), model, dictionary=toys.vocabulary())
