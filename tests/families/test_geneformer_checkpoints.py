"""Geneformer's models as people have them: by every name, in old revisions, copies, and runs of its classifier."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import geneformer_fast as gf
from geneformer_fast import Encoder, EncoderConfig, families
from geneformer_fast.config import PRESETS
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.finetuning.models import read_card
from geneformer_fast.training.named import recipe_of
from geneformer_fast.training.pretrain import config_of
from geneformer_fast.training.recipe import RECIPES

# Folders on the Hub, now and before, and of helical's copies: layers, width, tokens.
FOLDERS = {
    "Geneformer-V1-10M": (6, 256, 25_426),
    "gf-6L-30M-i2048": (6, 256, 25_426),
    "gf-6L-10M-i2048": (6, 256, 25_426),
    "gf-12L-30M-i2048": (12, 512, 25_426),
    "gf-12L-40M-i2048": (12, 512, 25_426),
    "gf-12L-40M-i2048-CZI-CellxGene": (12, 512, 25_426),
    "gf-12L-95M-i4096": (12, 512, 20_275),
    "gf-12L-38M-i4096": (12, 512, 20_275),
    "gf-12L-95M-i4096_CLcancer": (12, 512, 20_275),
    "gf-12L-38M-i4096-CLcancer": (12, 512, 20_275),
    "gf-20L-95M-i4096": (20, 896, 20_275),
    "gf-20L-151M-i4096": (20, 896, 20_275),
    "Geneformer-V2-104M": (12, 768, 20_275),
    "gf-12L-104M-i4096": (12, 768, 20_275),
    "Geneformer-V2-104M_CLcancer": (12, 768, 20_275),
    "gf-12L-104M-i4096-CLcancer": (12, 768, 20_275),
    "Geneformer-V2-316M": (18, 1152, 20_275),
    "gf-18L-316M-i4096": (18, 1152, 20_275),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_goes_by_every_name_it_has(name: str) -> None:
    config = EncoderConfig.preset(name)
    assert (config.n_layers, config.width, config.vocab_size) == FOLDERS[name]
    assert (config.head_dim, config.eps, config.activation) == (64, 1e-12, "relu")
    is_v1 = config.vocab_size == 25_426
    assert (config.vocabulary, config.max_len) == (("geneformer-v1", 2048) if is_v1 else ("geneformer-v2", 4096))
    # Only the V2 models have four times their width, and a dropout of a tenth.
    is_v2 = "104" in name or "316" in name
    assert (config.ff_width // config.width, config.dropout) == ((4, 0.1) if is_v2 else (2, 0.02))
    assert families.preset_family(name).name == "geneformer"
    assert name in PRESETS
    assert name not in list(PRESETS)


def test_names_that_nobody_has_are_refused_with_all_that_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"no preset named 'gf-7L'; there are geneformer-v1-10m, "):
        EncoderConfig.preset("gf-7L")
    assert RECIPES["gf-12L-95M-i4096"] == RECIPES["geneformer-12l-95m"] == recipe_of(None, "gf-12L-95M-i4096")


def test_a_folder_with_the_name_of_a_model_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = EncoderConfig(1, 16, 2, 16, 20, 10)
    gf.save(Encoder(small, "mlm"), "gf-12L-95M-i4096")
    assert config_of("gf-12L-95M-i4096").n_layers == 1
    assert config_of("gf-20L-95M-i4096").n_layers == 20


def test_the_dictionaries_of_95_million_cells_are_those_of_v2(shared_dir: Path) -> None:
    """gc95M and gc104M are the same files: their checksums are those that the Hub has of gc104M."""
    folder = shared_dir / "data" / "dicts"
    published = {
        "token_dictionary_gc95M.pkl": "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",
        "gene_median_dictionary_gc95M.pkl": "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
        "ensembl_mapping_dict_gc95M.pkl": "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
    }
    for name, digest in published.items():
        assert sha256((folder / name).read_bytes()).hexdigest() == digest
    vocabulary = gf.Vocabulary.from_folder(folder, "v2")
    for name in ("gf-12L-95M-i4096", "gf-20L-95M-i4096", "Geneformer-V2-316M"):
        EncoderConfig.preset(name).check_vocabulary(vocabulary.identity())


# What transformers 4.6 wrote of the 12 layers, and later ones of the 95M models.
SETTINGS = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.02, "gradient_checkpointing": False,
    "hidden_act": "relu", "hidden_dropout_prob": 0.02, "hidden_size": 512, "initializer_range": 0.02,
    "intermediate_size": 1024, "layer_norm_eps": 1e-12, "max_position_embeddings": 2048, "model_type": "bert",
    "num_attention_heads": 8, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 25_426,
}  # fmt: skip


def test_their_config_json_is_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    assert config_of(path) == EncoderConfig.preset("gf-12L-30M-i2048")
    longer = {**SETTINGS, "max_position_embeddings": 4096, "vocab_size": 20_275, "classifier_dropout": None}
    path.write_text(json.dumps(longer))
    assert config_of(path) == EncoderConfig.preset("gf-12L-95M-i4096")
    assert families.recognise(tmp_path) is families.family("geneformer")


class Executed:
    """What a pickle would run when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def run_of_classifier(out: Path, prefix: str, kind: str, classes: dict) -> Path:
    """What Geneformer's Classifier leaves: its dictionary of classes, and below a run the model and its checkpoint."""
    transformers = pytest.importorskip("transformers")
    settings = {**SETTINGS, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8}
    settings |= {"vocab_size": 20_275, "max_position_embeddings": 64}
    make = {"cell": "BertForSequenceClassification", "gene": "BertForTokenClassification"}[kind]
    torch.manual_seed(3)
    config = transformers.BertConfig(**{k: v for k, v in settings.items() if k != "architectures"})
    config.num_labels = len(classes)
    model = getattr(transformers, make)(config)
    run = out / f"240607_geneformer_{kind}Classifier_{prefix}" / "ksplit1"
    for folder in (run, run / "checkpoint-125"):
        model.save_pretrained(folder)
        if kind == "gene":  # as all were before safetensors
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(Executed(out / "executed")))
        (folder / "trainer_state.json").write_text("{}")
    (out / f"{prefix}_id_class_dict.pkl").write_bytes(pickle.dumps(classes))
    return run


@pytest.mark.parametrize("kind", ["cell", "gene"])
def test_runs_of_its_classifier_load_and_nothing_of_the_trainers_is_opened(kind: str, tmp_path: Path) -> None:
    run = run_of_classifier(tmp_path, "hearts", kind, {0: "dcm", 1: "hcm", 2: "nf"})
    for folder in (run, run / "checkpoint-125"):
        OPENED.clear()
        encoder = gf.load(folder, device="cpu")
        opened = {Path(name).name for name in OPENED if str(folder) in name}
        # safetensors opens its files in Rust, which nobody hears.
        assert opened - {"SHA256SUMS"} == {"config.json", *(["pytorch_model.bin"] if kind == "gene" else [])}
        assert encoder.config.vocabulary == "geneformer-v2"
        card = read_card(folder, encoder)
        assert card == {"kind": f"{kind}s", "tasks": [{"name": "label", "classes": ["dcm", "hcm", "nf"]}]}
    assert not (tmp_path / "executed").exists()


def test_classes_are_those_of_the_models_own_run(tmp_path: Path) -> None:
    run = run_of_classifier(tmp_path, "hearts", "cell", {0: "dcm", 1: "hcm"})
    other = run_of_classifier(tmp_path, "livers", "cell", {1: "ill", 0: "well"})
    for folder, classes in ((run, ["dcm", "hcm"]), (other, ["well", "ill"])):
        assert read_card(folder, gf.load(folder, device="cpu"))["tasks"][0]["classes"] == classes
    # A run that was moved away from what it belongs to has the names that transformers makes up.
    alone = (tmp_path / "moved" / "to" / "some" / "place").parent
    alone.parent.mkdir(parents=True)
    run.rename(alone)
    with pytest.warns(UserWarning, match=r"which of hearts_id_class_dict\.pkl, livers_id_class_dict\.pkl names the"):
        assert read_card(alone, gf.load(alone, device="cpu"))["tasks"][0]["classes"] == ["LABEL_0", "LABEL_1"]


def test_a_dictionary_of_classes_is_read_without_executing_it(tmp_path: Path) -> None:
    run = run_of_classifier(tmp_path, "hearts", "cell", {0: "dcm", 1: "hcm"})
    encoder, path = gf.load(run, device="cpu"), tmp_path / "hearts_id_class_dict.pkl"
    path.write_bytes(pickle.dumps({0: "a", 1: Executed(tmp_path / "executed")}))
    with pytest.raises(CheckpointError, match=r"hearts_id_class_dict\.pkl: refused.*move it elsewhere"):
        read_card(run, encoder)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(pickle.dumps({0: "a", 2: "b"}))
    with pytest.raises(CheckpointError, match="holds no classes numbered from 0"):
        read_card(run, encoder)
    path.write_bytes(pickle.dumps({0: "a", 1: "b", 2: "c"}))
    with pytest.warns(UserWarning, match="names 3 classes, but .* tells 2 apart"):
        assert read_card(run, encoder)["tasks"][0]["classes"] == ["LABEL_0", "LABEL_1"]


def test_a_copy_of_helicals_embeds_with_the_dictionaries_beside_it(shared_dir: Path, tmp_path: Path) -> None:
    """Its cache has ``v2/token_dictionary.pkl`` and others without suffix, and weights in ``v2/gf-12L-38M-i4096``."""
    folder = tmp_path / "geneformer" / "v2"
    small = dataclasses.replace(
        EncoderConfig.preset("gf-12L-38M-i4096"), n_layers=2, width=64, n_heads=1, ff_width=64, init_std=0.2
    )
    model = gf.save(Encoder(small, "mlm"), folder / "gf-12L-38M-i4096")
    (model / "training_args.bin").write_bytes(b"never opened")
    for kind in ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict"):
        (folder / f"{kind}.pkl").write_bytes((shared_dir / "data" / "dicts" / f"{kind}_gc95M.pkl").read_bytes())
    cells = shared_dir / "data" / "pbmc_facs_test100" / "pbmc_facs_test100.h5ad"
    if not cells.exists():
        cells = next((shared_dir / "data").rglob("*test100*.h5ad"))
    vectors = gf.embed(cells, model, dictionary=folder, max_cells=3, device="cpu", progress=False)
    assert vectors.shape == (3, 64)
    assert torch.from_numpy(vectors).isfinite().all()
