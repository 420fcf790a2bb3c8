"""A small BioNeMo Geneformer and its dictionaries, as an archive has them."""

from __future__ import annotations

import json
from pathlib import Path

import bionemo_files as files
import torch
import toys

#: Rows of the token table beyond the vocabulary.
N_PADDED = 128 - toys.N_GENES - 5
_VOCABULARY = 128


def write_dictionaries(folder: Path) -> Path:
    """``geneformer.vocab`` and ``medians.json``."""
    words = toys.vocabulary("bionemo")
    folder.mkdir()
    names = {f"gene{i}": gene for i, gene in enumerate(words.token_ids)}
    (folder / "geneformer.vocab").write_text(json.dumps({"gene_to_ens": names}))
    (folder / "medians.json").write_text(json.dumps(words.medians))
    return folder


def model_state() -> files.State:
    """Weights away from the trivial start, of the geometry that the configurations of bionemo_files say."""
    generator = torch.Generator().manual_seed(8)
    sizes = {
        "embedding.word_embeddings.weight": (_VOCABULARY, 16),
        "embedding.position_embeddings.weight": (64, 16),
        "encoder.final_layernorm.weight": (16,),
        "encoder.final_layernorm.bias": (16,),
        "lm_head.dense.weight": (16, 16),
        "lm_head.dense.bias": (16,),
        "lm_head.layer_norm.weight": (16,),
        "lm_head.layer_norm.bias": (16,),
        "output_layer.bias": (_VOCABULARY,),
    }
    for i in range(2):
        layer = f"encoder.layers.{i}."
        for norm in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            sizes |= {f"{layer}{norm}.layer_norm_weight": (16,), f"{layer}{norm}.layer_norm_bias": (16,)}
        for name, n_rows, n_columns in (
            ("self_attention.linear_qkv", 48, 16), ("self_attention.linear_proj", 16, 16),
            ("mlp.linear_fc1", 32, 16), ("mlp.linear_fc2", 16, 32),
        ):  # fmt: skip
            sizes |= {f"{layer}{name}.weight": (n_rows, n_columns), f"{layer}{name}.bias": (n_rows,)}
    state = {}
    for name, size in sizes.items():
        state[name] = torch.randn(size, generator=generator) * 0.3
        if name.endswith(("layer_norm_weight", "norm.weight")):
            state[name] += 1
    return state


def archive(path: Path, dictionaries: Path) -> Path:
    """A ``.nemo`` archive with its dictionaries inside, under the numbers that NeMo gives them."""
    content = {
        "model_config.yaml": files.NEMO1_CONFIG.format(activation="gelu").encode(),
        "model_weights.ckpt": files.saved(files.nemo1_names(model_state())),
    }
    for each in sorted(dictionaries.iterdir()):
        content[f"0f3c9d2a_{each.name}"] = each.read_bytes()
    return files.write_nemo(path, content)
