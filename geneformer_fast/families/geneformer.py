"""Geneformer: BERT over genes ranked by how far they are above their median (Theodoris et al., Nature 618, 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families.family import Family, Reading, TokenLayout
from geneformer_fast.families.settings import said_in

if TYPE_CHECKING:
    from geneformer_fast.checkpoints.mapping import Entry

V1 = TokenLayout(
    special={"pad": 0, "mask": 1},
    max_len=2048,
    published="geneformer-v1",
    fingerprint="ccc708bfa7ed79132075f96b3be75fb3df8eb41297ba854259ace6c84c930302",
    n_rows=25_426,
    ids_dtype="int16",
)
V2 = TokenLayout(
    special={"pad": 0, "mask": 1, "cls": 2, "eos": 3},
    max_len=4096,
    published="geneformer-v2",
    fingerprint="182c79bd468fb674604795dbad75cf8950f812cf079d87d638b65503383e6a9e",
    n_rows=20_275,
)


def _preset(n_layers: int, width: int, ff_width: int, layout: TokenLayout, dropout: float) -> EncoderConfig:
    assert layout.n_rows is not None
    return EncoderConfig(
        n_layers=n_layers,
        width=width,
        n_heads=width // 64,
        ff_width=ff_width,
        vocab_size=layout.n_rows,
        max_len=layout.max_len,
        dropout=dropout,
        attention_dropout=dropout,
        vocabulary=layout.published,
    )


# The code of Geneformer's collator takes <cls> and <eos> for genes.
_MASKING = {"masks_specials": True}
# From the arguments saved with its runs; precision is not known.
_RECIPES: dict[str, dict[str, Any]] = {
    "geneformer-v1-10m": dict(batch_cells=12 * 12, learning_rate=1e-3, warmup_steps=10_000),
    "geneformer-v1-12l": dict(batch_cells=4 * 12, learning_rate=5e-4, warmup_steps=10_000),
    "geneformer-12l-95m": dict(
        batch_cells=4 * 8, learning_rate=5e-4, schedule="cosine", warmup_steps=5_000, masking=_MASKING
    ),
    # 18 cells per device are known, the number of devices is not: eight are assumed.
    "geneformer-v2-104m": dict(
        batch_cells=18 * 8, learning_rate=2e-4, schedule="cosine", warmup_share=0.007, masking=_MASKING
    ),
}


def recognise(folder: Path) -> bool:
    """A folder of BERT with as many tokens as a vocabulary of Geneformer has."""
    settings = said_in(folder / "config.json")
    return settings.get("model_type", "bert") == "bert" and settings.get("vocab_size") in (V1.n_rows, V2.n_rows)


def entries(config: EncoderConfig, head: str | None) -> list[Entry]:
    """The table of BERT's tensors."""
    from geneformer_fast.checkpoints.mapping import bert_entries

    return bert_entries(config, head)


FAMILY = Family(
    name="geneformer",
    title="Geneformer",
    paper="Theodoris et al., Transfer learning enables predictions in network biology, Nature 618 (2023)",
    licence="Apache-2.0",
    presets={
        "geneformer-v1-10m": _preset(6, 256, 512, V1, 0.02),
        "geneformer-v1-12l": _preset(12, 512, 1024, V1, 0.02),
        # The first models over 4,096 genes. Their dictionaries (gc95M) are those of V2 (gc104M), byte for byte.
        "geneformer-12l-95m": _preset(12, 512, 1024, V2, 0.02),
        "geneformer-12l-95m-clcancer": _preset(12, 512, 1024, V2, 0.02),
        "geneformer-20l-95m": _preset(20, 896, 1792, V2, 0.02),
        "geneformer-v2-104m": _preset(12, 768, 3072, V2, 0.1),
        "geneformer-v2-104m-clcancer": _preset(12, 768, 3072, V2, 0.1),
        "geneformer-v2-316m": _preset(18, 1152, 4608, V2, 0.1),
    },
    # Folders of older revisions are named by cells of pretraining, copies of helical by parameters.
    other_names={
        "gf-6l-30m-i2048": "geneformer-v1-10m",
        "gf-6l-10m-i2048": "geneformer-v1-10m",
        "gf-12l-30m-i2048": "geneformer-v1-12l",
        "gf-12l-40m-i2048": "geneformer-v1-12l",
        "gf-12l-40m-i2048-czi-cellxgene": "geneformer-v1-12l",
        "gf-12l-95m-i4096": "geneformer-12l-95m",
        "gf-12l-38m-i4096": "geneformer-12l-95m",
        "gf-12l-95m-i4096-clcancer": "geneformer-12l-95m-clcancer",
        "gf-12l-38m-i4096-clcancer": "geneformer-12l-95m-clcancer",
        "gf-20l-95m-i4096": "geneformer-20l-95m",
        "gf-20l-151m-i4096": "geneformer-20l-95m",
        "gf-12l-104m-i4096": "geneformer-v2-104m",
        "gf-12l-104m-i4096-clcancer": "geneformer-v2-104m-clcancer",
        "gf-18l-316m-i4096": "geneformer-v2-316m",
    },
    layouts={"v1": V1, "v2": V2},
    recognise=recognise,
    recipes=_RECIPES,
    entries=entries,
    reading=Reading(layer="penultimate"),
)
