"""What a model says about cells: embeddings, classes, and the genes it expects where one is masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geneformer_fast.data.batches import evaluation_pieces
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.loader import load_pieces
from geneformer_fast.data.masking import Masking, mask_genes
from geneformer_fast.data.values import preparation_in
from geneformer_fast.encoder import Encoder
from geneformer_fast.extract.encoding import TOKEN_BUDGET, EncodingRun
from geneformer_fast.extract.pooling import choose_pool
from geneformer_fast.finetuning.predictions import ClassifyingRun, some_cells
from geneformer_fast.heads import CellClassifier, MLMHead
from geneformer_fast.tokenization.arrow import TokenFolder

#: Genes that are looked at where one is masked, and cells in which genes are.
N_GENES, N_MASKED_CELLS = 20, 200
# Every asked gene is hidden: what a model repeats of what it is shown tells nothing.
_MASKING = Masking(share=0.15, mask=1.0, random=0.0)


@dataclass(frozen=True)
class Answers:
    """What one model says.

    Attributes
    ----------
    embeddings
        [n, C] float32.
    logits
        [n, classes] float32 of a classifier of cells, else None.
    genes
        [R, N_GENES] the likeliest genes at R masked places, the likeliest first, of a head of masked genes; else None.
    targets
        [R] what stood there.
    n_bytes
        Of parameters and buffers.
    dtype
        Of products in floating point.
    scheme
        Of a quantized model, else None.
    """

    embeddings: np.ndarray
    logits: np.ndarray | None
    genes: np.ndarray | None
    targets: np.ndarray | None
    n_bytes: int
    dtype: str
    scheme: str | None


@dataclass(frozen=True)
class Questions:
    """Cells that several models are asked about, in the same words.

    Attributes
    ----------
    tokens
        The folder.
    cells
        [n] their numbers in it.
    layer
        Whose embeddings.
    token_budget
        Tokens per batch; None chooses by device.
    seed
        Of the masks.
    progress
        Whether to show progress bars; None shows them on a terminal, and lines of the log elsewhere.
    """

    tokens: TokenFolder
    cells: np.ndarray
    layer: str | int
    token_budget: int | None
    seed: int
    progress: bool | None

    def ask(self, encoder: Encoder) -> Answers:
        """Go over the cells with a model.

        Raises
        ------
        VocabularyError
            The tokens belong to another vocabulary.
        """
        cells = some_cells(self.tokens, self.cells, identity_of(self.tokens, encoder.config))
        pool = choose_pool(None, encoder.config, cells.cls_id)
        embedding = EncodingRun(encoder, cells, pool, self.layer, self.token_budget, self.progress)
        logits = genes = targets = None
        if isinstance(encoder.head, CellClassifier):
            logits = ClassifyingRun(encoder, cells, self.token_budget, self.progress).to_memory()
        # Of families that read values no gene is asked for by masking it: theirs are not named but valued.
        if isinstance(encoder.head, MLMHead) and preparation_in(self.tokens) is None:
            genes, targets = self._masked_genes(encoder, identity_of(self.tokens, encoder.config))
        sizes = (x.numel() * x.element_size() for x in (*encoder.parameters(), *encoder.buffers()))
        scheme = None if encoder.quantization is None else encoder.quantization.scheme
        return Answers(
            embedding.to_memory(), logits, genes, targets, sum(sizes), str(encoder.dtype).removeprefix("torch."), scheme
        )

    def _masked_genes(self, encoder: Encoder, identity: Any) -> tuple[np.ndarray, np.ndarray]:
        """(likeliest genes [R, N_GENES], right ones [R]) at masked places of the first cells."""
        kinds = TokenKinds.of(identity, encoder.config)
        is_gene = torch.zeros(encoder.config.vocab_size, dtype=torch.bool)
        is_gene[torch.from_numpy(kinds.gene_ids)] = True
        never = (~is_gene).to(encoder.device)
        budget = self.token_budget or TOKEN_BUDGET.get(encoder.device.type, TOKEN_BUDGET["cpu"])
        pieces = evaluation_pieces(self.tokens.lengths(), self.cells[:N_MASKED_CELLS], budget)
        batches = load_pieces(
            self.tokens, pieces, lambda ragged, _, random: mask_genes(ragged, kinds, _MASKING, random), seed=self.seed
        )
        genes, targets = [np.zeros((0, N_GENES), np.int64)], [np.zeros(0, np.int64)]
        with torch.inference_mode():
            for _, batch in batches:
                asked = batch.to(encoder.device)
                logits = encoder.logits(encoder(asked.tokens), asked.rows).float().masked_fill(never, -torch.inf)
                genes.append(logits.topk(min(N_GENES, logits.shape[1])).indices.cpu().numpy())
                targets.append(batch.targets.numpy())
        return np.concatenate(genes), np.concatenate(targets)
