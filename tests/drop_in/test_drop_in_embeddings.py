"""Types, positions and tables of the embeddings, given in every shape, exchanged or changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_berts import assert_same_step, bert, inputs, labels_for, step
from torch import nn

import geneformer_fast as gf

pytestmark = pytest.mark.usefixtures("nothing_told")

TYPES = {
    "one row": torch.arange(40)[None] % 2,
    "no rows": torch.arange(40) % 2,
    "one column": torch.tensor([[0], [1], [1], [0]]),
    "all": torch.arange(160).view(4, 40) % 3 % 2,
}


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", TYPES)
def test_types_and_positions_of_every_shape_that_transformers_repeats(shape: str, name: str, attending: Any) -> None:
    model, given = bert("BertModel").eval(), {**inputs(), name: TYPES[shape]}
    with torch.no_grad():
        try:
            stock = model(**given)
        except Exception as error:
            # Not every release takes every shape; where stock does not, we do not either.
            gf.accelerate(model)
            with pytest.raises(type(error)):
                model(**given)
            return
        gf.accelerate(model)
        ours = model(**given)
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[keep], stock.last_hidden_state[keep], atol=1e-5, rtol=1e-5)
    assert attending


def test_types_that_fit_nothing_fail_as_they_did() -> None:
    model, given = bert("BertModel").eval(), {**inputs(), "token_type_ids": torch.zeros(3, 40, dtype=torch.int64)}
    with pytest.raises(RuntimeError) as stock:
        model(**given)
    gf.accelerate(model)
    with pytest.raises(RuntimeError) as ours, pytest.warns(UserWarning, match=r"token_type_ids \[3, 40\]"):
        model(**given)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("has_positions", [False, True])
@pytest.mark.parametrize("change", ["types", "positions", "in place", "table"])
def test_buffers_of_the_embeddings_are_read_in_every_call(change: str, has_positions: bool, attending: Any) -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels, embeddings = labels_for(model, given), model.bert.embeddings
    if has_positions:
        given["position_ids"] = torch.arange(40).flip(0)[None]
    plain = step(model, given, labels)
    gf.accelerate(model)
    if change == "types":
        embeddings.token_type_ids = torch.arange(48)[None] % 2
    elif change == "positions":
        embeddings.position_ids = torch.arange(48).flip(0)[None]
    elif change == "in place":
        embeddings.token_type_ids.data.fill_(1)
    else:
        table = nn.Embedding(2, 32, _weight=torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
        embeddings.token_type_embeddings = table
    ours = step(model, given, labels)
    gf.accelerate(model).undo()
    stock = step(model, given, labels)
    assert_same_step(ours, stock)
    assert attending
    if not (change == "positions" and has_positions):
        assert (stock["loss"] - plain["loss"]).abs() > 1e-3


def test_an_embedding_that_looks_at_shapes_gets_padded_tokens(attending: list[int]) -> None:
    class Scaled(nn.Module):
        """Scales by the place in the row, as rank-based embeddings do."""

        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) / (1 + torch.arange(ids.shape[1]))[:, None].sqrt()

    model, given = bert("BertModel").eval(), inputs()
    model.embeddings.word_embeddings = Scaled(model.embeddings.word_embeddings)
    with torch.no_grad():
        stock = model(**given).pooler_output
        gf.accelerate(model)
        torch.testing.assert_close(model(**given).pooler_output, stock, atol=1e-5, rtol=1e-5)
    assert attending
