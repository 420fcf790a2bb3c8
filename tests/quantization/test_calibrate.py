"""What layers read is what a plain forward pass gives them; choices follow what was measured, and embeddings hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from outliers import COLUMNS, with_outliers
from toys import cells, encoder, vocabulary

import geneformer_fast as gf
from geneformer_fast import Encoder, Ragged
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.finetuning.models import with_head
from geneformer_fast.heads import make_head
from geneformer_fast.quantization import calibrate as calibrating
from geneformer_fast.quantization import watch
from geneformer_fast.quantization.build import default_choices, quantized
from geneformer_fast.quantization.calibrate import Calibration, as_anywhere, calibrate
from geneformer_fast.quantization.cells import SomeCells
from geneformer_fast.quantization.smooth import product_sqnr, table_sqnr
from geneformer_fast.quantization.watch import Watch

FORMS = {
    "post": dict(norm="post", activation="relu"),
    "pre": dict(norm="pre", activation="gelu_tanh", final_norm=True, embedding_norm=False, n_token_types=0),
    "swiglu": dict(norm="pre", activation="swiglu", final_norm=True, embedding_norm=False, n_token_types=0),
}


def model(form: str = "post", head: str | None = "mlm", **changes: Any) -> Encoder:
    made = encoder(n_layers=2, **{**FORMS[form], **changes})
    if head == "cells":
        return with_head(made, "cells", 3).eval()
    made.head = make_head(head, made.config)
    return made.eval()


def batches(lengths: Sequence[Sequence[int]] = ((9, 1, 20), (13,), (30, 2)), seed: int = 0) -> list[Ragged]:
    generator = torch.Generator().manual_seed(seed)
    n_tokens = vocabulary().n_tokens
    return [
        Ragged.from_cells([torch.randint(4, n_tokens, (length,), generator=generator) for length in each])
        for each in lengths
    ]


def layer_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def read_by_layers(made: Encoder, packed: Sequence[Ragged]) -> dict[str, torch.Tensor]:
    """What every layer of the blocks reads, cell by cell, by plain torch in float64."""
    made = encoder_in_float64(made)
    config, found = made.config, {}
    for tokens in (cell for batch in packed for cell in batch.cells()):
        x = made.embeddings.token.weight[tokens] + made.embeddings.position.weight[: len(tokens)]
        if made.embeddings.token_type is not None:
            x = x + made.embeddings.token_type.weight[0]
        x = x if made.embedding_norm is None else layer_norm(x, made.embedding_norm)
        for index, block in enumerate(made.blocks):
            is_post = config.norm == "post"
            read = x if is_post else layer_norm(x, block.attention_norm)
            qkv = F.linear(read, block.qkv.weight, block.qkv.bias).view(-1, 3, config.n_heads, config.head_dim)
            context = F.scaled_dot_product_attention(*qkv.permute(1, 2, 0, 3)).transpose(0, 1).flatten(1)
            x = x + F.linear(context, block.out.weight, block.out.bias)
            x = layer_norm(x, block.attention_norm) if is_post else x
            up_read = x if is_post else layer_norm(x, block.ff_norm)
            hidden = F.linear(up_read, block.up.weight, block.up.bias)
            if config.activation == "swiglu":
                gate, hidden = hidden.chunk(2, -1)
                hidden = F.silu(gate) * hidden
            else:
                hidden = F.relu(hidden) if config.activation == "relu" else F.gelu(hidden, approximate="tanh")
            x = x + F.linear(hidden, block.down.weight, block.down.bias)
            x = layer_norm(x, block.ff_norm) if is_post else x
            for name, value in (("qkv", read), ("out", context), ("up", up_read), ("down", hidden)):
                found.setdefault(f"blocks.{index}.{name}", []).append(value)
        last = x if made.final_norm is None else layer_norm(x, made.final_norm)
        found.setdefault("last", []).append(last)
    return {name: torch.cat(values).detach() for name, values in found.items()}


def encoder_in_float64(made: Encoder) -> Encoder:
    fresh = Encoder(made.config)
    fresh.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("head.")})
    return fresh.double().eval()


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_seen_to_read_what_a_plain_forward_pass_gives_them(form: str) -> None:
    made, packed = model(form), batches()
    seen, expected = Watch(made, 75).look(packed), read_by_layers(made, packed)
    last = expected.pop("last")
    for name, rows in expected.items():
        # All 75 tokens are kept: places are drawn among more only.
        assert torch.allclose(seen[name].rows.double(), rows, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(seen[name].largest.double(), rows.abs().amax(0), rtol=1e-4, atol=1e-4), name
    assert set(seen) == {*expected, "head.dense", "head.decoder"}
    assert torch.allclose(seen["head.dense"].rows.double(), last, rtol=1e-4, atol=1e-4)
    decoded = made.head.transform(last.float()).detach()
    assert torch.allclose(seen["head.decoder"].rows, decoded, rtol=1e-3, atol=1e-3)


def test_a_classifier_is_seen_to_read_the_first_token_of_every_cell() -> None:
    made, packed = model(head="cells"), batches()
    seen, last = Watch(made, 75).look(packed), read_by_layers(made, packed)["last"]
    first = last[[0, 9, 10, 30, 43, 73]]
    assert torch.allclose(seen["head.pooler.dense"].rows.double(), first, rtol=1e-4, atol=1e-4)
    assert seen["head.classifier"].rows.shape == (6, 32)


def test_a_sample_is_of_the_same_tokens_for_every_layer_however_cells_are_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "N_ROWS", 16)
    made = model("pre")
    together = batches([(9, 1, 20, 13, 30, 2)])
    apart = [Ragged.from_cells([cell]) for cell in together[0].cells()]
    one, other = Watch(made, 75, seed=3).look(together), Watch(made, 75, seed=3).look(apart)
    expected = read_by_layers(made, together)
    expected["head.dense"] = expected.pop("last")
    places = np.sort(np.random.default_rng(3).choice(75, 16, replace=False))
    for name, rows in expected.items():
        assert torch.allclose(one[name].rows.double(), rows[places], rtol=1e-4, atol=1e-4), name
        assert torch.allclose(one[name].rows, other[name].rows, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(one[name].largest.double(), rows.abs().amax(0), rtol=1e-4, atol=1e-4) or "head" in name


def test_looking_leaves_nothing_behind() -> None:
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    calibrate(made, batches())
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    assert made.quantization is None


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_a_well_behaved_model_is_quantized_as_it_is(scheme: str) -> None:
    made = model("pre")
    found = calibrate(made, batches(), scheme=scheme, least_cosine=0.9)
    defaults = default_choices(made, scheme)
    assert found.choices.keys() == defaults.keys()
    seen = Watch(made, 75).look(batches())
    for name, choice in found.choices.items():
        assert choice.kind == defaults[name].kind, name
        if name.startswith("blocks."):
            weight = made.get_submodule(name).weight.detach()
            plain = product_sqnr(seen[name].rows, weight, scheme)
            assert choice.smooth is not None or choice.sqnr_db == pytest.approx(plain)
            assert choice.sqnr_db >= calibrating.BAR_DB[scheme]
    table = made.embeddings.position.weight.detach()
    assert found.choices["embeddings.position"].sqnr_db == pytest.approx(table_sqnr(table))
    assert (found.n_cells, found.n_tokens, found.scheme) == (6, 75, scheme)


def cosine_of(made: Encoder, choices: Any, packed: list[Ragged]) -> float:
    cells_ = SomeCells(packed)
    one, other = cells_.embeddings(made), cells_.embeddings(as_anywhere(quantized(made, choices)))
    return float(F.cosine_similarity(one.double(), other.double(), dim=1).min())


@pytest.mark.parametrize(
    ("form", "scheme", "hurt"),
    [
        ("post", "int8", ("out", "down")),
        ("pre", "int8", ("qkv", "out", "up")),
        ("swiglu", "int8", ("qkv", "out", "up", "down")),
        ("pre", "int8-weights", ("qkv", "out", "up")),
    ],
)
def test_outliers_are_smoothed_and_what_is_computed_holds(form: str, scheme: str, hurt: tuple[str, ...]) -> None:
    made, packed = with_outliers(model(form, width=64, ff_width=96), 100.0), batches()
    plain = cosine_of(made, default_choices(made, scheme), packed)
    found = calibrate(made, packed, scheme=scheme, least_cosine=0.998)
    for name, choice in found.choices.items():
        if name.rpartition(".")[2] in hurt and name.startswith("blocks."):
            assert choice.kind == scheme, name
            assert choice.smooth is not None, name
            assert choice.reason.startswith("smoothed")
            others = [column for column in range(len(choice.smooth)) if column not in COLUMNS]
            assert choice.smooth[list(COLUMNS)].max() < choice.smooth[others].median() / 16, name
    assert found.cosine >= 0.998
    assert found.cosine == pytest.approx(cosine_of(made, found.choices, packed), abs=1e-6)
    assert plain < 0.97


def test_without_a_way_to_smooth_a_layer_under_the_bar_stays_half() -> None:
    found = calibrate(model(), batches(), bar=70.0)
    assert {choice.kind for choice in found.choices.values()} == {"half"}
    assert "below the bar of 70 dB" in found.choices["blocks.0.qkv"].reason
    assert found.cosine == pytest.approx(1.0)


def test_layers_that_lose_most_are_given_up_and_no_more_than_are_needed() -> None:
    made, packed = model("pre"), batches()
    least = 1 - (1 - calibrate(made, packed, least_cosine=0.5).cosine) / 4
    free = calibrate(made, packed, least_cosine=0.5).choices
    found = calibrate(made, packed, least_cosine=least)
    given_up = [name for name, choice in found.choices.items() if "given up" in choice.reason]
    order = sorted((name for name in free if free[name].is_quantized), key=lambda name: free[name].sqnr_db)
    assert 0 < len(given_up) < len(order)
    assert set(given_up) == set(order[: len(given_up)])
    assert found.cosine >= least
    last = max(given_up, key=lambda name: free[name].sqnr_db)
    one_less = {**found.choices, last: free[last]}
    assert cosine_of(made, one_less, packed) < least


@pytest.mark.parametrize(
    ("layer", "row", "given_up"),
    [
        ("qkv", 3, {"qkv"}),  # scores of attention that are wrong by whole numbers
        ("up", 40, {"up", "down"}),  # the hidden unit, and the rows that it is in
        ("down", 3, {"down"}),
        ("out", 3, set()),
    ],
)
def test_one_weight_far_beyond_the_rest_costs_the_layers_it_spoils_and_no_other(
    layer: str, row: int, given_up: set[str]
) -> None:
    """Its product is large and keeps its signal, so that by signal over noise its layer would be the last to go."""
    made = model()
    with torch.no_grad():
        made.blocks[0].get_submodule(layer).weight[row, 5] = 1e4
    found = calibrate(made, batches())
    assert found.cosine >= 0.9995
    kept = {name for name, choice in found.choices.items() if "given up" in choice.reason}
    assert {f"blocks.0.{name}" for name in given_up} <= kept
    # Of what an outlier reads the error is multiplied by it, too.
    assert kept <= {f"blocks.0.{name}" for name in given_up} | {"embeddings.position"}
    assert all("by it alone" in found.choices[name].reason for name in kept)


def test_a_model_in_half_precision_is_measured_in_float32() -> None:
    made = model("pre")
    expected = calibrate(made, batches(), least_cosine=0.5)
    half = model("pre").cast("bfloat16")
    found = calibrate(half, batches(), least_cosine=0.5)
    assert half.dtype == torch.bfloat16
    for name, choice in found.choices.items():
        assert choice.kind == expected.choices[name].kind
        if choice.sqnr_db is not None:
            assert choice.sqnr_db == pytest.approx(expected.choices[name].sqnr_db, abs=0.5)


def test_tables_stay_where_that_is_asked_for() -> None:
    found = calibrate(model(), batches(), keep_embeddings=True)
    assert found.choices["embeddings.token"].kind == "half"
    assert found.choices["blocks.0.qkv"].kind == "int8"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    cells(40).write_h5ad(folder / "cells.h5ad")
    gf.tokenize(str(folder / "cells.h5ad"), folder / "tokens", dictionary=vocabulary(), progress=False)
    return folder / "tokens"


def test_cells_of_a_folder_are_drawn_by_the_seed(tokens: Path) -> None:
    made = model()
    found: Calibration = calibrate(made, tokens, max_cells=10)
    assert found.n_cells == 10
    with gf.open_tokens(tokens) as folder:
        drawn = np.random.default_rng(0).choice(40, 10, replace=False)
        assert found.n_tokens == folder.lengths()[drawn].sum()
        some = SomeCells.of(folder, made.config, 10, 0)
        assert sum(map(len, (cell for batch in some.batches for cell in batch.cells()))) == found.n_tokens
    assert calibrate(made, tokens, max_cells=1000).n_cells == 40
    assert calibrate(made, tokens, max_cells=10, seed=1).n_tokens != found.n_tokens


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_embeddings_are_those_of_embed(tmp_path: Path, family: str) -> None:
    words = vocabulary(family)
    made = encoder(words, family=family)
    cells(12).write_h5ad(tmp_path / "cells.h5ad")
    gf.tokenize(str(tmp_path / "cells.h5ad"), tmp_path / "tokens", dictionary=words, progress=False)
    expected = gf.embed(tmp_path / "tokens", made, layer="last", progress=False)
    with gf.open_tokens(tmp_path / "tokens") as folder:
        some = SomeCells.of(folder, made.config, 12, 0)
    drawn = np.random.default_rng(0).choice(12, 12, replace=False)
    assert np.allclose(some.embeddings(made).numpy(), expected[drawn], rtol=1e-4, atol=1e-5)


def test_tokens_of_another_vocabulary_are_refused(tokens: Path) -> None:
    other = encoder(vocabulary(name="other"))
    with pytest.raises(VocabularyError, match="other"):
        calibrate(other, tokens)


def test_weights_that_make_no_numbers_are_refused_by_layer() -> None:
    made = model()
    with torch.no_grad():
        made.blocks[1].up.weight[3, 2] = torch.inf
    with pytest.raises(InputError, match=r"blocks\.1\.down reads NaN or infinity"):
        calibrate(made, batches())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(scheme="int4"), "scheme must be one of int8, int8-weights, fp8, not 'int4'"),
        (dict(bar=float("nan")), r"bar \(--bar\) must be a number"),
        (dict(least_cosine=1.5), "least-cosine\\) must be above 0"),
        (dict(max_cells=0), "cells\\) must be at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        calibrate(model(), batches(), **changes)


def test_no_cells_and_a_quantized_model_are_refused() -> None:
    with pytest.raises(InputError, match="no cells to calibrate on"):
        calibrate(model(), [])
    with pytest.raises(InputError, match="no cells to calibrate on"):
        calibrate(model(), [Ragged.from_cells([])])
    made = model()
    with pytest.raises(UnsupportedError, match="quantized already"):
        calibrate(quantized(made, default_choices(made, "int8")), batches())
