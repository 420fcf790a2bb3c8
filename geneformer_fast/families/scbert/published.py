"""The published scBERT: its sizes, and the numbers that stand for values."""

from __future__ import annotations

from geneformer_fast.config import EncoderConfig

#: Genes of the published list; one position more is appended to them.
N_GENES = 16_906
#: Bins of log2 of counts per 10,000, from 0 to 5, and the number that stands for a masked value.
N_BINS, MASK = 6, 6

PUBLISHED = EncoderConfig(
    n_layers=6,
    width=200,
    n_heads=10,
    ff_width=800,
    vocab_size=N_BINS + 1,
    max_len=N_GENES + 1,
    norm="pre",
    activation="gelu",
    head_activation="gelu",
    eps=1e-5,
    embedding_norm=False,
    final_norm=True,
    n_token_types=0,
    inputs="tokens",
    dropout=0.0,
    attention_dropout=0.0,
    pad_id=MASK,
    tied_decoder=False,
    vocabulary="scbert",
    family="scbert",
    attention="favor",
    attention_width=640,
    qkv_bias=False,
    n_features=266,
)
