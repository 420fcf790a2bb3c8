"""Special tokens in stored cells: padding after the genes is left out, whatever else is out of place is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from geneformer_fast import (
    Encoder,
    EncoderConfig,
    embed,
    finetune_cells,
    open_tokens,
    predict,
    pretrain,
    save,
)
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.loader import read_ragged
from geneformer_fast.data.stored import StoredCells, without_padding
from geneformer_fast.errors import InputError
from geneformer_fast.finetuning.recipes import CELLS
from geneformer_fast.training.recipe import Recipe

SIZES = {"v1": 25_426, "v2": 20_275, "bionemo": 25_429}
NAMES = {"v1": "geneformer-v1", "v2": "geneformer-v2", "bionemo": "bionemo"}


def model_of(family: str) -> Encoder:
    torch.manual_seed(0)
    pad = {"v1": 0, "v2": 0, "bionemo": 2}[family]
    config = EncoderConfig(1, 16, 2, 16, SIZES[family], 64, vocabulary=NAMES[family], pad_id=pad)
    return Encoder(config).eval()


def stored(folder: Path, cells: list[list[int]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": cells, "length": [len(cell) for cell in cells]}).save_to_disk(str(folder))
    return folder


PLAIN = {
    "v1": [[5, 9, 7], [8, 6, 11, 12], [30]],
    "v2": [[2, 5, 9, 7, 3], [2, 8, 6, 11, 12, 3], [2, 30, 3]],
    "bionemo": [[0, 5, 9, 7], [0, 8, 6, 11, 12], [0, 30]],
}


@pytest.mark.parametrize("family", ["v1", "v2", "bionemo"])
@pytest.mark.parametrize("layer", ["last", "embeddings"])
def test_padding_after_the_genes_is_left_out(family: str, layer: str, tmp_path: Path) -> None:
    pad = 2 if family == "bionemo" else 0
    plain, model = PLAIN[family], model_of(family)
    padded = [cell + [pad] * (9 - len(cell)) for cell in plain[:2]] + plain[2:]
    stored(tmp_path / "plain", plain)
    stored(tmp_path / "padded", padded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = embed(tmp_path / "plain", model, pool="mean", layer=layer)
    with pytest.warns(UserWarning, match="padded: 2 of 3 cells are stored with padding") as said:
        result = embed(tmp_path / "padded", model, pool="mean", layer=layer)
    assert len(said) == 1
    np.testing.assert_array_equal(result, expected)
    genes = embed(tmp_path / "plain", model, pool="gene", layer=layer)
    with pytest.warns(UserWarning, match="2 of 3"):
        np.testing.assert_array_equal(embed(tmp_path / "padded", model, pool="gene", layer=layer), genes)


def test_one_warning_per_folder_for_whoever_reads(tmp_path: Path) -> None:
    cells = [[5, 9, 7, 0]] * 3 + [[8, 6]] * 2
    with open_tokens(stored(tmp_path / "tokens", cells)) as tokens:
        identity_of(tokens, model_of("v1").config)
        with pytest.warns(UserWarning, match="3 of 5 cells"):
            first = read_ragged(tokens, np.array([4, 0]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_ragged(tokens, np.array([1, 2]))
            identity_of(tokens, model_of("v1").config)
            read_ragged(tokens, np.array([1, 2]))
        assert first.values.tolist() == [8, 6, 5, 9, 7]
        assert first.lengths.tolist() == [2, 3]
        assert tokens.read_stored([0])[0].tolist() == [5, 9, 7, 0]


@pytest.mark.parametrize(
    ("family", "cell", "message"),
    [
        ("v1", [5, 0, 9, 7], r"cell 70 has padding \(id 0\) among its genes"),
        ("v1", [5, 0, 9, 0, 0], r"cell 70 has padding \(id 0\) among its genes"),
        ("v1", [0, 5, 9], r"cell 70 has padding \(id 0\) among its genes"),
        ("v1", [5, 1, 9], r"cell 70 has the mask of a training \(id 1\) as token 2 of 3"),
        ("v1", [], "cell 70 has no tokens"),
        ("v1", [0, 0], "cell 70 has no tokens"),
        ("v2", [2, 5, 1, 9, 3], r"cell 70 has the mask of a training \(id 1\) as token 3 of 5"),
        ("v2", [2, 5, 2, 9, 3], r"cell 70 has CLS \(id 2\) as token 3 of 5"),
        ("v2", [2, 5, 3, 9, 3], r"cell 70 has EOS \(id 3\) as token 3 of 5"),
        ("v2", [3, 5, 9, 2], r"cell 70 has EOS \(id 3\) as token 1 of 4"),
        ("v2", [5, 9, 3], r"cell 70 does not begin with CLS \(id 2\)"),
        ("v2", [2, 5, 9], r"cell 70 does not end with EOS \(id 3\)"),
        ("v2", [2, 5, 0, 3], r"cell 70 has padding \(id 0\) among its genes"),
        ("bionemo", [0, 5, 2, 9], r"cell 70 has padding \(id 2\) among its genes"),
        ("bionemo", [0, 5, 0, 9], r"cell 70 has CLS \(id 0\) as token 3 of 4"),
        ("bionemo", [0, 5, 4, 9], r"cell 70 has the special token 'unk' \(id 4\) as token 3 of 4"),
        ("bionemo", [5, 9], r"cell 70 does not begin with CLS \(id 0\)"),
    ],
)
def test_special_tokens_out_of_place(family: str, cell: list[int], message: str, tmp_path: Path) -> None:
    """Beyond the 64 cells that tell whose tokens they are; before a model has seen one of them."""
    tokens = stored(tmp_path / "tokens", [PLAIN[family][0]] * 70 + [cell, PLAIN[family][1]])
    with pytest.raises(InputError, match=message):
        embed(tokens, model_of(family), pool="mean")
    with open_tokens(tokens) as folder:
        identity_of(folder, model_of(family).config)
        with pytest.raises(InputError, match=message):
            read_ragged(folder, np.array([3, 70, 1]))
        read_ragged(folder, np.array([3, 71, 1]))


def test_padding_inside_is_found_before_padding_elsewhere_is_left_out(tmp_path: Path) -> None:
    cells = [[5, 9, 0]] + [[8, 6]] * 5000 + [[5, 0, 9]]
    with open_tokens(stored(tmp_path / "tokens", cells)) as tokens:
        identity_of(tokens, model_of("v1").config)
        with pytest.raises(InputError, match="cell 5001 has padding"):
            tokens.read([0])


def test_any_mixture_of_lengths_and_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        genes = [rng.integers(5, 99, rng.integers(0, 6)) for _ in range(rng.integers(0, 8))]
        padding = [int(rng.integers(0, 3)) for _ in genes]
        cells = [np.concatenate([cell, np.zeros(n, np.int64)]) for cell, n in zip(genes, padding, strict=True)]
        bounds = np.concatenate([[0], np.cumsum([len(cell) for cell in cells], dtype=np.int64)]).astype(np.int64)
        values = np.concatenate([*cells, np.zeros(0, np.int64)])
        n_padded, kept, cu_seqlens = without_padding(values, bounds, 0)
        assert n_padded == sum(n > 0 for n in padding)
        assert kept.tolist() == [token for cell in genes for token in cell]
        assert np.diff(cu_seqlens).tolist() == [len(cell) for cell in genes]


def test_what_is_right_is_given_as_it_is(tmp_path: Path) -> None:
    """No copy, so that checking costs no memory."""
    with open_tokens(stored(tmp_path / "tokens", PLAIN["v2"])) as tokens:
        values, bounds = tokens.read(range(3))
        checked = StoredCells(tokens, {"pad": 0, "mask": 1, "cls": 2, "eos": 3})(np.arange(3), values, bounds)
        assert checked[0] is values
        assert checked[1] is bounds


def quick(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, epochs=1, batch_cells=8, batch_tokens=None, progress=False)


def labelled(folder: Path, odd: list[int]) -> Path:
    """40 cells of V1 with classes and a gene of each class, the 34th of them an odd one."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    cells = [[10 + i % 2, *rng.permutation(np.arange(20, 60))[:12].tolist()] for i in range(40)]
    cells[33] = odd
    columns = {"input_ids": cells, "length": [len(cell) for cell in cells], "kind": ["x", "y"] * 20}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("odd", [[11, 20, 0, 21], [11, 20, 21, 0]], ids=["inside", "after"])
@pytest.mark.parametrize("who", ["pretrain", "finetune", "embed", "predict"])
def test_whoever_reads_tokens(who: str, odd: list[int], tmp_path: Path) -> None:
    tokens = labelled(tmp_path / "tokens", odd)
    config = EncoderConfig(1, 16, 2, 16, SIZES["v1"], 64, vocabulary=NAMES["v1"])
    torch.manual_seed(0)
    save(Encoder(config, head="cells" if who == "predict" else "mlm"), tmp_path / "model")

    def read() -> object:
        if who == "embed":
            return embed(tokens, tmp_path / "model", tmp_path / "z.npy")
        if who == "predict":
            return predict(tokens, tmp_path / "model", tmp_path / "z.csv", progress=False)
        if who == "pretrain":
            return pretrain(tokens, tmp_path / "out", config=config, recipe=quick(Recipe()), eval_share=0)
        return finetune_cells(tokens, tmp_path / "model", "kind", tmp_path / "out", recipe=quick(CELLS))

    if odd[-1] == 0:
        with pytest.warns(UserWarning, match="1 of 40 cells are stored with padding"):
            read()
    else:
        with pytest.raises(InputError, match=r"cell 33 has padding \(id 0\) among its genes"):
            read()
