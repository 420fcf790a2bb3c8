"""A sixth family, in one file: everything that anybody has to write who brings a model.

Its cells are ranked genes after one special token; a gene's vector is looked up and multiplied by a number that falls
with its rank, so it has an input layer of its own. Its checkpoint is a folder of ``sixth.json``, ``genes.csv`` and
``weights.safetensors`` with names of its own. Its authors read the mean over genes of the last layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from geneformer_fast.checkpoints.mapping import Entry, affine, to_ours, to_theirs
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.config import EncoderConfig, matmul_dtype
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, VocabularyError
from geneformer_fast.families import Family, Reading, TokenLayout
from geneformer_fast.families.settings import said_in
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.dictionaries import Contents, Release

SETTINGS, WEIGHTS, GENES = "sixth.json", "weights.safetensors", "genes.csv"
SPECIAL = {"cls": 0, "pad": 1, "mask": 2}


class FadingRanks(nn.Module):
    """A gene's vector, fainter the further down it is ranked."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.half_life = nn.Parameter(torch.full((1,), 8.0))

    def forward(
        self,
        tokens: Ragged,
        norm: nn.LayerNorm | None,
        dropout_p: float,
        out_dtype: torch.dtype,
        reader: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] token ids -> the stream [T, C], and the same in ``out_dtype``."""
        fading = torch.exp2(-tokens.positions() / self.half_life)[:, None]
        stream = self.table(tokens.values) * fading
        stream = nn.functional.dropout(stream if norm is None else norm(stream), dropout_p)
        return stream, stream.to(out_dtype)


def read_genes(path: Path, _: Callable[[], Release]) -> Contents:
    """genes.csv: a gene and its median on each line, in order of their tokens."""
    try:
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
        medians = {gene: float(median) for gene, median in rows}
    except ValueError as error:
        raise VocabularyError(f"{path}: not a gene and its median on each line ({error})") from None
    genes = {gene: len(SPECIAL) + index for index, gene in enumerate(medians)}
    return Contents("sixth-genes", "sixth", genes, medians, special=dict(SPECIAL))


def preset(n_layers: int, width: int) -> EncoderConfig:
    return EncoderConfig(
        n_layers=n_layers, width=width, n_heads=2, ff_width=2 * width, vocab_size=43, max_len=24, activation="gelu",
        eps=1e-5, embedding_norm=False, n_token_types=0, pad_id=1, init_std=0.3, family="sixth",
        vocabulary="sixth-genes",
    )  # fmt: skip


def entries(config: EncoderConfig, head: str | None = None) -> list[Entry]:
    table = [Entry("embeddings.table.weight", ("genes",)), Entry("embeddings.half_life", ("half_life",))]
    for i in range(config.n_layers):
        theirs, ours = f"stack/{i}/", f"blocks.{i}."
        table += affine(f"{ours}qkv", f"{theirs}q", f"{theirs}k", f"{theirs}v")
        table += affine(f"{ours}out", f"{theirs}o")
        table += affine(f"{ours}attention_norm", f"{theirs}n1")
        table += affine(f"{ours}up", f"{theirs}f1")
        table += affine(f"{ours}down", f"{theirs}f2")
        table += affine(f"{ours}ff_norm", f"{theirs}n2")
    return table


def recognise(folder: Path) -> bool:
    return said_in(folder / SETTINGS).get("model") == "sixth"


def load(folder: Path, *, dtype: Any = None, device: Any = "cpu", verify: bool | None = None) -> Encoder:
    said = said_in(folder / SETTINGS)
    config = preset(said["layers"], said["width"])
    encoder = skeleton(config)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    state = to_ours(load_file(folder / WEIGHTS), entries(config), shapes, source=str(folder))
    encoder.load_state_dict(state, assign=True)
    return encoder.to(device).cast(matmul_dtype(dtype, device) or torch.float32).eval()


def save(encoder: Encoder, folder: Path, *, overwrite: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=overwrite)
    tensors = to_theirs(encoder.state_dict(), entries(encoder.config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    said = {"model": "sixth", "layers": encoder.config.n_layers, "width": encoder.config.width}
    (folder / SETTINGS).write_text(json.dumps(said))
    return folder


FAMILY = Family(
    name="sixth",
    title="Sixth",
    paper="Nobody et al., A model that fades (2030)",
    licence="CC0",
    presets={"sixth-small": preset(3, 16)},
    layouts={
        "sixth": TokenLayout(special=SPECIAL, max_len=24, published="sixth-genes", files=(GENES,), read=read_genes)
    },
    recognise=recognise,
    load=load,
    save=save,
    is_saved=lambda encoder: encoder.head is None,
    entries=entries,
    input_layer=FadingRanks,
    reading=Reading(layer="last", pool="mean"),
    notes=("its card says that it glows, and it fades",),
    refused={"perturb": "a gene that is taken out would make all others louder"},
)
