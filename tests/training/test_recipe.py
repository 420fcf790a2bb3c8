"""Recipes, schedules and optimizers, beside transformers' and torch's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.data.masking import Masking
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.training.optimizer import decay_groups, make_optimizer
from geneformer_fast.training.pretrain import recipe_of
from geneformer_fast.training.recipe import RECIPES, Recipe
from geneformer_fast.training.schedule import Schedule

transformers = pytest.importorskip("transformers")


def tiny(**changes: object) -> Encoder:
    config = dict(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=16)
    return Encoder(EncoderConfig(**{**config, **changes}), head="mlm")


@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("polynomial", "polynomial", {"lr_end": 0.0, "power": 2.0}),
        ("constant", "constant_with_warmup", {}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 7, 38])
def test_schedules_are_those_of_transformers(kind: str, theirs: str, options: dict, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(theirs, optimizer, warmup, 40, scheduler_specific_kwargs=options)
    ours = Schedule(kind, 40, warmup, power=options.get("power", 1.0))
    for step in range(40):
        assert ours(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_steps_are_those_of_torch() -> None:
    """scGPT's annotation: a tenth less after every epoch, whatever the number of steps in one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    recipe = Recipe.preset("scgpt-cells", epochs=4)
    schedule = recipe.schedule_for(4 * 7, 7)
    assert schedule == recipe.schedule_for(4 * 7)
    for _ in range(4):
        for _ in range(7):
            step = scheduler.last_epoch * 7 + _
            assert recipe.learning_rate * schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    # As a share of a run whose end is a time.
    by_share = recipe.schedule_for(1)
    assert [by_share(share) for share in (0.0, 0.24, 0.25, 0.99)] == pytest.approx([1, 1, 0.9, 0.9**3])
    with pytest.raises(UnsupportedError, match="decay must be above 0"):
        Recipe(decay=0.0)


def test_the_floor_of_bionemo() -> None:
    """NeMo's cosine: warm-up, a fall to the minimal rate, and that rate for the last 5 %."""
    recipe = Recipe.preset("bionemo-10m", steps=1000)
    schedule = recipe.schedule_for(1000)
    rates = [recipe.learning_rate * schedule(step) for step in range(1000)]
    assert rates[0] == 0
    assert rates[10] == max(rates) == 1e-3
    assert rates[950:] == pytest.approx([2e-5] * 50)
    assert rates[949] > 2e-5
    middle = (10 + 950) // 2
    assert rates[middle] == pytest.approx((1e-3 + 2e-5) / 2)
    expected = [2e-5 + (1e-3 - 2e-5) * 0.5 * (1 + math.cos(math.pi * (step - 10) / 940)) for step in range(10, 950)]
    np.testing.assert_allclose(rates[10:950], expected)


def test_published_recipes() -> None:
    """MODELS: the arguments saved with Geneformer's runs, and BioNeMo's documentation."""
    v1 = RECIPES["geneformer-v1-10m"]
    assert (v1.learning_rate, v1.schedule, v1.warmup_steps, v1.batch_cells) == (1e-3, "linear", 10_000, 144)
    assert (v1.epochs, v1.weight_decay, v1.betas, v1.eps, v1.clip) == (3, 0.001, (0.9, 0.999), 1e-8, 1.0)
    assert v1.masking == Masking(0.15, 0.8, 0.1)
    v2 = RECIPES["geneformer-v2-104m"]
    assert (v2.learning_rate, v2.schedule, v2.warmup_share) == (2e-4, "cosine", 0.007)
    assert v2.masking.masks_specials
    large = RECIPES["geneformer-12l-95m"]
    assert (large.learning_rate, large.schedule, large.warmup_steps, large.batch_cells) == (5e-4, "cosine", 5_000, 32)
    assert (RECIPES["geneformer-v1-12l"].learning_rate, RECIPES["geneformer-v1-12l"].batch_cells) == (5e-4, 48)
    bionemo = RECIPES["bionemo-106m"]
    assert (bionemo.batch_cells, bionemo.steps, bionemo.weight_decay) == (2048, 35_650, 0.1)
    assert bionemo.masking == Masking(0.15, 0.8, 0.02)
    # 27,406,208 cells in batches of 144, three times.
    assert v1.schedule_for(math.ceil(27_406_208 / 144) * 3).n_steps == 570_963


def test_recipes_survive_json() -> None:
    for recipe in (*RECIPES.values(), Recipe(batch_cells=None, batch_tokens=5, clip=None)):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UnsupportedError, match=r"no field learning_rat; there are .*learning_rate"):
        Recipe.from_dict({"learning_rat": 1})
    with pytest.raises(UnsupportedError, match="no recipe named 'v3'; there are geneformer-v1-10m"):
        Recipe.preset("v3")


def test_what_is_asked_for_wins(tmp_path) -> None:
    assert recipe_of(None, "bionemo-10m") == RECIPES["bionemo-10m"]
    assert recipe_of(None, "geneformer-v2-316m") == Recipe()
    assert recipe_of("bionemo-10m", None, {"epochs": 2}).steps is None
    changed = recipe_of(RECIPES["geneformer-v1-10m"], None, {"batch_tokens": 100, "masking": {"random": 0.02}})
    assert (changed.batch_cells, changed.batch_tokens, changed.masking.random) == (None, 100, 0.02)
    (tmp_path / "mine.json").write_text('{"learning_rate": 0.5, "betas": [0.8, 0.9]}')
    assert recipe_of(tmp_path / "mine.json") == Recipe(learning_rate=0.5, betas=(0.8, 0.9))
    (tmp_path / "wrong.json").write_text('{"masking": {"share": "0.3"}}')
    with pytest.raises(UnsupportedError, match=r'wrong\.json: share must be a finite number, not "0\.3"'):
        recipe_of(tmp_path / "wrong.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UnsupportedError, match=r"bad\.json cannot be read as JSON"):
        recipe_of(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(schedule="stairs"), "schedule must be one of"),
        (dict(precision="int8"), "precision must be one of"),
        (dict(batch_tokens=5), "either batch_cells or batch_tokens"),
        (dict(batch_cells=None), "either batch_cells or batch_tokens"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(learning_rate=0.0), "learning_rate must be above 0"),
        (dict(learning_rate=math.inf), "learning_rate must be a finite number, not Infinity"),
        (dict(warmup_share=1.5), "from 0 to 1"),
        (dict(weight_decay=-1), "weight_decay must not be negative"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(clip=0.0), "clip"),
        (dict(clip=math.nan), "clip must be a finite number or None, not NaN"),
        (dict(seed=1.5), "seed must be a whole number, not 1.5"),
        (dict(steps="9"), 'steps must be a whole number or None, not "9"'),
        (dict(epochs=1e18), "epochs must be from 0.0 to 1,000,000"),
        (dict(tensorboard="false"), "tensorboard must be true or false"),
        (dict(decays_all=1), "decays_all must be true or false, not 1"),
        (dict(betas=(0.9,)), "betas must be two finite numbers"),
        (dict(masking={"share": 0.2}), "masking must be Masking"),
    ],
)
def test_impossible_recipes_are_refused(bad: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        dataclasses.replace(Recipe(), **bad)


def test_decay_spares_what_transformers_spares(tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    stock = transformers.BertForMaskedLM(config)
    trainer = transformers.Trainer(stock, transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    names = set(trainer.get_decay_parameter_names(stock))
    theirs = sum(p.numel() for name, p in stock.named_parameters() if name in names)
    decayed, spared = decay_groups(tiny())
    assert sum(p.numel() for p in decayed) == theirs
    assert sum(p.numel() for p in (*decayed, *spared)) == stock.num_parameters()
    assert decay_groups(tiny(), decays_all=True)[1] == []


def test_the_optimizer_is_fused_adamw_over_what_learns() -> None:
    model = tiny()
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    optimizer = make_optimizer(model, Recipe(weight_decay=0.3, betas=(0.8, 0.95), eps=1e-7))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.95), 1e-7)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(UnsupportedError, match="float32 weights, but the model's are bfloat16, float32"):
        make_optimizer(tiny().cast("bfloat16"), Recipe())
