"""The registry of families: asked by name, by preset, by configuration; light; new fields of a configuration."""

from __future__ import annotations

import dataclasses

import pytest

from geneformer_fast import EncoderConfig, families
from geneformer_fast.config import PRESETS
from geneformer_fast.errors import CheckpointError, UnsupportedError


def test_every_family_is_there_by_its_name_and_says_who_it_is() -> None:
    found = families.all_families()
    assert [each.name for each in found][: len(families.FAMILIES)] == list(families.FAMILIES)
    for each in found:
        assert families.family(each.name) is each
        assert each.title
        assert each.paper
        assert each.licence
        assert each.entries is not None or each.load is not None
        for name, config in each.presets.items():
            assert families.preset_family(name) is each
            assert families.family_of(config) is each
            assert PRESETS[name] is config
    with pytest.raises(UnsupportedError, match=r"no family of models is called 'bert'; there are geneformer, bionemo"):
        families.family("bert")
    with pytest.raises(UnsupportedError, match="no preset named 'bert'"):
        families.preset_family("bert")


def test_a_model_without_a_published_vocabulary_is_of_no_family() -> None:
    config = EncoderConfig(1, 16, 2, 16, 20, 10)
    assert families.family_of(config) is None
    assert families.family_of(dataclasses.replace(config, vocabulary="mine")) is None
    named = dataclasses.replace(config, vocabulary="mine", family="bionemo")
    assert families.family_of(named) is families.family("bionemo")
    with pytest.raises(UnsupportedError, match="'unheard-of'"):
        families.family_of(dataclasses.replace(config, family="unheard-of"))


def test_a_family_may_not_take_names_of_another() -> None:
    bionemo = families.family("bionemo")
    with pytest.raises(UnsupportedError, match="name 'bionemo' of BioNeMo Geneformer"):
        families.register(dataclasses.replace(bionemo))
    with pytest.raises(UnsupportedError, match="preset 'bionemo-10m'"):
        families.register(dataclasses.replace(bionemo, name="other"))
    with pytest.raises(UnsupportedError, match="layout 'bionemo'"):
        families.register(dataclasses.replace(bionemo, name="other", presets={}))
    with pytest.raises(UnsupportedError, match="not dict"):
        families.register({})  # type: ignore[arg-type]


def test_configurations_of_old_files_are_what_they_were() -> None:
    config = EncoderConfig.preset("geneformer-v1-10m")
    old = {key: value for key, value in config.to_dict().items() if key not in NEW}
    assert EncoderConfig.from_dict(old) == config
    assert {key: config.to_dict()[key] for key in NEW} == NEW


NEW = {"family": None, "attention": "softmax", "attention_width": None, "qkv_bias": True, "n_features": 0}


def test_new_fields_are_checked_together() -> None:
    config = EncoderConfig(1, 200, 10, 16, 20, 10)
    wide = dataclasses.replace(config, attention="favor", attention_width=640, qkv_bias=False, n_features=266)
    assert (config.head_dim, wide.head_dim) == (20, 64)
    assert EncoderConfig.from_dict(wide.to_dict()) == wide
    for wrong, said in (
        ({"attention_width": 639}, "attention_width 639 is not divisible by 10 heads"),
        ({"attention_width": 0}, "attention_width must be from 1"),
        ({"attention": "linear"}, "attention must be one of softmax, favor"),
        ({"attention": "favor"}, "n_features is 0 with attention='favor'"),
        ({"n_features": 3}, "n_features is 3 with attention='softmax'"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false"),
        ({"inputs": "pixels"}, "inputs must be one of tokens, values, pairs"),
        ({"inputs": "pairs", "vocab_size": 0}, "vocab_size of at least 1"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            dataclasses.replace(config, **wrong)
        with pytest.raises(CheckpointError, match=said):
            EncoderConfig.from_dict({**config.to_dict(), **wrong})
