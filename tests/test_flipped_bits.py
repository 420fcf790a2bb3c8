"""Single flipped bits in everything we write and read again: refused by a sentence, warned of, or of no consequence.

Never another result without a word, never another library's error, never long.
"""

from __future__ import annotations

import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

from geneformer_fast import Encoder, EncoderConfig, Ragged, Vocabulary, load, open_tokens, save, tokenize
from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.checksums import fingerprint_of, fingerprint_of_tensors
from geneformer_fast.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.optimizer import make_optimizer
from geneformer_fast.training.recipe import Recipe

CONFIG = EncoderConfig(n_layers=1, width=8, n_heads=2, ff_width=8, vocab_size=64, max_len=64)
SECONDS = 5.0
N_FEW, N_MANY = 40, 1500


def learner() -> tuple[Encoder, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Encoder(CONFIG, "mlm")
    return model, make_optimizer(model, Recipe())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    save(learner()[0], base / "bert")
    native = EncoderConfig.preset("bionemo-10m", n_layers=1, width=8, n_heads=2, ff_width=8, vocab_size=70, max_len=64)
    save(Encoder(native, "mlm"), base / "native")
    shutil.copytree(base / "bert", base / "pytorch")
    torch.save(load_file(base / "bert" / "model.safetensors"), base / "pytorch" / "pytorch_model.bin")
    (base / "pytorch" / "model.safetensors").unlink()
    toys.vocabulary().save(base / "vocabulary")
    tokenize(toys.cells(40), base / "tokens", dictionary=toys.vocabulary(), obs=["kind", "score"], progress=False)
    model, optimizer = learner()
    model.logits(model(Ragged.from_cells([[1, 2]]))).logsumexp(-1).sum().backward()
    optimizer.step()
    save_checkpoint(base / "checkpoints", 2, model, optimizer, {"seconds": 1.5, "best": None}, Ranks(), keep=1)
    (base / "best").mkdir()
    save_weights(base / "best" / "best.safetensors", model, Ranks())
    return base


def _model(folder: Path) -> Any:
    model = load(folder)
    with torch.no_grad():
        values = model.logits(model(Ragged.from_cells([[1, 2, 3], [4, 5]])))
    return fingerprint_of_tensors({**model.state_dict(), "values": values})


def _tokens(folder: Path) -> Any:
    with open_tokens(folder) as tokens:
        values, bounds = tokens.read(range(len(tokens)))
        columns = {name: tokens.column(name).to_pylist() for name in tokens.columns if name != "input_ids"}
        return fingerprint_of([values.tolist(), bounds.tolist(), columns, tokens.lengths().tolist(), tokens.manifest])


def _checkpoint(folder: Path) -> Any:
    model, optimizer = learner()
    state = load_checkpoint(folder, model, optimizer, Ranks())
    moments = {f"{i}.{k}": v for i, part in optimizer.state_dict()["state"].items() for k, v in part.items()}
    drawn = {"drawn": torch.rand(3), "python": torch.tensor([random.random()])}
    said = [state[key] for key in ("step", "seconds", "best")]
    return fingerprint_of_tensors({**model.state_dict(), **moments, **drawn}), said


def _best(folder: Path) -> Any:
    model, _ = learner()
    load_weights(folder / "best.safetensors", model)
    return fingerprint_of_tensors(model.state_dict())


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "weights": ("bert", "model.safetensors", _model),
    "config": ("bert", "config.json", _model),
    "sums": ("bert", "SHA256SUMS", _model),
    "weights of ours": ("native", "model.safetensors", _model),
    "config of ours": ("native", "config.json", _model),
    "weights of torch": ("pytorch", "pytorch_model.bin", _model),
    "vocabulary": ("vocabulary", "vocabulary.json", lambda folder: Vocabulary.from_folder(folder).to_dict()),
    "shard": ("tokens", "data-00000-of-00001.arrow", _tokens),
    "manifest": ("tokens", "manifest.json", _tokens),
    "state of tokens": ("tokens", "state.json", _tokens),
    "model of a checkpoint": ("checkpoints/step-00000002", "model.safetensors", _checkpoint),
    "moments": ("checkpoints/step-00000002", "optimizer.safetensors", _checkpoint),
    "random states": ("checkpoints/step-00000002", "random.safetensors", _checkpoint),
    "state": ("checkpoints/step-00000002", "state.json", _checkpoint),
    "best weights": ("best", "best.safetensors", _best),
}


def _flip_bits(files: Path, tmp_path: Path, reader: str, n_flips: int, seed: int) -> None:
    name, file, use = READERS[reader]
    folder = tmp_path / Path(name).name
    shutil.copytree(files / name, folder)
    path, rng = folder / file, random.Random(seed)
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = use(folder)
    for _ in range(n_flips):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        content = bytearray(whole)
        content[at] ^= 1 << bit
        path.unlink()  # what is mapped from it stays
        path.write_bytes(content)
        begin, said = time.perf_counter(), None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                found = use(folder)
            except GeneformerFastError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError(f"{reader}: byte {at}, bit {bit}") from error
        assert time.perf_counter() - begin < SECONDS, (at, bit)
        if said is None and not any(issubclass(warning.category, UserWarning) for warning in warned):
            assert found == expected, f"{reader}: byte {at}, bit {bit} goes unnoticed"


@pytest.mark.parametrize("reader", READERS)
def test_flipped_bits(files: Path, tmp_path: Path, reader: str) -> None:
    _flip_bits(files, tmp_path, reader, N_FEW, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_flipped_bits(files: Path, tmp_path: Path, reader: str) -> None:
    _flip_bits(files, tmp_path, reader, N_MANY, seed=2)
