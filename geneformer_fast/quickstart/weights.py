"""An encoder that tells cells apart without having been trained: gene vectors from the counts, the rest random.

A published model is not in the package, training one takes longer than a tour may, and random gene vectors say little.
So genes that go up and down together over cells get vectors that point the same way, as a trained model has them too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.tokenization.vocabulary import Vocabulary

#: Principal components that gene vectors are made of; later ones hold little but noise of these few cells.
N_COMPONENTS = 12
#: A pattern that is added to every token in units of a gene vector, so that LayerNorm, which makes all tokens of one
#: size, leaves genes that say little small beside those that say much.
COMMON = 3.0
#: Of what attention adds to a token: it averages over a thousand genes, and little is left of each.
ATTENTION_GAIN = 12.0


def encoder_from_counts(
    counts: sparse.csr_matrix, gene_ids: np.ndarray, vocabulary: Vocabulary, config: EncoderConfig, *, seed: int
) -> Encoder:
    """A post-norm encoder with a head for masked genes.

    Parameters
    ----------
    counts
        [cells, genes].
    gene_ids
        [genes] Ensembl ids.
    vocabulary
        Whose tokens the model reads.
    config
        Its geometry; random weights keep the size of what goes through them.
    seed
        Of random weights.
    """
    torch.manual_seed(seed)
    model: Any = Encoder(config, head="mlm")
    known = [place for place, gene in enumerate(gene_ids) if gene in vocabulary.token_ids]
    token_ids = torch.tensor([vocabulary.token_ids[gene_ids[place]] for place in known])
    components = torch.from_numpy(gene_vectors(counts[:, known], min(N_COMPONENTS, config.width)))
    turned = torch.linalg.qr(torch.randn(config.width, components.shape[1])).Q.T
    vectors = components @ turned * (config.width / components.shape[1]) ** 0.5
    shares = np.asarray((counts[:, known] > 0).sum(0), dtype=np.float64).ravel()
    pattern = COMMON * torch.tensor([1.0, -1.0]).repeat(config.width // 2)
    with torch.no_grad():
        table = model.embeddings.token.weight
        table.normal_()
        table[token_ids] = vectors
        model.embeddings.token_type.weight.copy_(pattern.expand_as(model.embeddings.token_type.weight))
        # Tokens of an average cell add up to nothing: what is left of a sum is what tells a cell from others.
        normed = F.layer_norm(table[token_ids] + pattern, (config.width,))
        weights = torch.from_numpy(shares / shares.sum()).to(normed)
        model.embedding_norm.bias.copy_(-(weights @ normed))
        for block in model.blocks:
            block.out.weight.mul_(ATTENTION_GAIN)
    return model.eval()


def gene_vectors(counts: sparse.csr_matrix, n_components: int) -> np.ndarray:
    """[genes, n_components] float32 of mean square 1: right singular vectors of centred log counts per 10,000."""
    totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    logs = np.log1p((sparse.diags(1e4 / totals) @ counts).toarray().astype(np.float64))
    logs -= logs.mean(0)
    # Of the cells' products with each other, which are fewer than those of genes.
    values, left = np.linalg.eigh(logs @ logs.T)
    kept = slice(-1, -1 - n_components, -1)
    vectors = logs.T @ left[:, kept] / np.sqrt(values[kept])
    return (vectors / np.sqrt((vectors**2).mean())).astype(np.float32)
