"""Folders as scGPT's own tools leave them: its key names in every spelling, its args.json, its vocab.json."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from formula_weights import formula_weights

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder

#: What the pretraining of the whole-human model saved, in its order; sizes are those of the test.
ARGS: dict[str, Any] = {
    "data_source": "/data/human", "load_model": None, "n_hvg": None, "valid_size_or_ratio": 0.003, "grad_accu_steps": 1,
    "pad_token": "<pad>", "input_style": "binned", "input_emb_style": "continuous", "n_bins": 51, "max_seq_len": 1200,
    "training_tasks": "both", "mask_ratio": [0.25, 0.5, 0.75], "trunc_by_sample": True, "rank": 0, "batch_size": 32,
    "epochs": 6, "lr": 0.0001, "scheduler_factor": 0.99, "warmup_ratio_or_step": 10000.0, "no_cls": True,
    "no_cce": True, "fp16": True, "fast_transformer": True, "nlayers": 2, "nheads": 4, "embsize": 16, "d_hid": 16,
    "dropout": 0.2,
    "n_layers_cls": 3, "mask_value": -1, "pad_value": -2, "USE_CLS": False, "USE_CCE": False, "MVC": True,
    "USE_GENERATIVE_TRAINING": True, "world_size": 16, "distributed": True, "local_rank": 0, "gpu": 0,
}  # fmt: skip
N_GENES, WIDTH, N_LAYERS = 17, 16, 2
SPECIAL = ("<pad>", "<cls>", "<eoc>")
#: How q, k and v, and what projects the result, are called: by FlashAttention 1, its successor, and torch.
SPELLINGS = {
    "flash": ("self_attn.Wqkv.weight", "self_attn.Wqkv.bias", "self_attn.out_proj."),
    "flash2": ("self_attn._impl.Wqkv.weight", "self_attn._impl.Wqkv.bias", "self_attn._impl.out_proj."),
    "torch": ("self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj."),
}


def vocabulary(n_genes: int = N_GENES, special: tuple[str, ...] = SPECIAL) -> dict[str, int]:
    """Token to id, in an order of its own, as the original's file is."""
    found = {f"GENE{i}": i for i in range(n_genes)} | {name: n_genes + i for i, name in enumerate(special)}
    return dict(sorted(found.items(), key=lambda item: (item[1] * 7) % len(found)))


def shapes(
    *,
    width: int = WIDTH,
    n_layers: int = N_LAYERS,
    n_tokens: int = N_GENES + len(SPECIAL),
    n_cls: int | None = 3,
    ff_width: int | None = None,
    n_cls_layers: int = 3,
    mvc: bool = True,
    decoder: bool = True,
    zeros: bool = False,
    bins: int | None = None,
) -> dict[str, list[int]]:
    """Name of every tensor of ``TransformerModel.state_dict()`` in torch's spelling to its shape, in the model's order.

    ``bins``: values are looked up in so many rows (``input_emb_style="category"``).
    """
    c, f = width, ff_width or width
    found: dict[str, list[int]] = {"encoder.embedding.weight": [n_tokens, c], **affine("encoder.enc_norm", [c])}
    if bins is None:
        found |= affine("value_encoder.linear1", [c, 1]) | affine("value_encoder.linear2", [c, c])
        found |= affine("value_encoder.norm", [c])
    else:
        found |= {"value_encoder.embedding.weight": [bins, c], **affine("value_encoder.enc_norm", [c])}
    for i in range(n_layers):
        layer = f"transformer_encoder.layers.{i}."
        found |= {f"{layer}self_attn.in_proj_weight": [3 * c, c], f"{layer}self_attn.in_proj_bias": [3 * c]}
        found |= affine(f"{layer}self_attn.out_proj", [c, c])
        found |= affine(f"{layer}linear1", [f, c]) | affine(f"{layer}linear2", [c, f])
        found |= affine(f"{layer}norm1", [c]) | affine(f"{layer}norm2", [c])
    if decoder:
        for part in ("fc", "zero_logit")[: 1 + zeros]:
            for i, rows in ((0, c), (2, c), (4, 1)):
                found |= affine(f"decoder.{part}.{i}", [rows, c])
    if n_cls is not None:
        for i in range(n_cls_layers - 1):
            found |= affine(f"cls_decoder._decoder.{3 * i}", [c, c]) | affine(f"cls_decoder._decoder.{3 * i + 2}", [c])
        found |= affine("cls_decoder.out_layer", [n_cls, c])
    if mvc:
        found |= affine("mvc_decoder.gene2query", [c, c]) | {"mvc_decoder.W.weight": [c, c]}
        found |= affine("mvc_decoder.W_zero_logit", [c, c]) if zeros else {}
    return found


def affine(name: str, shape: list[int]) -> dict[str, list[int]]:
    """A weight, and a bias as long as it."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def weights(sizes: dict[str, list[int]]) -> OrderedDict[str, torch.Tensor]:
    """Numbers by the formula of the fixtures, in the model's order; norms are those of one axis."""
    made = formula_weights(list(sizes), sizes, lambda name: name.endswith(".weight") and len(sizes[name]) == 1)
    return OrderedDict((name, made[name]) for name in sizes)


def spelled(tensors: OrderedDict[str, torch.Tensor], spelling: str, prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """The same under the names of another attention."""
    weight, bias, out = SPELLINGS[spelling]
    found = OrderedDict()
    for name, tensor in tensors.items():
        name = name.replace("self_attn.in_proj_weight", weight).replace("self_attn.in_proj_bias", bias)
        found[prefix + name.replace("self_attn.out_proj.", out)] = tensor
    return found


def write(
    folder: Path,
    tensors: OrderedDict[str, torch.Tensor] | None = None,
    *,
    spelling: str = "flash",
    prefix: str = "",
    vocab: dict[str, int] | None = None,
    name: str = "best_model.pt",
    **changes: Any,
) -> Path:
    """A folder as ``torch.save(model.state_dict())`` and ``json.dump(vars(args), indent=2)`` leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(shapes()) if tensors is None else tensors
    tensors = OrderedDict((key, t.float() if t.dtype == torch.float64 else t) for key, t in tensors.items())
    torch.save(spelled(tensors, spelling, prefix), folder / name)
    (folder / "args.json").write_text(json.dumps({**ARGS, **changes}, indent=2))
    (folder / "vocab.json").write_text(json.dumps(vocabulary() if vocab is None else vocab, indent=2))
    return folder


def small(head: str | None = None, *, n_classes: int = 2, **changes: Any) -> Encoder:
    """An encoder of the family with random weights, large enough for every fast path of a CPU."""
    sizes = dict(
        n_layers=2, width=64, n_heads=2, ff_width=64, vocab_size=60, max_len=60, eps=1e-5, embedding_norm=False,
        n_token_types=0, inputs="pairs", n_bins=51, dropout=0.0, attention_dropout=0.0, pad_id=57, tied_decoder=False,
        vocabulary="scgpt", family="scgpt",
    )  # fmt: skip
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**{**sizes, **changes}), head, n_classes=n_classes).eval()
