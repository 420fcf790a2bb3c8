"""BioNeMo Geneformer: Megatron's pre-norm BERT over ranked genes (NVIDIA BioNeMo framework)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families import bionemo_vocabulary
from geneformer_fast.families.family import Family, Reading, TokenLayout
from geneformer_fast.families.settings import said_in

if TYPE_CHECKING:
    from geneformer_fast.checkpoints.mapping import Entry
    from geneformer_fast.encoder import Encoder

# How much of a file is looked through for names of tensors: the header of safetensors, or the program of a pickle.
_LOOKED_AT = 4 << 20
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

LAYOUT = TokenLayout(
    special=bionemo_vocabulary.numbered(),
    max_len=2048,
    published="bionemo",
    fingerprint="7cd1e82ff683fc0f5c82091a309cd05c96262ce171dfe5ccd49d7fd821873f47",
    n_tokens=25_429,
    totals_over_vocabulary=True,
    files=bionemo_vocabulary.FILES,
    read=bionemo_vocabulary.read,
    derived_from="v1",
    derive=bionemo_vocabulary.derive,
)


def _preset(n_layers: int, width: int, n_heads: int, ff_width: int) -> EncoderConfig:
    # The model card says ReLU; the released weights need GELU: tanh in the blocks (fused bias-gelu), erf in the head.
    return EncoderConfig(
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        ff_width=ff_width,
        vocab_size=25_472,
        max_len=2048,
        norm="pre",
        activation="gelu_tanh",
        head_activation="gelu",
        embedding_norm=False,
        final_norm=True,
        n_token_types=0,
        dropout=0.02,
        attention_dropout=0.1,
        pad_id=2,
        vocabulary="bionemo",
        family="bionemo",
    )


def _recipe(steps: int) -> dict[str, Any]:
    """From its documentation."""
    return dict(
        steps=steps,
        batch_cells=2048,
        learning_rate=1e-3,
        schedule="cosine",
        warmup_share=0.01,
        floor=0.02,  # a rate of 2e-5
        floor_share=0.05,
        weight_decay=0.1,
        precision="bfloat16",
        masking={"mask": 0.8, "random": 0.02},
    )


def entries(config: EncoderConfig, head: str | None = "mlm") -> list[Entry]:
    """The table for BioNeMo's Megatron encoder (Transformer Engine layer names), with its LM head or without."""
    from geneformer_fast.checkpoints.mapping import Entry, affine

    table = [
        Entry("embeddings.token.weight", ("embedding.word_embeddings.weight",)),
        Entry("embeddings.position.weight", ("embedding.position_embeddings.weight",)),
    ]
    for i in range(config.n_layers):
        theirs, ours = f"encoder.layers.{i}.", f"blocks.{i}."
        for norm, module in (("attention_norm", "self_attention.linear_qkv"), ("ff_norm", "mlp.linear_fc1")):
            table += [
                Entry(f"{ours}{norm}.{kind}", (f"{theirs}{module}.layer_norm_{kind}",)) for kind in ("weight", "bias")
            ]
        table += affine(f"{ours}qkv", f"{theirs}self_attention.linear_qkv", n_heads=config.n_heads)
        table += affine(f"{ours}out", f"{theirs}self_attention.linear_proj")
        table += affine(f"{ours}up", f"{theirs}mlp.linear_fc1")
        table += affine(f"{ours}down", f"{theirs}mlp.linear_fc2")
    table += affine("final_norm", "encoder.final_layernorm")
    if head == "mlm":
        table += affine("head.dense", "lm_head.dense")
        table += affine("head.norm", "lm_head.layer_norm")
        table.append(Entry("head.bias", ("output_layer.bias",)))
        if not config.tied_decoder:
            table.append(Entry("head.decoder.weight", ("output_layer.weight",)))
    return table


def recognise(place: Path) -> bool:
    """An archive of NeMo, a folder of one, or tensors under Megatron's names."""
    if place.is_file():
        return place.suffix == ".nemo" or (place.suffix in _SUFFIXES and _names_megatron(place))
    if not place.is_dir():
        return False
    if any((folder / ".metadata").is_file() for folder in (place, place / "weights")):
        return True
    if (place / "model_config.yaml").is_file() or any(place.glob("*.nemo")):
        return True
    if "num_hidden_layers" in (said := said_in(place / "config.json")) and said.get("model_type") == "bert":
        return False  # BERT's own, of which only a config.json is read here
    files = sorted(path for path in place.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    return bool(files) and _names_megatron(files[0])


def _names_megatron(path: Path) -> bool:
    """Whether names of Megatron's tensors stand near the beginning of a file; nothing in it is executed.

    torch.save writes them there, before the numbers; so does safetensors.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_LOOKED_AT)
    except OSError:
        return False
    return b"word_embeddings" in head and (b"linear_qkv" in head or b"query_key_value" in head)


def load(place: Path, **options: Any) -> Encoder:
    """As :func:`geneformer_fast.families.bionemo_checkpoints.load`."""
    from geneformer_fast.families import bionemo_checkpoints

    return bionemo_checkpoints.load(place, **options)


FAMILY = Family(
    name="bionemo",
    title="BioNeMo Geneformer",
    paper="St. John et al., BioNeMo Framework, arXiv:2411.10548 (2024)",
    licence="NVIDIA Open Model License (weights), Apache-2.0 (code)",
    presets={"bionemo-10m": _preset(6, 256, 4, 512), "bionemo-106m": _preset(12, 768, 12, 3072)},
    layouts={"bionemo": LAYOUT},
    recipes={"bionemo-10m": _recipe(81_485), "bionemo-106m": _recipe(35_650)},
    recognise=recognise,
    load=load,
    entries=entries,
    reading=Reading(
        layer="last",
        # BioNeMo 1's rule, and what BioNeMo 2's was meant to be.
        pool="mean",
        pools={
            "bionemo1": "the mean over all positions but the first, which is CLS",
            "bionemo2": "the mean over all positions but CLS and the last gene, which has no end token behind it",
        },
    ),
)
