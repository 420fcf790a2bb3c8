"""Every kind of wrong value in every field of every JSON file that is read: an error of ours that names the file, or
success where the value is harmless; never another library's error, never long."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from geneformer_fast import Encoder, EncoderConfig, Ragged, Vocabulary, load, open_tokens, save, tokenize
from geneformer_fast.checkpoints import hf
from geneformer_fast.errors import GeneformerFastError, OutputError, UnsupportedError
from geneformer_fast.files.checksums import VERIFY
from geneformer_fast.finetuning.models import read_card, save_classifier, with_head
from geneformer_fast.tokenization.output import TokenOutput
from geneformer_fast.tokenization.shards import record_batch, token_schema
from geneformer_fast.tokenization.tally import empty_tally
from geneformer_fast.training.checkpoint import load_checkpoint, save_checkpoint
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.optimizer import make_optimizer
from geneformer_fast.training.pretrain import config_of, recipe_of
from geneformer_fast.training.recipe import Recipe

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "fraction": 0.5,
    "10^8": 10**8,
    "10^9": 10**9,
    "10^30": 10**30,
    "inf": float("inf"),
    "nan": float("nan"),
    "text": "false",
    "digits": "3",
    "empty": "",
    "list": [],
    "list of numbers": [1, 2],
    "object": {},
    "object of texts": {"a": "b"},
    "path": "../outside",
}
DEEP = "[" * 200_000 + "]" * 200_000
SECONDS = 5.0  # of the processor: far more than any needs, and far less than what hangs


def words() -> Vocabulary:
    return toys.vocabulary()


def tiny() -> Encoder:
    return toys.encoder(words(), n_layers=1, width=8, n_heads=2, ff_width=8)


@functools.cache
def _config() -> EncoderConfig:
    return tiny().config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that is read."""
    base = tmp_path_factory.mktemp("files")
    model = tiny()
    save(Encoder(model.config, "mlm"), base / "bert")
    native = EncoderConfig.preset("bionemo-10m", n_layers=1, width=8, n_heads=2, ff_width=8, vocab_size=70, max_len=20)
    save(Encoder(native, "mlm"), base / "native")
    classifier = with_head(model, "cells", 3)
    card = {"kind": "cells", "tasks": [{"name": "kind", "classes": ["a", "b", "c"]}], "pretrained": "toy"}
    save_classifier(classifier, base / "classifier", ["a", "b", "c"], card, None, {})
    _shard(save(Encoder(model.config, "mlm"), base / "shards"))
    words().save(base / "vocabulary")
    tokenize(toys.cells(12), base / "tokens", dictionary=words(), obs=["kind"], progress=False)
    _unfinished(base / "unfinished", resume=False)
    (base / "recipe").mkdir()
    (base / "recipe" / "recipe.json").write_text(json.dumps(Recipe(clip=None, max_seconds=3.0).to_dict()))
    (base / "config").mkdir()
    (base / "config" / "config.json").write_text(json.dumps(model.config.to_dict()))
    learner = Encoder(model.config, "mlm")
    state = {"n_worse": 0, "seconds": 1.5, "evaluations": [{"step": 2.0, "loss": 1.0}], "best": None, "scaler": {}}
    save_checkpoint(base / "checkpoints", 2, learner, make_optimizer(learner, Recipe()), state, Ranks(), keep=1)
    return base


def _unfinished(folder: Path, *, resume: bool) -> None:
    """A token folder of two shards that was begun, or gone on with to its end."""
    schema = token_schema(np.dtype(np.int16), {}, ["a"])
    plan = {"vocabulary": {"name": "toy"}, "inputs": [{"n_cells": 4}], "options": {}, "shard_bytes": 1}
    output = TokenOutput(folder, schema=schema, sources=["a"], plan=plan, resume=resume, shard_bytes=1)
    try:
        if resume:
            output.finish(source=1, cells=output.progress["cells"])
            return
        for row in (0, 2):
            columns = {"length": np.array([2, 1]), "source_file": np.zeros(2, int), "source_row": np.arange(2) + row}
            batch = record_batch(schema, np.arange(3, dtype=np.int16), columns)
            output.write(batch, source=0, row=row + 2, cells=[{**empty_tally("a"), "read": row + 2}])
    finally:
        output.close()


def _use_unfinished(folder: Path) -> None:
    """Goes on with a copy, since that changes the folder."""
    copied = shutil.copytree(folder, folder.with_name("copied"))
    try:
        with pytest.raises(OutputError):  # which says how far it is, or what is wrong
            open_tokens(copied)
        _unfinished(copied, resume=True)
        with open_tokens(copied) as tokens:
            tokens.read(range(len(tokens)))
    finally:
        shutil.rmtree(copied)


def _shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    index = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name, place in index.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()
    (folder / "SHA256SUMS").unlink()


def _use_model(folder: Path) -> None:
    encoder = load(folder)
    encoder(Ragged.from_cells([[1, 2, 3], [4, 5]]))


def _use_classifier(folder: Path) -> None:
    encoder = load(folder)
    card = read_card(folder, encoder)
    assert sum(len(task["classes"]) for task in card["tasks"]) == 3


def _use_tokens(folder: Path) -> None:
    with open_tokens(folder) as tokens:
        tokens.read(range(len(tokens)))
        _ = tokens.vocabulary, tokens.n_tokens
        for name in tokens.columns:
            if name != "input_ids":
                tokens.column(name).to_pylist()
        if tokens.vocabulary is not None:
            _config().check_vocabulary(tokens.vocabulary)


def _use_checkpoint(folder: Path) -> None:
    learner = Encoder(_config(), "mlm")
    load_checkpoint(folder, learner, make_optimizer(learner, Recipe()), Ranks())


#: Name: folder, file in it, and what reads it.
READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "bert config": ("bert", "config.json", _use_model),
    "our config": ("native", "config.json", _use_model),
    "classifier config": ("classifier", "config.json", _use_classifier),
    "card": ("classifier", "finetuned.json", _use_classifier),
    "shard index": ("shards", "model.safetensors.index.json", _use_model),
    "vocabulary": ("vocabulary", "vocabulary.json", Vocabulary.from_folder),
    "manifest": ("tokens", "manifest.json", _use_tokens),
    "state of tokens": ("tokens", "state.json", _use_tokens),
    "unfinished": ("unfinished", "UNFINISHED.json", _use_unfinished),
    "dataset info": ("tokens", "dataset_info.json", _use_tokens),
    "recipe": ("recipe", "recipe.json", lambda folder: recipe_of(folder / "recipe.json")),
    "configuration": ("config", "config.json", lambda folder: config_of(folder / "config.json")),
    "checkpoint": ("checkpoints/step-00000002", "state.json", _use_checkpoint),
}


def places(value: Any, path: tuple = (), width: int = 3) -> Iterator[tuple]:
    """Where something may be put into a JSON value: every field, and of long lists and maps the first few."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, part) in enumerate(items):
        if not path or number < width or len(value) <= 25:
            yield from places(part, (*path, key), width)


def put(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return changed


def dumped(value: Any) -> str:
    return json.dumps(value).replace("Infinity", "1e999")  # what parses as infinite, and is JSON


def tried(use: Callable[[Path], object], folder: Path) -> str | None:
    """The error of ours, None for success. Everything else fails."""
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(folder)
    except GeneformerFastError as error:
        said = str(error)
        assert "\n" not in said or "begun differently" in said
        return said
    finally:
        assert time.process_time() - begin < SECONDS
    return None


@pytest.mark.parametrize(
    ("is_checked", "every"),
    [
        pytest.param(True, 1, id="checked"),
        pytest.param(False, 5, id="unchecked"),
        pytest.param(False, 1, id="unchecked-all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_wrong_values(
    files: Path, tmp_path: Path, reader: str, is_checked: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checksums, where they must not be what fails, and without, where the schemas are all there is.

    Each place is given every fifth kind, beginning with another one than the place before; all of them if slow.
    """
    name, file, use = READERS[reader]
    folder = tmp_path / Path(name).name
    shutil.copytree(files / name, folder)
    monkeypatch.setenv(VERIFY, "1" if is_checked else "0")
    assert tried(use, folder) is None, "as it was written it can be read"
    path, content = folder / file, json.loads((folder / file).read_text())
    n_refused = 0
    for i, place in enumerate(places(content)):
        for j, (kind, new) in enumerate(WRONG.items()):
            if (i + j) % every:
                continue
            if is_checked and kind not in ("true", "10^30", "list"):
                continue  # what a schema looks at is the same
            if reader == "unfinished" and (place[:1] != ("progress",) or kind in ("10^8", "inf", "empty", "digits")):
                continue  # what was asked for is compared as it is; each of these takes long
            path.write_text(dumped(put(content, place, new)))
            try:
                n_refused += tried(use, folder) is not None
            except Exception as error:
                raise AssertionError(f"{reader}: {'.'.join(map(str, place))} = {kind}") from error
    for text in (DEEP, '{"a": ' + DEEP + "}", "", "\x00", "nul", '{"a": NaN}', "[]", '"text"', "9" * 5000):
        path.write_text(text)
        if reader != "dataset info":  # which only `datasets` reads
            assert path.name in (tried(use, folder) or ""), text[:20]
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    tried(use, folder)
    path.unlink()
    tried(use, folder)
    assert n_refused > 10 or reader == "dataset info"


@pytest.mark.parametrize(
    ("reader", "place", "new"),
    [
        ("bert config", ("num_hidden_layers",), 10**8),
        ("bert config", ("layer_norm_eps",), -1),
        ("bert config", ("hidden_dropout_prob",), 5),
        ("bert config", ("attention_probs_dropout_prob",), float("inf")),
        ("bert config", ("tie_word_embeddings",), "false"),
        ("bert config", ("pad_token_id",), 10**9),
        ("bert config", ("num_attention_heads",), 2.0),
        ("bert config", ("type_vocab_size",), -1),
        ("classifier config", ("id2label",), ["a", "b", "c"]),
        ("our config", ("encoder", "n_layers"), 10**8),
        ("our config", ("encoder", "eps"), 0),
        ("our config", ("encoder", "embedding_norm"), 1),
        ("our config", ("head",), "tail"),
        ("card", ("kind",), "genes"),
        ("card", ("tasks", 0, "classes", 0), 7),
        ("shard index", ("weight_map", "bert.embeddings.LayerNorm.bias"), "../outside.safetensors"),
        ("shard index", ("weight_map", "bert.embeddings.LayerNorm.bias"), "/outside.safetensors"),
        ("shard index", ("weight_map", "bert.embeddings.LayerNorm.bias"), "model-1.safetensors"),
        ("vocabulary", ("max_len",), True),
        ("vocabulary", ("special", "pad"), 2.0),
        ("vocabulary", ("name",), 5),
        ("manifest", ("n_cells",), 13),
        ("manifest", ("shards", 0, "file"), "../data-00000-of-00001.arrow"),
        ("manifest", ("vocabulary", "special", "cls"), -1),
        ("state of tokens", ("_data_files", 0, "filename"), "../data-00000-of-00001.arrow"),
        ("unfinished", ("progress", "row"), -1),
        ("unfinished", ("progress", "source"), 2),
        ("unfinished", ("progress", "shards", 1, "n_bytes"), 1.5),
        ("unfinished", ("progress", "cells", 0, "read"), "2"),
        ("recipe", ("epochs",), "3"),
        ("recipe", ("masking", "share"), float("inf")),
        ("checkpoint", ("world_size",), 0),
        ("checkpoint", ("step",), 3),
    ],
)
def test_what_is_wrong_is_named(
    files: Path, tmp_path: Path, reader: str, place: tuple, new: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file, use = READERS[reader]
    folder = tmp_path / Path(name).name
    shutil.copytree(files / name, folder)
    monkeypatch.setenv(VERIFY, "0")
    path, content = folder / file, json.loads((folder / file).read_text())
    path.write_text(dumped(put(content, place, new)))
    said = tried(use, folder)
    assert said is not None
    assert file in said or reader == "shard index", said
    assert any(str(part) in said for part in place[-2:]), said


@pytest.mark.parametrize("field", list(EncoderConfig(1, 8, 2, 8, 9, 9).to_dict()))
def test_configurations_made_by_hand(field: str) -> None:
    """Refused with a sentence, or taken and good for JSON."""
    values = EncoderConfig(1, 8, 2, 8, 9, 9).to_dict()
    n_refused = 0
    for new in (*WRONG.values(), np.ones(3), torch.ones(2), 1j):
        try:
            json.dumps(EncoderConfig(**{**values, field: new}).to_dict(), allow_nan=False)
        except UnsupportedError:
            n_refused += 1
    assert n_refused > 10


def test_numbers_of_numpy_become_pythons() -> None:
    config = EncoderConfig(np.int64(1), np.int32(8), 2, 8, np.uint16(9), 9, eps=np.float32(0.5), dropout=0)
    assert config == EncoderConfig(1, 8, 2, 8, 9, 9, eps=0.5, dropout=0.0)
    assert json.loads(json.dumps(config.to_dict()))["n_layers"] == 1
    assert hf.is_bert(Encoder(config))
