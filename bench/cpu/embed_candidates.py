"""What is timed when cells are embedded: ours, and the rivals, on the same cells with the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.cpu.embed_rival import extractor_embeddings, stock_embeddings
from bench.machine import ROOT
from bench.weights import sharpen, tame

SHARED = ROOT.parent / "shared"
#: The cells whose tokens, as the official tokenizer wrote them, give the distribution of lengths.
SETS = ("pbmc_facs", "pbmc3k")

Run = Callable[[Sequence[np.ndarray], int], np.ndarray]


@dataclass(frozen=True)
class Geometry:
    """A published model's shape; its weights here are random.

    Attributes
    ----------
    least_cosine
        How well embeddings in bfloat16 must agree with others, as ``embed_case.check_agreement`` measures it.
    """

    name: str
    family: str
    vocab_size: int
    width: int
    n_layers: int
    n_heads: int
    ff_width: int
    max_len: int
    least_cosine: float = 0.99

    @property
    def has_cls(self) -> bool:
        """Whether cells lie between CLS and EOS."""
        return self.family == "V2"

    def stock_config(self) -> Any:
        """The same as a BertConfig."""
        from transformers import BertConfig

        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.ff_width,
            max_position_embeddings=self.max_len,
            hidden_act="relu",
            layer_norm_eps=1e-12,
            pad_token_id=0,
        )


GEOMETRIES = {
    "v1-10m": Geometry("v1-10m", "V1", 25_426, 256, 6, 4, 512, 2048),
    # Twelve layers: stock parts in bfloat16 agree with float32 to 0.982, ours to 0.986.
    "v2-104m": Geometry("v2-104m", "V2", 20_275, 768, 12, 12, 3072, 4096, least_cosine=0.98),
}


@dataclass(frozen=True)
class Candidate:
    """One way to embed.

    Attributes
    ----------
    what
        One line for the tables.
    layer
        ``"penultimate"`` or ``"last"``: which layer's output the result is.
    load
        Takes a `Workplace`, loads the model and gives what is timed: of token lists and cells per batch for rivals.
    is_ours
        Ours choose their batches themselves.
    """

    what: str
    layer: str
    load: Callable[[Workplace], Run]
    is_ours: bool = False


@dataclass(frozen=True)
class Workplace:
    """A folder with a checkpoint (``model``) and the tokens of some cells (``tokens``).

    ``is_tame``: branches add as little to the stream as :func:`bench.weights.tame` leaves them, without which nothing
    agrees after twelve layers of int8. ``score_spread``: that of attention's scores, by :func:`bench.weights.sharpen`;
    0 leaves fresh weights.
    """

    folder: Path
    geometry: Geometry
    is_tame: bool = False
    score_spread: float = 0.0

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / f"model-{self.geometry.name}"

    @property
    def tokens(self) -> Path:
        """The tokens, as ``datasets`` saves them."""
        return self.folder / f"tokens-{self.geometry.name}"

    def prepare(self, n_cells: int) -> None:
        """Make the checkpoint and take the cells."""
        self.prepare_with(real_cells(self.geometry.family, n_cells))

    def prepare_with(self, cells: pa.Table) -> None:
        """Make the checkpoint and take these cells: ``input_ids`` and ``length``."""
        import datasets
        from transformers import BertForMaskedLM

        if not (self.model / "config.json").exists():
            torch.manual_seed(0)
            model = BertForMaskedLM(self.geometry.stock_config())
            layers = model.bert.encoder.layer
            if self.score_spread:
                attention = [layer.attention.self for layer in layers]
                sharpen([linear for each in attention for linear in (each.query, each.key)], self.score_spread)
            if self.is_tame:
                tame([half.output.dense for layer in layers for half in (layer.attention, layer)])
            model.save_pretrained(self.model)
        shutil.rmtree(self.tokens, ignore_errors=True)
        datasets.disable_progress_bars()
        datasets.Dataset(cells).save_to_disk(str(self.tokens))

    def token_lists(self) -> list[np.ndarray]:
        """The tokens in memory."""
        from geneformer_fast import open_tokens

        with open_tokens(self.tokens) as folder:
            values, bounds = folder.read(range(folder.n_cells))
        return np.split(values, bounds[1:-1])


def real_cells(family: str, n_cells: int, *, seed: int = 0) -> pa.Table:
    """Tokens of ``n_cells`` real cells whose lengths are spread as those of all 6,474, in an order by chance."""
    table = all_real_cells(family)
    by_length = np.argsort(table["length"].to_numpy(), kind="stable")
    # The middles of equal shares of the sorted cells, and the longest cell of all: it decides the memory.
    chosen = by_length[((np.arange(n_cells) + 0.5) / n_cells * len(by_length)).astype(int)]
    chosen[-1] = by_length[-1]
    return table.take(np.random.default_rng(seed).permutation(chosen))


def all_real_cells(family: str) -> pa.Table:
    """Tokens of all real cells, as the official tokenizer of a family wrote them."""
    folder = SHARED / "data" / "reference_official"
    if not folder.is_dir():
        raise FileNotFoundError("the benchmark takes its cells from shared/data beside the checkout, which is absent")
    tables = [pq.read_table(folder / f"{name}__{family}.parquet", columns=["input_ids", "length"]) for name in SETS]
    return pa.concat_tables(tables)


def _ours(layer: str, dtype: str) -> Callable[[Workplace], Run]:
    def load_ours(place: Workplace) -> Run:
        from geneformer_fast import embed, load

        model = load(place.model, dtype=dtype, device="cpu")
        # From the disk, in batches of its own choice.
        return lambda cells, batch_size: embed(place.tokens, model, pool="mean", layer=layer, progress=False)

    return load_ours


def _extractor(place: Workplace) -> Run:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(place.model).eval()
    has_cls = place.geometry.has_cls
    return lambda cells, batch_size: extractor_embeddings(model, cells, has_cls=has_cls, batch_size=batch_size)


def _stock(place: Workplace) -> Run:
    from transformers import BertModel

    # Not with dtype=, which transformers before 4.56 calls torch_dtype.
    model = BertModel.from_pretrained(place.model, attn_implementation="sdpa", add_pooling_layer=False)
    model = model.bfloat16().eval()
    has_cls = place.geometry.has_cls
    return lambda cells, batch_size: stock_embeddings(model, cells, has_cls=has_cls, batch_size=batch_size)


CANDIDATES = {
    "ours": Candidate("this project, second-to-last layer", "penultimate", _ours("penultimate", "auto"), True),
    "ours-last": Candidate("this project, last layer", "last", _ours("last", "auto"), True),
    "ours-float32": Candidate(
        "this project, second-to-last layer, float32", "penultimate", _ours("penultimate", "float32"), True
    ),
    "extractor": Candidate(
        "transformers as Geneformer's extractor calls it: float32, default attention, padded, all states, logits",
        "penultimate",
        _extractor,
    ),
    "extractor-tuned": Candidate("the same with the batch size that is fastest here", "penultimate", _extractor),
    "stock-bfloat16": Candidate(
        "best stock parts: BertModel, bfloat16, SDPA, padded, no head, last layer", "last", _stock
    ),
}
